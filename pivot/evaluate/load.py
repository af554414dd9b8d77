"""A trained model as it left its run: from an HF LLaVA folder, or from a run's folder, without its engine."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, LlavaConfig

from pivot.config import Config
from pivot.config_load import load_config
from pivot.geometry import read_config
from pivot.models.build import build_mllm, settle_sources
from pivot.models.mllm import MLLM
from pivot.processor import Processor, build_processor


@dataclass(frozen=True)
class Loaded:
    model: MLLM
    processor: Processor


def find_export(path: str | Path) -> tuple[Path, Config | None]:
    """The HF folder that `path` is or holds, and the settings where it is a run. ValueError where there is none."""
    folder = Path(path)
    run = load_config(folder / "config.yaml") if (folder / "config.yaml").is_file() else None
    export = folder / "export" if run is not None else folder
    if not (export / "config.json").is_file():
        state = "the run has no export yet (it is written at its end)" if run is not None else "it holds no config.json"
        raise ValueError(f"{folder}: {state}; expected a run that is done, or an HF LLaVA folder")
    return export, run


def load_export(folder: Path, device: torch.device) -> Loaded:
    """The model of an HF LLaVA folder in the precision it was written in; layer, CLS and image fit as it says."""
    found = read_config(str(folder), "--model")
    if not isinstance(found, LlavaConfig):
        raise ValueError(f"{folder} is a {found.model_type}, expected an HF LlavaForConditionalGeneration folder")
    config = Config(output_dir="unused", init_from=str(folder))
    layer: Any = found.vision_feature_layer
    dtype: Any = found.dtype
    config.model.vision_tower.layer = layer
    config.data.image.fit = _image_fit(folder)
    sources = settle_sources(config)
    processor = build_processor(sources.model, config.data)
    if processor.encoder.has_cls and found.vision_feature_select_strategy == "full":
        sources.model.vision_tower.cls = "keep"
        processor = build_processor(sources.model, config.data)
    model = build_mllm(
        sources,
        processor,
        seed=0,
        dtype=dtype or torch.float32,
        loading=nullcontext,
        gather=lambda _: nullcontext(),
    )
    return Loaded(model.to(device), processor)


def _image_fit(folder: Path) -> str:
    """data.image.fit, read back from the image processor that Processor.image_processor wrote."""
    image_processor: Any = AutoProcessor.from_pretrained(folder, trust_remote_code=False).image_processor
    if getattr(image_processor, "do_pad", False):
        return "pad"
    return "crop" if getattr(image_processor, "do_center_crop", False) else "squash"
