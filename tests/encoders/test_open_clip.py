"""open_clip's encoders: features equal to its own, weights read strictly and told apart by their content."""

from __future__ import annotations

import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from pivot.config import Config, LanguageModelConfig, ModelConfig, VisionTowerConfig
from pivot.encoders import open_clip as library
from pivot.models.build import resolve_sources, weights_fingerprint
from pivot.models.parts import write_model
from tests.kit import tiny
from tests.kit.encoders import IMAGES, build, normalise
from tests.kit.parts import build as build_model
from tests.kit.parts import config_of


@pytest.fixture(scope="module", params=[False, True], ids=["native", "timm"])
def clip_name(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.tiny_open_clip(tmp_path_factory.mktemp("open_clip"), with_timm=request.param)


@pytest.mark.parametrize("post_norm", [False, True])
def test_open_clip_features_are_its_own_intermediates(clip_name: str, post_norm: bool) -> None:
    """Random weights come from the global seed, so the same seed gives the same encoder."""
    torch.manual_seed(7)
    visual = open_clip.create_model(clip_name).visual
    torch.manual_seed(7)
    tower = build(f"open_clip:{clip_name}", post_norm=post_norm)
    expected = visual.forward_intermediates(
        normalise(IMAGES, tower), indices=[1], normalize_intermediates=post_norm, output_fmt="NLC"
    )["image_intermediates"][0]
    torch.testing.assert_close(tower(IMAGES), expected, atol=1e-5, rtol=1e-5)
    whole = dict(visual.named_parameters())
    kept = {name.removeprefix("model.") for name, _ in tower.named_parameters()}
    assert kept | tower.set_aside.keys() == whole.keys()
    assert all(torch.equal(value, whole[name]) for name, value in tower.set_aside.items())


def test_open_clip_weights_from_a_file_are_read_strictly(tmp_path: Path) -> None:
    name = tiny.tiny_open_clip(tmp_path)
    model = open_clip.create_model(name)
    state = model.state_dict()
    save_file(state, tmp_path / "w.safetensors")
    tower = build(f"open_clip:{name}@{tmp_path / 'w.safetensors'}", cls="keep", layer=-1)
    pixels = normalise(IMAGES, tower)
    out = model.visual.forward_intermediates(pixels, indices=[2], output_fmt="NLC", output_extra_tokens=True)
    expected = torch.cat([out["image_intermediates_prefix"][0], out["image_intermediates"][0]], dim=1)
    torch.testing.assert_close(tower(IMAGES), expected, atol=1e-5, rtol=1e-5)
    state.pop("visual.conv1.weight")
    save_file(state, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match=r"visual\.conv1\.weight"):
        build(f"open_clip:{name}@{tmp_path / 'broken.safetensors'}")


def test_weights_are_drawn_where_no_file_tag_or_folder_is_named() -> None:
    assert library.draws_weights("open_clip:ViT-B-32")
    named = ("ViT-B-32@openai", "ViT-B-32@/w.safetensors", "local-dir:folder", "hf-hub:owner/name")
    assert not any(library.draws_weights(f"open_clip:{name}") for name in named)


def test_other_weights_under_the_same_path_have_another_fingerprint(tmp_path: Path) -> None:
    """Of a file, and of a folder that a run wrote; the seed decides nothing where nothing is drawn."""
    model, processor = build_model(config_of("open_clip", tmp_path))
    write_model(tmp_path / "export", model, model.state_dict(), processor)
    tower, file = tmp_path / "export" / "vision_tower", tmp_path / "w.safetensors"
    shutil.copy(tower / "open_clip_model.safetensors", file)
    from_file = VisionTowerConfig(path=f"open_clip:{tiny.tiny_open_clip(tmp_path)}@{file}")
    language = LanguageModelConfig(str(tmp_path / "language"))
    runs = [
        Config(output_dir="unused", model=ModelConfig(from_file, "mlp2x_gelu", language)),
        Config(output_dir="unused", init_from=str(tmp_path / "export")),
    ]
    before = [weights_fingerprint(resolve_sources(run), seed=0) for run in runs]
    assert before == [weights_fingerprint(resolve_sources(run), seed=0) for run in runs]
    assert before[1] == weights_fingerprint(resolve_sources(runs[1]), seed=1)
    for written in (tower / "open_clip_model.safetensors", file):
        save_file({name: value + 1 for name, value in load_file(written).items()}, written)
    after = [weights_fingerprint(resolve_sources(run), seed=0) for run in runs]
    assert all(one != other for one, other in zip(before, after, strict=True))
