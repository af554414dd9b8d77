"""Whole runs of the trainer on real ranks: packed data, ZeRO-3, checkpoints, resume, export."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from unittest import mock

import numpy as np
import torch.distributed as dist

from pivot.config import Config
from pivot.config_load import load_config
from pivot.startup.references import make_references
from pivot.train import train

RUN = """
output_dir: {folder}/{name}
init_from: {folder}/llava
deepspeed: ds_configs/zero3.json
data: {{train: {folder}/set, cache_dir: {folder}/cache, workers: 1}}
objective: {{dpo: {{loss: {{sigmoid: 0.8, bco_pair: 0.2, sft: 1.0}}, bco_shift: running_mean}}}}
optim: {{vision_tower: {{lr: 2e-4, weight_decay: 0.1}}, projector: {{lr: 1e-3}}, language_model: {{lr: 5e-4}}}}
train: {{global_batch_size: 6, max_steps: 5, max_tokens_per_micro_batch: 400, seed: 3}}
checkpoint: {{every_steps: 2, keep: 9}}
"""


def config_of(folder: Path, name: str, **changes: str) -> Config:
    path = folder / f"{name}-{dist.get_rank()}.yaml"
    path.write_text(RUN.format(folder=folder, name=name))
    return load_config(path, [f"{key}={value}" for key, value in changes.items()], "dpo")


def resume(folder: Path) -> None:
    """Five steps unbroken; the same with all after step 2 lost; with step 4 damaged; and once more when finished."""
    train(config_of(folder, "unbroken"))
    cut(folder, "unbroken", "resumed", keep=("step-00000002",))
    train(config_of(folder, "resumed", **{"train.max_tokens_per_micro_batch": "300", "data.workers": "0"}))
    cut(folder, "unbroken", "damaged", keep=("step-00000002", "step-00000004"))
    if dist.get_rank() == 0:
        shard = max((folder / "damaged/checkpoints/step-00000004").rglob("*optim_states.pt"))
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    dist.barrier()
    train(config_of(folder, "damaged"))
    train(config_of(folder, "damaged"))


def cut(folder: Path, source: str, target: str, keep: tuple[str, ...]) -> None:
    """A run as a kill leaves it: its settings, some checkpoints, a half-written one, and `latest` naming the newest."""
    if dist.get_rank() == 0:
        checkpoints = folder / target / "checkpoints"
        for name in keep:
            shutil.copytree(folder / source / "checkpoints" / name, checkpoints / name)
        (checkpoints / "step-00000099.tmp").mkdir()
        (checkpoints / "latest").write_text(keep[-1] + "\n")
        text = (folder / source / "config.yaml").read_text()
        (folder / target / "config.yaml").write_text(text.replace(f"/{source}", f"/{target}"))
    dist.barrier()


def refusals(folder: Path) -> None:
    """What must stop a run before it trains; the messages go to files."""
    train(config_of(folder, "first", **{"train.max_steps": "1", "log.tensorboard": "true"}))
    dist.barrier()
    if dist.get_rank() == 0:
        spoil_reference(folder)
    dist.barrier()
    attempts = {
        "other rate": {"name": "first", "train.max_steps": "1", "optim.projector.lr": "2e-3"},
        "nothing to resume": {"name": "fresh", "checkpoint.resume": "required"},
        "spoilt reference": {"name": "spoilt", "data.cache_dir": f"{folder}/spoilt-cache"},
        "ranks that differ": {"name": "fresh", "optim.projector.lr": f"{1 + dist.get_rank()}e-3"},
        "ranks that stop at other steps": {"name": "fresh", "train.max_steps": f"{2 + dist.get_rank()}"},
        "no such reference": {"name": "also-fresh", "objective.dpo.reference": f"{folder}/nowhere"},
    }
    for case, changes in attempts.items():
        settings = dict(changes)
        try:
            train(config_of(folder, settings.pop("name"), **settings))
            message = "nothing was refused"
        except (ValueError, RuntimeError) as error:
            message = str(error)
        (folder / f"{case}-{dist.get_rank()}.txt").write_text(message)


def spoil_reference(folder: Path) -> None:
    """A cache whose chosen log-probs are off by a thousandth of a nat, as another template or kernel would leave it."""
    shutil.copytree(folder / "cache", folder / "spoilt-cache")
    for file in (folder / "spoilt-cache" / "ref").rglob("*.npy"):
        records = np.load(file)
        records["chosen_logp"] += 2e-3
        np.save(file, records)


def references(folder: Path) -> None:
    """The command fills an own cache, says at once that it is complete, and training finds everything there."""
    changes = {"data.cache_dir": f"{folder}/scored-cache"}
    for name in ("the command", "the command again", "a run behind it"):
        if dist.get_rank() == 0:
            print(f"--- {name}", flush=True)
        if name.startswith("the"):
            make_references(config_of(folder, "scored", **changes))
        else:
            train(config_of(folder, "scored", **changes, **{"train.max_steps": "1"}))
    if dist.get_rank() == 0:
        print("--- end", flush=True)


def stopping(folder: Path) -> None:
    """A signal on one rank ends the run on all, at the same step, with a checkpoint; the run then goes on to its end.

    Two steps are traced meanwhile, and the costs are counted over both parts.
    """
    changes = {"checkpoint.every_steps": "0", "log.profile_steps": "2"}
    changes |= {"log.compare": "{name: a pre-training, flops: 1e12, samples: 3000, gpu_hours: 10}"}

    steps: list[int] = []

    def inject(rank: int, step: int) -> None:
        steps.append(step)
        if rank == 1 and len(steps) == 2:
            os.kill(os.getpid(), signal.SIGUSR2)

    with mock.patch("pivot.system.fault.inject", inject):
        status = train(config_of(folder, "stopped", **changes))
    saved = sorted(path.name for path in (folder / "stopped" / "checkpoints").glob("step-*"))
    (folder / f"stopped-{dist.get_rank()}.txt").write_text(f"{status} {saved}")
    train(config_of(folder, "stopped", **changes))


def everything(folder: Path) -> None:
    for scenario in (resume, refusals, references, stopping):
        scenario(folder)
