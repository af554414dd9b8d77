"""Whole runs with evaluation on real ranks under ZeRO-3; numbers go to files, not to asserts."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from pivot.config import Config
from pivot.config_load import load_config
from pivot.engine import engine
from pivot.train import train

RUN = """
output_dir: {folder}/{name}
init_from: {folder}/llava
deepspeed: ds_configs/zero3.json
data: {{train: {folder}/train, eval: {folder}/held-out, cache_dir: {folder}/cache, workers: 0}}
optim: {{vision_tower: {{lr: 2e-4}}, projector: {{lr: 1e-3}}, language_model: {{lr: 5e-4}}}}
train: {{global_batch_size: 6, max_steps: 3, max_tokens_per_micro_batch: 500, seed: 3}}
evaluate: {{every_steps: 2, num_samples: 21, max_new_tokens: 6}}
"""


def config_of(folder: Path, name: str, objective: str, **changes: str) -> Config:
    path = folder / f"{name}-{dist.get_rank()}.yaml"
    path.write_text(RUN.format(folder=folder, name=name))
    return load_config(path, [f"{key}={value}" for key, value in changes.items()], objective)


def runs(folder: Path) -> None:
    """The same DPO run with weights gathered for the answers, with all ranks in step, and without evaluation; SFT."""
    ranks = dist.get_world_size()
    train(config_of(folder, f"gathered-{ranks}", "dpo"))
    if ranks == 1:
        train(config_of(folder, "sft", "sft", **{"evaluate.every_steps": "0", "checkpoint.resume": "none"}))
        return
    train(config_of(folder, "silent", "dpo", **{"data.eval": "null"}))
    engine.WHOLE_WEIGHTS_ON_CPU = 0
    train(config_of(folder, "in-step", "dpo"))
