"""A skeleton has the parameters of the model that is built, component by component, without its memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pivot.config import Config, LanguageModelConfig, ModelConfig, VisionTowerConfig
from pivot.encoders.library import resolve_encoder
from pivot.encoders.tower import build_vision_tower
from pivot.models.build import resolve_sources
from pivot.models.language import build_language_model, fit_vocabulary
from pivot.models.skeleton import build_skeleton
from tests.kit.ranks.scenarios import build_plain
from tests.kit.tiny import tiny_llava, tiny_open_clip, write_text_json, write_vision_json


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


@pytest.mark.parametrize(
    "case",
    [{}, {"tie": True}, {"vision": "clip", "kind": "llama"}],
    ids=["untied", "tied", "clip + llama"],
)
def test_of_a_whole_llava(tmp_path: Path, case: dict[str, Any]) -> None:
    tiny_llava(tmp_path, **case)
    model, _ = build_plain(tmp_path)
    config = Config(output_dir="unused", init_from=str(tmp_path))
    skeleton = build_skeleton(resolve_sources(config).model, 300)
    assert shapes(skeleton.vision_tower) == shapes(model.vision_tower)
    assert shapes(skeleton.projector) == shapes(model.projector)
    assert shapes(skeleton.language_model) == shapes(model.language_model)
    assert all(p.is_meta for p in skeleton.parameters())


@pytest.mark.parametrize("with_timm", [False, True])
def test_of_an_open_clip_encoder(tmp_path: Path, with_timm: bool) -> None:
    section = VisionTowerConfig(path=f"open_clip:{tiny_open_clip(tmp_path, with_timm=with_timm)}")
    language = LanguageModelConfig(path=str(write_text_json(tmp_path / "text.json")))
    skeleton = build_skeleton(ModelConfig(vision_tower=section, language_model=language), 300)
    assert shapes(skeleton.vision_tower) == shapes(build_vision_tower(resolve_encoder(section), dtype=torch.float32))
    assert len(skeleton.encoder_blocks()) == skeleton.vision_tower.num_blocks == 2


def test_another_image_size_and_a_larger_vocabulary(tmp_path: Path) -> None:
    """64 pixels: 64 positions rather than 16; 700 tokens: 704 rows."""
    section = VisionTowerConfig(path=str(write_vision_json(tmp_path / "vision.json")), image_size=64)
    language = LanguageModelConfig(path=str(write_text_json(tmp_path / "text.json")))
    skeleton = build_skeleton(ModelConfig(vision_tower=section, language_model=language), 700)
    assert shapes(skeleton.vision_tower) == shapes(build_vision_tower(resolve_encoder(section), dtype=torch.float32))
    built = build_language_model(str(language.path), dtype=torch.float32)
    assert fit_vocabulary(built, 700)
    assert shapes(skeleton.language_model) == shapes(built)
    assert skeleton.language_model.lm_head.weight.shape[0] == 704
