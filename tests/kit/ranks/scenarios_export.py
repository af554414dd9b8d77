"""Runs of five steps, and what the model that was trained computes at its end, ahead of its export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from pivot.models.mllm import MLLM
from pivot.models.parts import write_model
from pivot.processor import Processor
from pivot.train import train
from tests.kit.parts import score
from tests.kit.ranks.scenarios_train import config_of
from tests.kit.tiny import random_images, tiny_open_clip

CASES: dict[str, dict[str, str]] = {
    "llava": {"train.precision": "fp32"},
    "llava in bf16": {"train.precision": "bf16"},
    "parts": {"train.precision": "fp32", "init_from": "null"},  # an encoder of open_clip's, which LLaVA cannot express
}


def trained(folder: Path) -> None:
    for case, changes in CASES.items():
        name = f"trained-{case.replace(' ', '-')}"
        if case == "parts":
            changes = changes | {"model.vision_tower.path": f"open_clip:{tiny_open_clip(folder / 'clip')}"}
            changes |= {"model.language_model.path": str(folder / "language")}
        changes |= {"deepspeed": "ds_configs/zero1.json", "checkpoint.every_steps": "0"}
        config = config_of(folder, name, **changes)

        def keep(out: Path, model: MLLM, state: Mapping[str, Tensor], processor: Processor, name: str = name) -> None:
            with torch.no_grad():
                features = model.vision_tower(random_images(2, processor.geometry.size))
            torch.save({"logps": score(model, processor), "features": features}, folder / f"{name}.pt")
            write_model(out, model, state, processor)

        with mock.patch("pivot.train.write_model", keep):
            train(config)
