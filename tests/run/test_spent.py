"""What a run used up: summed over resumes, and held against what the user names."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from pivot.config import CompareConfig
from pivot.run.spent import Clock, Spent, compare_spent, describe_spent
from pivot.system.distributed import World

DENOMINATOR = CompareConfig(name="SigLIP 2 pre-training", flops=1e22, samples=4e10, gpu_hours=2e5)


def test_a_resume_goes_on_from_what_the_checkpoint_holds() -> None:
    first = Spent()
    first.add(pairs=8, tokens=900.0, flops=1e9)
    second = Spent()
    second.resume_from(asdict(first))
    second.add(pairs=8, tokens=100.0, flops=1e9)
    assert second == Spent(pairs=16, tokens=1000, flops=2e9)
    assert isinstance(second.tokens, int)


def test_an_older_checkpoint_holds_what_is_counted_no_more() -> None:
    """Before 0.3 nothing; since then the FLOPs of what was computed twice, too, until they went."""
    spent = Spent()
    spent.resume_from({})
    spent.resume_from({"pairs": 8, "flops": 1e9, "hardware_flops": 1.5e9})
    assert spent == Spent(pairs=8, flops=1e9)
    with pytest.raises(AttributeError, match="hardware_flops"):  # a typing error in our own code is none
        spent.add(hardware_flops=1.5e9)


@pytest.mark.parametrize(("device", "name", "devices"), [("cuda", "gpu_hours", 4), ("cpu", "core_hours", None)])
def test_hours_are_named_after_the_device(
    monkeypatch: pytest.MonkeyPatch, device: str, name: str, devices: int | None
) -> None:
    """Half an hour on four ranks: 2 GPU-hours, or 2 core-hours a thread of a rank."""
    times = iter([100.0, 100.0 + 1800, 100.0 + 1800])
    monkeypatch.setattr("pivot.run.spent.time.monotonic", lambda: next(times))
    clock = Clock(Spent(), World(0, 4, torch.device(device)))
    expected = (devices or 4 * torch.get_num_threads()) / 2
    assert getattr(clock.read(), name) == pytest.approx(expected)
    hours = {key: value for key, value in clock.read().row().items() if key.endswith("_hours")}
    assert hours == {name: pytest.approx(expected)}, "read twice, no time passed"


def test_only_what_was_named_is_compared() -> None:
    spent = Spent(gpu_hours=50, pairs=100_000, tokens=10**8, flops=2e18)
    assert compare_spent(spent, None) == {}
    assert compare_spent(spent, CompareConfig(name="x", samples=1e6)) == {"name": "x", "samples": 0.1}
    found = compare_spent(spent, DENOMINATOR)
    assert found == pytest.approx({"name": found["name"], "flops": 2e-4, "samples": 2.5e-6, "gpu_hours": 2.5e-4})
    on_cpu = Spent(core_hours=50, pairs=100_000, flops=2e18)
    assert "gpu_hours" not in compare_spent(on_cpu, DENOMINATOR)


def test_one_line() -> None:
    spent = Spent(gpu_hours=50, pairs=100_000, tokens=10**8, flops=2e18)
    line = describe_spent(spent.row() | {"compare": compare_spent(spent, DENOMINATOR)}, "pairs")
    assert line == (
        "50 GPU-hours, 100,000 pairs, 100 M tokens, 2e+18 useful FLOP; beside SigLIP 2 pre-training: "
        "1/5,000 of its FLOPs, 1/400,000 of its samples, 1/4,000 of its GPU-hours"
    )
    assert describe_spent(Spent(core_hours=0.5, pairs=10).row(), "samples").startswith("0.5 core-hours, 10 samples")
    saved = describe_spent(Spent(gpu_hours=1, save_s=12.34).row(), "pairs")
    assert saved.endswith("useful FLOP, 12.3 s of waiting for checkpoints")
