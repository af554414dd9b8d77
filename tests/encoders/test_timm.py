"""timm's encoders: weights of a folder or a file read strictly, and what has no patch features refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from pivot.config import VisionTowerConfig
from pivot.encoders import timm as library
from pivot.encoders.library import resolve_encoder
from pivot.encoders.square import fit_square, sample_images
from tests.kit import tiny
from tests.kit.encoders import IMAGES, build, normalise
from tests.kit.families import stir, write_timm

VIT = "test_vit"  # timm's own tiny ViT: 160 px, patches of 16, a CLS token, a classifier of 1000


def describe(path: str, **settings: Any) -> Any:
    return resolve_encoder(VisionTowerConfig(path=path, **settings))


def expected_features(model: Any, tower: Any, images: torch.Tensor) -> torch.Tensor:
    states = model.eval().forward_intermediates(normalise(images, tower), output_fmt="NLC", intermediates_only=True)
    return states[-2]


def test_a_bare_architecture_draws_its_weights() -> None:
    torch.manual_seed(7)
    model = timm.create_model(VIT)
    torch.manual_seed(7)
    tower = build(f"timm:{VIT}")
    images = tiny.random_images(2, 160)
    torch.testing.assert_close(tower(images), expected_features(model, tower, images), atol=1e-5, rtol=1e-5)
    assert library.draws_weights(f"timm:{VIT}")
    named = (f"{VIT}.r160_in1k", f"{VIT}@w.safetensors", "local-dir:folder", "hf-hub:owner/name@v1")
    assert not any(library.draws_weights(f"timm:{name}") for name in named)


@pytest.mark.parametrize("classes", [1000, 7, 0])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_of_a_file_are_read_whatever_it_classifies(tmp_path: Path, classes: int, suffix: str) -> None:
    model = timm.create_model(VIT, num_classes=classes)
    stir(model)
    file = tmp_path / f"w{suffix}"
    state = model.state_dict()
    save_file(state, file) if suffix == ".safetensors" else torch.save({"model": state}, file)
    tower = build(f"timm:{VIT}@{file}")
    images = tiny.random_images(2, 160)
    torch.testing.assert_close(tower(images), expected_features(model, tower, images), atol=1e-5, rtol=1e-5)
    assert ("head.weight" in tower.set_aside) == bool(classes)


def test_the_file_of_moco_v3_is_read_as_it_was_published(tmp_path: Path) -> None:
    """Two encoders under `module.`, the one that is kept with a head of three layers in place of a classifier."""
    model = timm.create_model(VIT, num_classes=0)
    stir(model)
    state = {f"module.base_encoder.{name}": value for name, value in model.state_dict().items()}
    state |= {f"module.momentum_encoder.{name}": value + 1 for name, value in model.state_dict().items()}
    state |= {"module.base_encoder.head.0.weight": torch.zeros(3, 3), "module.predictor.0.weight": torch.zeros(3, 3)}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "moco.pth.tar")
    tower = build(f"timm:{VIT}@{tmp_path / 'moco.pth.tar'}")
    images = tiny.random_images(2, 160)
    torch.testing.assert_close(tower(images), expected_features(model, tower, images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path, damage: str) -> None:
    path = write_timm(tmp_path, "supervised")
    state = load_file(tmp_path / "model.safetensors")
    name = "blocks.1.mlp.fc1.bias"
    if damage == "missing":
        state.pop(name)
    elif damage == "extra":
        state["blocks.1.mlp.fc3.bias"] = torch.zeros(3)
    else:
        state[name] = torch.zeros(3)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"local-dir:.*(Missing|Unexpected|size mismatch).*blocks\.1\.mlp\.fc"):
        build(path)


def test_pickled_code_is_never_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self) -> Any:
            return (open, (str(canary), "w"))

    torch.save({"x": Payload()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="weights_only"):
        build(f"timm:{VIT}@{tmp_path / 'w.pth'}")
    assert not canary.exists()


@pytest.mark.parametrize(
    "path, text",
    [
        ("timm:test_resnet", "is a ResNet, of whose features pivot does not know which patch each stands for"),
        ("timm:deit_tiny_distilled_patch16_224", "is a VisionTransformerDistilled"),
        ("timm:no_such_model", "Unknown model"),
        ("timm:folder/model", "Use 'hf-hub:folder/model' .* or 'local-dir:folder/model'"),
        (f"timm:{VIT}@nowhere.safetensors", "no file nowhere.safetensors"),
        ("timm:local-dir:nowhere", "no config.json in nowhere; expected a folder as timm.models.save_for_hf writes"),
    ],
)
def test_what_cannot_be_an_encoder_is_refused_before_any_weight_is_read(path: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        describe(path)


def test_a_damaged_folder_is_refused_before_any_weight_is_read(tmp_path: Path) -> None:
    path = write_timm(tmp_path, "supervised")
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="model.safetensors is damaged or was cut short"):
        describe(path)
    weights.unlink()
    with pytest.raises(ValueError, match="no weights in .*; expected model.safetensors"):
        describe(path)
    weights.write_bytes(whole)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"architecture": "vit_of_tomorrow"}))
    with pytest.raises(ValueError, match="Unknown model .vit_of_tomorrow"):
        describe(path)


def test_a_map_that_the_size_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="image_size: 100, but a feature .* stands for 16 pixels a side"):
        describe("timm:test_convnext", image_size=100)


@pytest.mark.parametrize("mode, fit", [("squash", "squash"), ("center", "crop"), ("border", "pad")])
def test_images_are_fitted_as_timm_fits_them(tmp_path: Path, mode: str, fit: str) -> None:
    data = {"input_size": (3, 160, 160), "crop_pct": 1.0, "crop_mode": mode, "interpolation": "bilinear"}
    save_for_hf(timm.create_model(VIT), str(tmp_path), data_config=data, safe_serialization=True)
    found = library.read_image_fit(describe(f"timm:local-dir:{tmp_path}"))
    assert found is not None and (found.fit, found.resample) == (fit, "bilinear")
    transform = timm.data.create_transform(**data, is_training=False, mean=(0.0,) * 3, std=(1.0,) * 3)
    for image in (
        sample_images(160) if fit != "pad" else []
    ):  # Pillow resizes these up to two levels apart, and another way by tens
        theirs = 255 * transform(Image.fromarray(image))
        assert float((fit_square(image, 160, fit, (0.5,) * 3, "bilinear") - theirs).abs().max()) < 3


def test_a_crop_of_the_middle_is_none_of_our_ways(tmp_path: Path) -> None:
    """timm's usual crop_pct of 0.9: the border is cut off, and a user has to say what is wanted instead."""
    data = {"input_size": (3, 160, 160), "crop_pct": 0.9, "crop_mode": "center"}
    save_for_hf(timm.create_model(VIT), str(tmp_path), data_config=data, safe_serialization=True)
    with pytest.raises(ValueError, match="by crop_mode center at crop_pct 0.9"):
        library.read_image_fit(describe(f"timm:local-dir:{tmp_path}"))


def test_other_weights_in_a_folder_have_another_digest(tmp_path: Path) -> None:
    path = write_timm(tmp_path, "convnext")
    before = library.digest_weights(path)
    assert before == library.digest_weights(path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, tmp_path / "model.safetensors")
    assert before != library.digest_weights(path)


def test_patches_are_not_dropped_and_coordinates_not_moved_in_training(tmp_path: Path) -> None:
    """Of an EVA that was made to do both: its features in training are those in evaluation, of every patch."""
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 0}
    chance = {"patch_drop_rate": 0.5, "rope_rescale_coords": 2.0}
    torch.manual_seed(0)
    model = timm.create_model("eva02_tiny_patch14_224", **settings, **chance)
    stir(model)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    tower = build(f"timm:local-dir:{tmp_path}").train()
    assert tower(IMAGES).shape[1] == 16
    assert torch.equal(tower(IMAGES), tower.eval()(IMAGES))
