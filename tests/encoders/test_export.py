"""The encoder alone goes back to its own library, whole: what was trained and what was set aside."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor

from pivot.config import DataConfig, ImageConfig, ModelConfig, VisionTowerConfig
from pivot.encoders.export import write_encoder
from pivot.encoders.library import resolve_encoder
from pivot.encoders.tower import build_vision_tower
from pivot.processor import build_processor
from tests.kit import tiny


@pytest.mark.parametrize("kind", ["siglip", "clip"])
@pytest.mark.parametrize("post_norm", [False, True])
def test_encoder_alone_is_a_whole_stock_encoder(tmp_path: Path, kind: str, post_norm: bool) -> None:
    source = tiny.tiny_vision_tower(tmp_path / "in", kind)
    model = ModelConfig()
    model.vision_tower = VisionTowerConfig(path=str(source), post_norm=post_norm)
    model.language_model.path = str(tiny.tiny_tokenizer(tmp_path / "tokenizer"))
    processor = build_processor(model, DataConfig())
    tower = build_vision_tower(resolve_encoder(model.vision_tower), dtype=torch.float32)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.mul_(1.5)
    state = {f"vision_tower.{name}": value for name, value in tower.state_dict().items()}
    write_encoder(tmp_path / "out", tower, state | {"projector.linear_1.bias": torch.zeros(1)}, processor.geometry)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name in before:
        factor = 1.0 if name.removeprefix("vision_model.") in tower.set_aside else 1.5
        assert torch.equal(after[name], before[name] * factor), name
    prepared = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert tuple(prepared.image_mean) == pytest.approx(processor.geometry.mean)
    again = build_vision_tower(
        resolve_encoder(VisionTowerConfig(path=str(tmp_path / "out"), post_norm=post_norm)), dtype=torch.float32
    )
    assert torch.equal(again(tiny.random_images(1)), tower(tiny.random_images(1)))


@pytest.mark.parametrize("with_timm, size", [(False, 48), (True, None)])
def test_open_clip_encoder_goes_back_into_its_clip(tmp_path: Path, with_timm: bool, size: int | None) -> None:
    name = tiny.tiny_open_clip(tmp_path / "config", with_timm=with_timm)
    clip = open_clip.create_model(name)
    save_file(clip.state_dict(), tmp_path / "clip.safetensors")
    model = ModelConfig()
    model.vision_tower = VisionTowerConfig(path=f"open_clip:{name}@{tmp_path / 'clip.safetensors'}", image_size=size)
    model.language_model.path = str(tiny.tiny_tokenizer(tmp_path / "tokenizer"))
    processor = build_processor(model, DataConfig(image=ImageConfig(fit="squash")))
    tower = build_vision_tower(resolve_encoder(model.vision_tower), dtype=torch.bfloat16)
    state = {f"vision_tower.{name}": value for name, value in tower.state_dict().items()}
    write_encoder(tmp_path / "out", tower, state, processor.geometry)
    written, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    assert torch.equal(written.state_dict()["logit_scale"], clip.state_dict()["logit_scale"])
    assert f"Resize(size=({tower.facts.size}, {tower.facts.size})" in str(preprocess)
    section = VisionTowerConfig(path=f"open_clip:local-dir:{tmp_path / 'out'}")
    images = tiny.random_images(1, tower.facts.size)
    assert torch.equal(build_vision_tower(resolve_encoder(section), dtype=torch.bfloat16)(images), tower(images))
