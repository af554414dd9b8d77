"""Models that LLaVA cannot express, built, and scored."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from pivot.config import Config, LanguageModelConfig, ModelConfig, VisionTowerConfig
from pivot.models.build import build_mllm, resolve_sources
from pivot.models.mllm import MLLM
from pivot.processor import Processor, build_processor
from tests.kit.tiny import tiny_language_model, tiny_open_clip, tiny_vision_tower
from tests.kit.trees import build_batch, random_segments


def build(config: Config) -> tuple[MLLM, Processor]:
    sources = resolve_sources(config)
    processor = build_processor(sources.model, config.data)
    nothing = contextlib.nullcontext
    model = build_mllm(
        sources, processor, seed=3, dtype=torch.float32, loading=nothing, gather=lambda parameters: nothing()
    )
    return model.eval(), processor


def score(model: MLLM, processor: Processor) -> torch.Tensor:
    prompt, chosen, rejected = random_segments([4, 5, 6])
    prompt = [processor.image_token_id] * processor.geometry.num_tokens + prompt
    size = processor.geometry.size
    pixels = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tree = build_batch(
        [prompt, chosen, rejected], [-1, 0, 0], image_token_id=processor.image_token_id, pixel_values=pixels
    )
    with torch.no_grad():
        return model(tree)


# Every reason for which a model is written in parts, alone and together.
CASES = ("open_clip", "open_clip timm", "open_clip post_norm", "post_norm", "linear")


def config_of(case: str, folder: Path) -> Config:
    path = (
        f"open_clip:{tiny_open_clip(folder / 'clip', with_timm='timm' in case)}"
        if "open_clip" in case
        else str(tiny_vision_tower(folder / "tower"))
    )
    tower = VisionTowerConfig(path=path, post_norm="post_norm" in case)
    language = LanguageModelConfig(str(tiny_language_model(folder / "language", tie=case == "linear")))
    projector = "linear" if case == "linear" else "mlp2x_gelu"
    return Config(output_dir="unused", model=ModelConfig(tower, projector, language))
