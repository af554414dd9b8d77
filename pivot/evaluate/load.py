"""A trained model as it left its run: from an export, HF LLaVA or parts, or from a run's folder, without its engine."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlavaConfig

from pivot.config import Config, DataConfig
from pivot.config_load import read_settings
from pivot.models import llava, parts
from pivot.models.build import build_mllm, resolve_sources
from pivot.models.mllm import MLLM
from pivot.models.parts import PARTS, is_parts
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
        if run is not None:
            raise ValueError(
                f"{folder}: the run holds no export, which is written after its last step; start the run again with "
                "the same command, and it goes on"
            )
        raise ValueError(
            f"{folder}: it holds neither config.json nor {PARTS}; expected a run that is done, an HF LLaVA folder, or "
            "an export in parts"
        )
    return export, run


def load_export(folder: Path, device: torch.device) -> Loaded:
    """The model of an export in the precision it was written in; layer, CLS and image fit as it says."""
    path = str(folder)
    if not is_parts(path):
        _require_llava(path)
    form = parts if is_parts(path) else llava
    sources = resolve_sources(Config(output_dir="unused", init_from=path, model=form.recorded_model(path)))
    processor = build_processor(sources.model, DataConfig(), sources.encoder)
    dtype = form.recorded_dtype(path)
    built = build_mllm(sources, processor, seed=0, dtype=dtype, loading=nullcontext, gather=lambda _: nullcontext())
    return Loaded(built.to(device), processor)


def _require_llava(path: str) -> None:
    config = read_config(path, "--model")
    if not isinstance(config, LlavaConfig):
        raise ValueError(
            f"--model: {path} is a {config.model_type}; expected an HF LlavaForConditionalGeneration folder, or an "
            f"export in parts ({PARTS})"
        )
