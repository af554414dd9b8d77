"""Every family of encoders: features equal to its own library's, all that is kept trains, and the export is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
from torch import Tensor

from pivot.encoders.export import write_encoder
from pivot.encoders.tower import VisionTower, build_tower_shapes
from tests.kit import tiny
from tests.kit.encoders import IMAGES, build, normalise
from tests.kit.families import HF_FAMILIES, TIMM_FAMILIES, hf_states, write_hf, write_timm

PATHS = [*(f"hf {name}" for name in HF_FAMILIES), *(f"timm {name}" for name in TIMM_FAMILIES)]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("families")
    made = {f"hf {name}": write_hf(root / f"hf-{name}", family) for name, family in HF_FAMILIES.items()}
    return made | {f"timm {name}": write_timm(root / f"timm-{name}", name) for name in TIMM_FAMILIES}


def choose(states: Tensor, has_cls: bool, registers: int, settings: dict[str, Any]) -> Tensor:
    """The tokens that the settings keep, picked one by one."""
    kept = [0] if has_cls and settings.get("cls") == "keep" else []
    if settings.get("registers") == "keep":
        kept += range(int(has_cls), int(has_cls) + registers)
    return states[:, [*kept, *range(int(has_cls) + registers, states.shape[1])]]


def settings_of(has_cls: bool, registers: int) -> list[dict[str, Any]]:
    cls = ("drop", "keep") if has_cls else ("drop",)
    kept = ("drop", "keep") if registers else ("drop",)
    return [
        {"layer": layer, "post_norm": post_norm, "cls": one, "registers": other}
        for layer in (-2, -1)
        for post_norm in (False, True)
        for one in cls
        for other in kept
    ]


def has_norm(path: str, layer: int) -> bool:
    """A ConvNeXt has a norm for patch features at its last stage at the most, and most have none at all."""
    if "convnext" in path:
        return "dinov3" in path and layer == -1
    return "average" not in path  # its norm comes behind the pooling


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", HF_FAMILIES)
@torch.no_grad()
def test_features_are_the_hidden_states_of_transformers(paths: dict[str, str], name: str) -> None:
    family, path = HF_FAMILIES[name], paths[f"hf {name}"]
    for settings in settings_of(family.has_cls, family.registers):
        if settings["post_norm"] and not has_norm(name, settings["layer"]):
            with pytest.raises(ValueError, match="post_norm: true, but this encoder has no norm for patch features"):
                build(path, **settings)
            continue
        tower = build(path, **settings).train()  # nothing in it may be left to chance
        model, states = hf_states(path, family, normalise(IMAGES, tower))
        expected = states[settings["layer"]]
        expected = getattr(model, family.norm)(expected) if settings["post_norm"] else expected
        expected = choose(expected, family.has_cls, family.registers, settings)
        assert expected.shape[1:] == (tower.num_features, tower.width)
        assert_close(tower(IMAGES), expected)


@pytest.mark.parametrize("name", TIMM_FAMILIES)
@torch.no_grad()
def test_features_are_the_intermediates_of_timm(paths: dict[str, str], name: str) -> None:
    path = paths[f"timm {name}"]
    model: Any = timm.create_model(path.removeprefix("timm:"), pretrained=True).eval()
    has_cls = getattr(model, "cls_token", None) is not None
    registers = getattr(model, "num_prefix_tokens", 0) - has_cls
    num_blocks = len(getattr(model, "blocks", None) or model.stages)
    for settings in settings_of(has_cls, registers):
        if settings["post_norm"] and not has_norm(name, settings["layer"]):
            with pytest.raises(ValueError, match="post_norm: true, but this encoder has no norm for patch features"):
                build(path, **settings)
            continue
        tower = build(path, **settings).train()
        asked: dict[str, Any] = {"indices": [num_blocks + 1 + settings["layer"] - 1], "norm": settings["post_norm"]}
        if has_cls or registers:
            asked["return_prefix_tokens"] = True
        found = model.forward_intermediates(normalise(IMAGES, tower), intermediates_only=True, **asked)[0]
        found, before = found if isinstance(found, tuple) else (found, None)
        patches = found.flatten(2).transpose(1, 2)
        states = patches if before is None else torch.cat([before, patches], dim=1)
        expected = choose(states, has_cls, registers, settings)
        assert expected.shape[1:] == (tower.num_features, tower.width)
        assert_close(tower(IMAGES), expected)


@pytest.mark.parametrize("name", [name for name in HF_FAMILIES if name != "aimv2"])
@torch.no_grad()
def test_another_size_is_interpolated_as_transformers_does_it(paths: dict[str, str], name: str) -> None:
    """AIMv2 with learned positions is left out: transformers itself takes it at one size alone."""
    family, path = HF_FAMILIES[name], paths[f"hf {name}"]
    tower = build(path, image_size=64)
    pixels = normalise(images := tiny.random_images(2, 64), tower)
    tabled = name in ("siglip", "clip", "vit", "mae")
    _, states = hf_states(path, family, pixels, **({"interpolate_pos_encoding": True} if tabled else {}))
    assert_close(tower(images), states[-2][:, family.prefix :])


@pytest.mark.parametrize("name", TIMM_FAMILIES)
@torch.no_grad()
def test_another_size_is_interpolated_as_timm_does_it(paths: dict[str, str], name: str) -> None:
    path = paths[f"timm {name}"]
    tower = build(path, image_size=64)
    model: Any = timm.create_model(path.removeprefix("timm:"), pretrained=True).eval()
    if hasattr(model, "patch_embed"):
        model.set_input_size((64, 64))
    images = tiny.random_images(2, 64)
    states = model.forward_intermediates(normalise(images, tower), intermediates_only=True)
    assert_close(tower(images), states[-2].flatten(2).transpose(1, 2))


@pytest.mark.parametrize("name", PATHS)
def test_all_that_is_kept_trains_and_its_shapes_are_known(paths: dict[str, str], name: str) -> None:
    """Also with the blocks computed again, to the same gradient."""
    gradients = []
    for recomputes in (False, True):
        tower = build(paths[name]).train()
        tower.requires_grad_(True)  # as the engine does: transformers freezes MAE's positions
        if recomputes:
            tower.enable_activation_checkpointing()
        tower(IMAGES).pow(2).sum().backward()
        assert [n for n, p in tower.named_parameters() if p.grad is None] == []
        gradients.append([p.grad for p in tower.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])
    shapes = {n: p.shape for n, p in build_tower_shapes(tower.encoder).named_parameters()}
    assert shapes == {n: p.shape for n, p in tower.named_parameters()}


def state_of(tower: VisionTower) -> dict[str, Tensor]:
    return {f"vision_tower.{name}": value for name, value in tower.state_dict().items()}


def read_parameters(name: str, path: str) -> dict[str, Tensor]:
    library, _, family = name.partition(" ")
    if library == "timm":
        model: Any = timm.create_model(f"local-dir:{path.removeprefix('timm:local-dir:')}", pretrained=True)
    else:
        model = getattr(transformers, HF_FAMILIES[family].model).from_pretrained(path)
    return {key: parameter.detach() for key, parameter in model.named_parameters()}


@pytest.mark.parametrize("size", [None, 64])
@pytest.mark.parametrize("name", PATHS)
def test_a_trained_encoder_goes_back_whole(paths: dict[str, str], tmp_path: Path, name: str, size: int | None) -> None:
    """What was trained is written as it is, what was set aside as it was read, under the names of the library."""
    tower = build(paths[name], image_size=size)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.mul_(1.25)
    geometry = tower.facts.geometry("drop", "squash")
    difference = write_encoder(tmp_path, tower, state_of(tower), geometry)
    assert difference <= 1e-5
    before, after = (read_parameters(name, path) for path in (paths[name], str(tmp_path)))
    assert before.keys() == after.keys()
    for key, value in before.items():
        if key in tower.set_aside:
            assert torch.equal(after[key], value), key
        elif "position" not in key and "pos_embed" not in key:  # resampled for another size
            assert torch.equal(after[key], 1.25 * value), key
    images = tiny.random_images(1, tower.facts.size)
    again = build(tower.library.name_folder(str(tmp_path)))
    assert again.facts == tower.facts
    assert torch.equal(again(images), tower(images))


@pytest.mark.parametrize("kind", ["ConvNeXt", "EVA"])
@pytest.mark.parametrize("layer", [-1, -2])
def test_open_clip_takes_timm_trunks_of_other_kinds(tmp_path: Path, kind: str, layer: int) -> None:
    """As its ConvNeXt and EVA-02 CLIPs have, at a tiny size that timm registers for tests."""
    name = tiny.tiny_open_clip_of_timm(tmp_path / "config", kind)
    torch.manual_seed(7)
    visual = open_clip.create_model(name).visual.eval()
    torch.manual_seed(7)
    tower = build(f"open_clip:{name}", layer=layer).train()
    images = tiny.random_images(2, tower.facts.size)
    states = visual.trunk.forward_intermediates(normalise(images, tower), intermediates_only=True)
    assert_close(tower(images), states[layer].flatten(2).transpose(1, 2))
    write_encoder(tmp_path / "out", tower, state_of(tower), tower.facts.geometry("drop", "squash"))
