"""Whole KTO and AOT runs on real ranks: the same steps on one rank and on two, cut small or not, resumed or not."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch.distributed as dist

from pivot.config import Config
from pivot.config_load import load_config
from pivot.train import train

RUN = """
output_dir: {folder}/{name}
init_from: {folder}/llava
deepspeed: ds_configs/{zero}.json
data: {{train: {folder}/{data}, eval: {folder}/{held_out}, cache_dir: {folder}/cache, workers: 0}}
objective: {{{objective}}}
optim: {{vision_tower: {{lr: 2e-4}}, projector: {{lr: 1e-3}}, language_model: {{lr: 1e-3}}}}
train: {{global_batch_size: 8, max_steps: {steps}, max_tokens_per_micro_batch: {room}, seed: 3}}
checkpoint: {{every_steps: 2, keep: 9}}
evaluate: {{max_new_tokens: 2}}
"""
KTO = "kto: {undesirable_weight: 1.5}"
PAIRS = "kto: {}"
AOT = "dpo: {loss: {aot: 0.5, aot_unpaired: 0.5}}"


def config_of(
    folder: Path,
    name: str,
    objective: str,
    *,
    data: str,
    room: int,
    zero: str = "zero3",
    steps: int = 4,
    **changes: str,
) -> Config:
    """Held-out are single answers, or the pairs that are trained on."""
    held_out = "held-out" if data == "answers" else data
    path = folder / f"{name}-{dist.get_rank()}.yaml"
    path.write_text(
        RUN.format(
            folder=folder,
            name=name,
            objective=objective,
            data=data,
            room=room,
            zero=zero,
            steps=steps,
            held_out=held_out,
        )
    )
    return load_config(path, [f"{key}={value}" for key, value in changes.items()])


def everything(folder: Path) -> None:
    """On one rank each step is one micro-batch without ZeRO; on two it is cut small, and the weights are sharded."""
    alone = dist.get_world_size() == 1
    where = {"room": 4000, "zero": "zero0"} if alone else {"room": 300, "zero": "zero3"}
    for name, objective, data in (("kto", KTO, "answers"), ("pairs", PAIRS, "set"), ("aot", AOT, "set")):
        train(config_of(folder, f"{name}-{dist.get_world_size()}", objective, data=data, **where))
    trees = {"data.image_trees": "true"}
    train(config_of(folder, f"trees-{dist.get_world_size()}", KTO, data="answers", **where, **trees))
    if alone:
        learn(folder)
    else:
        resume(folder)


def resume(folder: Path) -> None:
    """The run on two ranks with all after step 2 lost."""
    if dist.get_rank() == 0:
        checkpoint = "checkpoints/step-00000002"
        shutil.copytree(folder / "kto-2" / checkpoint, folder / "resumed" / checkpoint)
        (folder / "resumed/checkpoints/latest").write_text("step-00000002\n")
        text = (folder / "kto-2/config.yaml").read_text()
        (folder / "resumed/config.yaml").write_text(text.replace("/kto-2", "/resumed"))
    dist.barrier()
    train(config_of(folder, "resumed", KTO, data="answers", room=300))


def learn(folder: Path) -> None:
    train(config_of(folder, "learned", "kto: {beta: 0.5}", data="answers", room=4000, zero="zero0", steps=30))
