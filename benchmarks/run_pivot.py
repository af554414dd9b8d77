"""Our side of `dpo_step.py`: the trainer as `launch/train_dpo.py` builds it, its steps timed. JSON in, JSON out.

python benchmarks/run_pivot.py '{"case": ..., "steps": ..., ...}'
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import Clock, Memory
from torch import Tensor
from unsave import encode_each_time, score_everything, unroll

from pivot.batch import PackedBatch
from pivot.config import COMPONENTS, REPOSITORY, Config
from pivot.config_load import load_config
from pivot.metrics import Timer
from pivot.models.mllm import MLLM
from pivot.run.folder import RunFolder
from pivot.startup.flops import measure_matmul_tflops
from pivot.startup.inputs import open_inputs
from pivot.system import distributed
from pivot.system.process import leave
from pivot.train import Trainer

Change = Callable[[PackedBatch], PackedBatch]


def settings(task: dict[str, Any], output: Path) -> Config:
    """The run's YAML, written and read back as a user's would be."""
    case = Path(task["case"])
    rates = {name: {"lr": None if name in task["frozen"] else task["lr"]} for name in COMPONENTS}
    run = {
        "output_dir": str(output),
        "init_from": str(case / "model"),
        "deepspeed": str(REPOSITORY / f"ds_configs/zero{task['zero']}.json"),
        "model": {"vision_tower": {"layer": -1}},
        "data": {
            "train": str(case / "set"),
            "max_tokens": task["max_tokens_per_micro_batch"],
            "workers": task["workers"],
            "image_trees": task["image_trees"],
        },
        "objective": {"dpo": {"loss": "sigmoid", "beta": 0.1}},
        "optim": {"schedule": "constant", "warmup_ratio": 0.0, **rates},
        "train": {
            "global_batch_size": task["pairs_per_step"],
            "max_tokens_per_micro_batch": task["max_tokens_per_micro_batch"],
            "max_steps": task["steps"],
            "precision": task["dtype"],
            "activation_checkpointing": task["checkpointing"],
            "attention": task["attention"],
        },
        "log": {"every_steps": task["steps"]},
    }
    path = output.with_suffix(".yaml")
    path.write_text(json.dumps(run, indent=1))
    return load_config(path, [], "dpo")


class LiveReference:
    """What `ReferenceCache.lookup` gives, from a frozen copy of the model that runs at every step."""

    def __init__(self, model: MLLM, device: torch.device) -> None:
        self._model, self._device = copy.deepcopy(model).requires_grad_(False), device

    @torch.no_grad()
    def lookup(self, batch: PackedBatch) -> Tensor:
        batch = batch.to(self._device)
        return batch.completion_logps(self._model(batch))


def changes(names: list[str], tokens_per_image: int) -> list[Change]:
    """What takes the named savings back; encoding each time needs an unrolled batch."""
    found: list[Change] = []
    if "shared_prompt" in names or "image_once" in names:
        found.append(unroll)
    if "image_once" in names:
        found.append(partial(encode_each_time, tokens_per_image=tokens_per_image))
    if "completions_only" in names:
        found.append(score_everything)
    return found


def changed(batches: Iterator[PackedBatch], by: list[Change]) -> Iterator[PackedBatch]:
    for batch in batches:
        for change in by:
            batch = change(batch)
        yield batch


def main() -> None:
    task = json.loads(sys.argv[1])
    memory = Memory(task["device"])
    if task["threads"]:
        torch.set_num_threads(task["threads"])
    output = Path(task["case"]) / task["name"]
    output.mkdir(parents=True, exist_ok=True)
    config = settings(task, output)
    world = distributed.start(config.train.timeout_s)
    say = partial(print, file=sys.stderr, flush=True)
    inputs = open_inputs(config, world, say)
    started = time.perf_counter()
    trainer = Trainer(config, RunFolder(output), inputs, world)
    built_s = time.perf_counter() - started
    if "reference_cache" in task["without"]:
        trainer.reference = LiveReference(trainer.model, world.device)  # type: ignore[assignment]
    take_back = changes(task["without"], inputs.processor.geometry.num_tokens)
    ids, losses, margins = [], [], []
    loader, timer = trainer.loader(inputs.plan), Timer()
    clock = Clock(task["device"])
    for step_plan, micro_batches in loader:
        metrics = trainer.train_step(step_plan, changed(micro_batches, take_back), loader, timer, None)
        trainer.progress.step = step_plan.step + 1
        clock.tick()
        ids.append(step_plan.ids.tolist())
        losses.append(metrics["loss"])
        margins.append(metrics["rewards/margins"])
        if trainer.progress.step == task["steps"]:
            break
    result = {
        "seconds": clock.seconds,
        "cpu_seconds": clock.cpu_seconds,
        "losses": losses,
        "margins": margins,
        "ids": ids,
        "peak_memory_gib": memory.peak_gib(),
        "start_s": built_s,
        "attention": trainer.model.attention,
        "flops_per_step": inputs.plan.step(0).cost,
        "matmul_tflops": measure_matmul_tflops(world.device, inputs.dtype),  # of this process, right behind its steps
    }
    Path(task["out"]).write_text(json.dumps(result))
    distributed.stop()
    leave(0)


if __name__ == "__main__":
    main()
