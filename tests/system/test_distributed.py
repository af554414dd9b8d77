"""Which GPU is a rank's."""

from __future__ import annotations

import pytest
import torch

from pivot.system import distributed


@pytest.mark.parametrize(
    ("local_rank", "message"),
    [
        (None, "LOCAL_RANK is absent"),
        ("2", r"LOCAL_RANK is 2, but this process sees 2 GPU"),
        ("-1", "LOCAL_RANK is -1"),
    ],
)
def test_a_gpu_that_is_not_a_ranks_own_is_refused(
    local_rank: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed._own_gpu() == 1
    monkeypatch.delenv("LOCAL_RANK")
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(ValueError, match=message):
        distributed._own_gpu()


def test_a_difference_names_rank_0_and_a_few_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 4,096 ranks the sentence would be as long as a book, on each of them."""
    values = ["a"] * 10 + ["b"] * 4086
    monkeypatch.setattr(distributed, "gather", lambda value: values)
    with pytest.raises(RuntimeError, match=r"^the plan differs between ranks \(rank 0: a, rank 10: b, .*") as raised:
        distributed.require_equal("the plan", "a")
    assert "rank 17: b and 4078 more)" in str(raised.value) and len(str(raised.value)) < 300
    monkeypatch.setattr(distributed, "gather", lambda value: ["a", "b"])
    with pytest.raises(RuntimeError, match=r"\(rank 0: a, rank 1: b\); do all nodes see the same files"):
        distributed.require_equal("the plan", "a")
    monkeypatch.setattr(distributed, "gather", lambda value: ["a", "a"])
    distributed.require_equal("the plan", "a")
