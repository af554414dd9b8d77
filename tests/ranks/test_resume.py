"""Law: a fresh process that goes on from a checkpoint holds, to the bit, what the process that wrote it holds there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.kit.ranks import run_ranks
from tests.kit.sets import make_set
from tests.kit.tiny import tiny_llava

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
Held = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps, saved behind the sixth: by one process to the end, and from there by another."""
    folder = tmp_path_factory.mktemp("resume")
    tiny_llava(folder / "llava")
    make_set(folder)
    for scenario in ("unbroken", "resumed"):
        run_ranks(f"tests.kit.ranks.scenarios_resume:{scenario}", 2, folder, limit_s=400)
    return folder


def held(folder: Path, rank: int) -> tuple[Held, Held]:
    left, right = (torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for name in ("unbroken", "resumed"))
    return left, right


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("what", ["rng", "batches", "rates", "counts"])
def test_the_first_step_begins_as_it_would_have(folder: Path, what: str, rank: int) -> None:
    """torch's random state; ids, pixels and reference of every row; each component's rate; updates so far."""
    left, right = held(folder, rank)
    if what == "rng":
        assert torch.equal(left[what], right[what])
        assert not torch.equal(left[what], held(folder, 1 - rank)[0][what])  # else a mix-up would not be seen
    else:
        assert left[what] and left[what] == right[what]


@pytest.mark.parametrize("rank", [0, 1])
def test_weights_masters_and_moments_are_those_of_the_writer(folder: Path, rank: int) -> None:
    left, right = held(folder, rank)
    assert len(left["state"]) == len(right["state"]) > 60
    assert all(torch.equal(one, other) for one, other in zip(left["state"], right["state"], strict=True))


def test_both_end_with_equal_weights(folder: Path) -> None:
    left, right = (load_file(folder / name / "export/model.safetensors") for name in ("unbroken", "resumed"))
    assert left.keys() == right.keys() and all(torch.equal(left[name], value) for name, value in right.items())
