"""A trained model as it left its run: from an export, HF LLaVA or parts, or from a run's folder, without its engine."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig

from pivot.config import Config, DataConfig, ModelConfig
from pivot.config_load import read_settings
from pivot.geometry import describe_vision_tower
from pivot.models.build import build_mllm, settle_sources
from pivot.models.mllm import MLLM
from pivot.models.parts import PARTS, is_parts, recorded_dtype, recorded_model
from pivot.pretrained import read_config
from pivot.processor import Processor, build_processor


@dataclass(frozen=True)
class Loaded:
    model: MLLM
    processor: Processor


def find_export(path: str | Path) -> tuple[Path, Config | None]:
    """The export that `path` is or holds, and the settings where it is a run. ValueError where there is none."""
    folder = Path(path)
    run = read_settings(folder / "config.yaml") if (folder / "config.yaml").is_file() else None
    export = folder / "export" if run is not None else folder
    if not (is_parts(str(export)) or (export / "config.json").is_file()):
        state = f"it holds neither config.json nor {PARTS}"
        if run is not None:
            state = "the run has no export yet (it is written at its end)"
        raise ValueError(f"{folder}: {state}; expected a run that is done, an HF LLaVA folder, or an export in parts")
    return export, run


def load_export(folder: Path, device: torch.device) -> Loaded:
    """The model of an export in the precision it was written in; layer, CLS and image fit as it says."""
    path = str(folder)
    model, dtype = (recorded_model(path), recorded_dtype(path)) if is_parts(path) else _read_llava(path)
    sources = settle_sources(Config(output_dir="unused", init_from=path, model=model))
    processor = build_processor(sources.model, DataConfig())
    built = build_mllm(sources, processor, seed=0, dtype=dtype, loading=nullcontext, gather=lambda _: nullcontext())
    return Loaded(built.to(device), processor)


def _read_llava(path: str) -> tuple[ModelConfig, torch.dtype]:
    config = read_config(path, "--model")
    if not isinstance(config, LlavaConfig):
        raise ValueError(
            f"--model: {path} is a {config.model_type}; expected an HF LlavaForConditionalGeneration folder, or an "
            f"export in parts ({PARTS})"
        )
    model = ModelConfig()
    section = model.vision_tower
    section.path = path
    if isinstance(
        config.vision_feature_layer, int
    ):  # a list is refused with the rest, where the parts are put together
        section.layer = config.vision_feature_layer
    if config.vision_feature_select_strategy == "full" and describe_vision_tower(section).has_cls:
        section.cls = "keep"
    dtype: Any = config.dtype
    return model, dtype or torch.float32
