"""An encoder of each library is loaded, cut and trained alike under ZeRO-3 on two ranks and without it on one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from tests.kit.encoders import build
from tests.kit.families import HF_FAMILIES, write_hf, write_timm
from tests.kit.ranks import run_ranks
from tests.kit.ranks.scenarios_encoders import PATHS
from tests.kit.tiny import tiny_llava, tiny_open_clip

NAMES = ("dinov2_registers", "mae", "aimv2_native", "timm-supervised", "timm-eva02", "open_clip")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # the first test waits for all ranks of the file


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    tiny_llava(folder / "llava")
    paths = {name: write_hf(folder / name, HF_FAMILIES[name]) for name in NAMES if name in HF_FAMILIES}
    for name in ("supervised", "eva02"):
        paths[f"timm-{name}"] = write_timm(folder / f"timm-{name}", name)
    clip = tiny_open_clip(folder / "clip", with_timm=True)
    save_file(open_clip.create_model(clip).state_dict(), folder / "clip.safetensors")
    paths["open_clip"] = f"open_clip:{clip}@{folder / 'clip.safetensors'}"
    (folder / PATHS).write_text(json.dumps(paths))
    for world in (1, 2):
        run_ranks("tests.kit.ranks.scenarios_encoders:one_step", world, folder)
    return folder


def load(results: Path, name: str, world: int) -> Any:
    return torch.load(results / f"{name}-{world}.pt", weights_only=True)


@pytest.mark.parametrize("name", NAMES)
def test_sharded_and_whole_train_the_same_weights(results: Path, name: str) -> None:
    """Loaded bit for bit; behind one step of SGD equal to 1e-6 of each norm, but for keys' biases, which only round."""
    expected = load(results, f"{name}-stage0", 1)
    tower = build(json.loads((results / PATHS).read_text())[name])
    own = {f"vision_tower.{key}": value for key, value in tower.state_dict().items()}
    assert all(torch.equal(value, own[key]) for key, value in expected["loaded"].items())
    for stage, world in ((3, 1), (3, 2), (0, 2)):
        found = load(results, f"{name}-stage{stage}", world)
        assert all(torch.equal(found["loaded"][key], value) for key, value in expected["loaded"].items())
        assert found["weights"].keys() == expected["weights"].keys()
        for key, value in expected["weights"].items():
            if not key.endswith("k_proj.bias"):
                assert float((found["weights"][key] - value).norm()) <= 1e-6 * float(value.norm()), key
    moved = [key for key, value in expected["loaded"].items() if not torch.equal(expected["weights"][key], value)]
    assert len(moved) >= len(expected["loaded"]) - 2 * 3  # a key's bias may stand still
