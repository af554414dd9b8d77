"""Laws of the engine on one and on two real ranks: what is trained does not depend on how it is sharded or cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kit.ranks import run_ranks
from tests.kit.tiny import tiny_llava

WORLDS = (1, 2)
STAGES = (0, 1, 2, 3)

pytestmark = pytest.mark.timeout(900)  # the first test waits for all ranks of the file


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All scenarios on one rank and on two: about three minutes on two cores, most of it starting processes."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny_llava(folder / "llava-untied")
    tiny_llava(folder / "llava-tied", tie=True)
    for world in WORLDS:
        run_ranks("tests.kit.ranks.scenarios:everything", world, folder, limit_s=600)
    return folder


def load(results: Path, name: str, world: int) -> Any:
    return torch.load(results / f"{name}-{world}.pt", weights_only=True)


def is_without_gradient(name: str) -> bool:
    """Softmax ignores a shift of all keys, so these biases have a gradient of zero, and what is found is rounding.

    (Not so in the language model, whose keys are rotated after the bias.)
    """
    return name.startswith("vision_tower.") and name.endswith("k_proj.bias")


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = float((found[name] - value).norm() / value.norm())
        assert error <= tolerance, f"{name}: {error:.2g} of its norm"


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("embeddings", ["tied", "untied"])
@pytest.mark.parametrize(("optimizer", "tolerance"), [("sgd", 1e-6), ("adamw", 2e-4)])
def test_stages_train_the_same_weights(
    results: Path, optimizer: str, tolerance: float, embeddings: str, stage: int, world: int
) -> None:
    """Five steps against ZeRO-0 on one rank. AdamW divides by a norm that starts near 0, hence its tolerance."""
    expected = load(results, f"stage0-{optimizer}-{embeddings}", 1)["weights"]
    assert_equal(load(results, f"stage{stage}-{optimizer}-{embeddings}", world)["weights"], expected, tolerance)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
def test_stages_measure_the_same_norms(results: Path, stage: int, world: int) -> None:
    """grad_norm and update_ratio per component, with clipping at work."""
    for expected, found in zip(
        load(results, "stage0-adamw-tied", 1)["metrics"],
        load(results, f"stage{stage}-adamw-tied", world)["metrics"],
        strict=True,
    ):
        assert expected["grad_norm"] > 0.5
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("world", WORLDS)
def test_zero_3_shards_every_weight(results: Path, world: int) -> None:
    facts = load(results, "stage3-sgd-untied", world)["facts"]
    assert facts["zero_stage"] == 3
    assert facts["persistence_threshold"] == 0
    assert facts["num_persistent_parameters"] == 0
    assert facts["num_partitioned_parameters"] == 66


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("cut", ["1-None", "2-None", "4-None", "1-6400"])
def test_gradient_does_not_depend_on_the_cut(results: Path, cut: str, stage: int, world: int) -> None:
    """One to four rows a rank; with 20 rows a chunk on rank 0 and 80 on rank 1 the heads take unequal chunks."""
    expected = load(results, "gradient-stage0-1-None", 1)
    found = load(results, f"gradient-stage{stage}-{cut}", world)
    whole = torch.stack([value.norm() for value in expected.values()]).norm()
    for name in filter(is_without_gradient, expected):
        assert max(found.pop(name).norm(), expected[name].norm()) <= 1e-7 * whole
    assert_equal(found, {name: expected[name] for name in found}, 1e-6)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_text_only_rows_neither_hang_nor_move_the_encoder(
    results: Path, optimizer: str, stage: int, world: int
) -> None:
    """Steps 1, 4 and 7 hold no image, others none on a rank: SGD leaves the encoder bit for bit, AdamW as ZeRO-0 does.

    Steps 5 to 7 are of one micro-batch a rank.
    """
    expected = load(results, f"pattern-stage0-{optimizer}", 1)
    found = load(results, f"pattern-stage{stage}-{optimizer}", world)
    assert_equal(found["weights"], expected["weights"], 1e-6 if optimizer == "sgd" else 2e-4)
    for step, (before, after) in enumerate(zip(found["towers"], found["towers"][1:], strict=False)):
        moved = any(not torch.equal(before[name], after[name]) for name in before)
        assert moved == (optimizer == "adamw" or step not in (1, 4, 7))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "frozen",
    [
        "vision_tower",
        "projector",
        "language_model",
        "projector+language_model",
        "vision_tower+language_model",
        "vision_tower+projector",
    ],
)
def test_frozen_stays_and_the_rest_trains(results: Path, frozen: str, recompute: str, world: int) -> None:
    """ZeRO-3, whatever is computed again: the encoder is not starved of its gradient, nor is any changed."""
    case = load(results, f"frozen-{frozen}-{recompute}", world)
    moved = {name for name, value in case["before"].items() if not torch.equal(value, case["after"][name])}
    trainable = set(case["trainable"])
    assert {name.partition(".")[0] for name in trainable}.isdisjoint(frozen.split("+"))
    assert set(case["received"]) == trainable
    assert moved >= {name for name in trainable if not is_without_gradient(name)}
    assert not {name for name in moved if name.partition(".")[0] in frozen.split("+")}
    if recompute == "selective":
        stored = load(results, f"frozen-{frozen}-none", world)["after"]
        assert all(torch.equal(value, case["after"][name]) for name, value in stored.items())


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_weights_train_as_in_plain_torch(results: Path, stage: int, world: int) -> None:
    """Norms and updates over three steps, against mixed precision written out by hand over the same rows.

    Within 2 %: seen 0.6 % with torch 2.14 and 1.0 % with 2.11, whose bf16 kernels round otherwise where a weight lies
    elsewhere in memory (ZeRO-3 with 2.14: 4e-6). How far bf16 is from fp32 is torch's business: 5.3 % with 2.11.
    """
    plain = load(results, "bf16-plain", world)["metrics"]
    for expected, found in zip(plain, load(results, f"bf16-stage{stage}", world)["metrics"], strict=True):
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=0.02)
