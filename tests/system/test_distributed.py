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
