"""Encoders of transformers that cannot be taken, or not as they lie there: one sentence, before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ResNetConfig

from pivot.config import Config, LanguageModelConfig, ModelConfig, VisionTowerConfig
from pivot.encoders.library import resolve_encoder
from pivot.encoders.transformers import read_hf_config
from pivot.models.parts import write_model
from tests.kit import tiny
from tests.kit.encoders import IMAGES, build
from tests.kit.families import HF_FAMILIES, write_hf
from tests.kit.parts import build as build_model
from tests.kit.parts import score


def test_a_classifier_without_patch_features_is_refused(tmp_path: Path) -> None:
    ResNetConfig().to_json_file(tmp_path / "resnet.json")
    with pytest.raises(ValueError, match="is a resnet; expected one of siglip_vision_model, "):
        resolve_encoder(VisionTowerConfig(path=str(tmp_path / "resnet.json")))


def test_registers_that_are_not_there_cannot_be_kept(tmp_path: Path) -> None:
    path = write_hf(tmp_path, HF_FAMILIES["dinov2"])
    with pytest.raises(ValueError, match="registers: keep, but .* has no register tokens; use drop"):
        build(path, registers="keep")


def test_weights_that_are_missing_or_cut_short_are_refused(tmp_path: Path) -> None:
    path = tiny.tiny_vision_tower(tmp_path)
    section, weights = VisionTowerConfig(path=str(path)), path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="model.safetensors is damaged or was cut short"):
        resolve_encoder(section)
    weights.unlink()
    with pytest.raises(ValueError, match="no weights that transformers can read"):
        build(str(path))
    index = {"weight_map": {"x": "model-00002-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors is missing, which the index"):
        resolve_encoder(section)


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_old_and_new_names_of_siglip_are_the_same_encoder(tmp_path: Path, prefix: str) -> None:
    """Before transformers 5 its parameters began with `vision_model.`, as all folders of that time do."""
    path = tiny.tiny_vision_tower(tmp_path)
    expected = build(str(path))(IMAGES)
    state = {
        prefix + name.removeprefix("vision_model."): value
        for name, value in load_file(path / "model.safetensors").items()
    }
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(build(str(path))(IMAGES), expected)


@pytest.mark.parametrize(
    "family, settings, form",
    [
        ("dinov2", {}, "llava"),
        ("dinov2", {"cls": "keep"}, "llava"),
        ("dinov2_registers", {"registers": "keep"}, "llava"),
        ("dinov2_registers", {}, "registers is drop"),
        ("dinov2_registers", {"cls": "keep"}, "registers is drop"),
        ("aimv2_native", {}, "llava"),
        ("mae", {}, "hide patches"),
        ("vit", {"cls": "keep"}, "pooler"),
        ("convnext", {"image_size": 64}, "a map"),
    ],
)
def test_a_model_with_the_family_comes_back_from_its_export(
    tmp_path: Path, family: str, settings: dict, form: str
) -> None:
    """As an HF LLaVA where that takes the same features, else in parts, whose reason is said; with equal scores."""
    path = write_hf(tmp_path / "tower", HF_FAMILIES[family])
    tower = VisionTowerConfig(path=path, **settings)
    language = LanguageModelConfig(str(tiny.tiny_language_model(tmp_path / "language")))
    model, processor = build_model(Config(output_dir="unused", model=ModelConfig(tower, "mlp2x_gelu", language)))
    write_model(tmp_path / "export", model, model.state_dict(), processor)
    reason = json.loads((tmp_path / "export" / "parts.json").read_text()) if form != "llava" else {}
    assert form in reason.get("not_llava_because", "llava")
    assert (tmp_path / "export" / "parts.json").exists() == (form != "llava")
    shown = {name: value for name, value in settings.items() if name != "image_size"}
    again = VisionTowerConfig(**shown)
    loaded, prepared = build_model(
        Config(output_dir="unused", init_from=str(tmp_path / "export"), model=ModelConfig(again, "mlp2x_gelu"))
    )
    assert prepared.fingerprint == processor.fingerprint
    torch.testing.assert_close(score(loaded, prepared), score(model, processor), atol=1e-5, rtol=1e-5)
    assert read_hf_config(loaded.vision_tower.model).image_size == settings.get("image_size", tiny.IMAGE_SIZE)
