"""Faults on one rank of two: both end or both go on, the reader is told, and the same command goes on from there."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.kit.ranks.start import Ended, find_namespace, run_on_two_ranks
from tests.kit.sets import make_set
from tests.kit.tiny import tiny_llava

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    tiny_llava(folder / "llava")
    make_set(folder)
    return folder


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> Ended:
    ended = run_on_two_ranks(folder, "unbroken")
    assert ended.codes == [0, 0], ended.texts
    return ended


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "export" / "model.safetensors")


def require_equal_weights(found: Path, expected: Path) -> None:
    left, right = weights(found), weights(expected)
    assert left.keys() == right.keys() and all(torch.equal(left[name], value) for name, value in right.items())


@pytest.mark.slow
def test_a_full_disk_on_one_rank(folder: Path, unbroken: Ended) -> None:
    """Rank 1's, when it writes its share of the second checkpoint: both ranks end, the first checkpoint stays."""
    ended = run_on_two_ranks(folder, "full", fault="rank=1,step=3,kind=enospc")
    assert ended.codes == [1, 1]
    partial = ended.folder / "checkpoints" / "step-00000004.tmp"
    assert "No space left on device" in ended.status["reason"] and ended.status["status"] == "failed"
    assert f"error: rank 1 could not write {partial} (" in ended.texts[1] and " GiB free there)" in ended.texts[1]
    assert ended.saved == [2]
    again = run_on_two_ranks(folder, "full")
    assert again.codes == [0, 0], again.texts
    assert f"resumed from {ended.folder}/checkpoints/step-00000002" in again.texts[0]
    assert not partial.exists()
    require_equal_weights(again.folder, unbroken.folder)


def test_a_loss_that_is_nan_on_one_rank(folder: Path) -> None:
    """The step is skipped on both, the log of rank 0 tells of it, and the run goes on to weights that are finite."""
    ended = run_on_two_ranks(folder, "nan", fault="rank=1,step=2,kind=nan")
    assert ended.codes == [0, 0], ended.texts
    assert "warning: PIVOT_FAULT is set, for tests alone: nan on rank 1 in step 2" in ended.texts[0]
    assert [row["skipped_steps"] for row in ended.steps.values()] == [0, 1, 0, 0]
    assert [row["loss"] is None for row in ended.steps.values()] == [False, True, False, False]
    assert all(math.isfinite(row["loss"]) for step, row in ended.steps.items() if step != 2)
    assert all(value.isfinite().all() for value in weights(ended.folder).values())


def test_a_wrong_fault_is_refused_at_the_start(folder: Path) -> None:
    ended = run_on_two_ranks(folder, "wrong", fault="rank=1,step=3,kind=sigkil")
    assert ended.codes == [2, 2]
    assert "error: PIVOT_FAULT: kind is sigkil" in ended.texts[0] and "Traceback" not in ended.texts[0]
    assert not ended.folder.exists()


LEAVES = """
import os
from pivot.system import fault
fault.inject = lambda rank, step: os._exit(0) if step == 3 else None
"""


@pytest.mark.slow
def test_a_rank_that_leaves_early_with_exit_code_0(folder: Path) -> None:
    """As one does that takes itself for done: no launcher would see anything wrong, and the status says it."""
    ended = run_on_two_ranks(folder, "left", patches=("", LEAVES))
    assert ended.codes == [1, 0]
    assert ended.status["status"] == "failed"
    assert ended.status["reason"].startswith("another rank died and left no reason")


LATE = """
import time
real = time.time
time.time = lambda: real() + 100
"""


@pytest.mark.slow
def test_a_clock_that_is_wrong_on_one_rank(folder: Path, unbroken: Ended) -> None:
    """No name of a folder is made of the time, so there is one run, with the checkpoints of both."""
    ended = run_on_two_ranks(folder, "clock", patches=("", LATE))
    assert ended.codes == [0, 0], ended.texts
    names = {path.name for path in ended.folder.iterdir()}
    assert names == {path.name for path in unbroken.folder.iterdir()}
    for step in (2, 4):
        files = {path.name for path in (ended.folder / f"checkpoints/step-{step:08d}").iterdir()}
        assert {"rank-00000.pt", "rank-00001.pt"} <= files
    require_equal_weights(ended.folder, unbroken.folder)


def test_a_folder_that_one_rank_may_not_write(folder: Path) -> None:
    """Mounted read-only for rank 1 alone: said before the first step, not behind the first checkpoint."""
    words = find_namespace(folder / "llava")
    if words is None:
        pytest.skip("no mounts here, not even in a namespace of one's own")
    run = folder / "read-only"
    run.mkdir()
    mount = f'mount --bind "{run}" "{run}" && mount -o remount,ro,bind "{run}" && exec "$@"'
    ended = run_on_two_ranks(folder, "read-only", before=((), (*words, "bash", "-c", mount, "mounted")))
    assert ended.codes == [1, 2]
    assert f"output_dir: {run} cannot be written by rank 1" in ended.texts[1]
    assert ended.status["status"] == "failed" and "cannot be written by rank 1" in ended.status["reason"]
    assert not ended.saved and not (run / "log.jsonl").exists()


@pytest.mark.slow
def test_a_folder_that_one_rank_does_not_see(folder: Path) -> None:
    """On a disk of its own, as when output_dir is no shared folder."""
    words = find_namespace(folder / "llava")
    if words is None:
        pytest.skip("no mounts here, not even in a namespace of one's own")
    run = folder / "own-disk"
    run.mkdir()
    mount = f'mount -t tmpfs none "{run}" && exec "$@"'
    ended = run_on_two_ranks(
        folder,
        "own-disk",
        patches=("", "from pivot.run import folder; folder.VISIBLE_WITHIN_S = 1.0"),
        before=((), (*words, "bash", "-c", mount, "mounted")),
    )
    assert ended.codes == [1, 2]
    assert f"output_dir: rank 1 does not see what rank 0 wrote into {run}" in ended.texts[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("fewer pairs than ranks", ["train.global_batch_size=1", "train.max_steps=3"]),
        ("uneven shares", ["train.global_batch_size=5", "train.max_steps=6", "data.workers=7"]),
    ],
)
def test_ranks_with_unequal_shares(folder: Path, name: str, settings: list[str]) -> None:
    """24 pairs in six shards: a rank without any pair; shares of 2 and 3 over the end of the epoch, with more workers
    than shards. Both ranks make the same steps, and the log counts every pair once."""
    ended = run_on_two_ranks(folder, name.replace(" ", "-"), *settings)
    assert ended.codes == [0, 0], ended.texts
    size, num_steps = (int(text.rpartition("=")[2]) for text in settings[:2])
    assert list(ended.steps) == list(range(1, num_steps + 1))
    last = (ended.folder / "log.jsonl").read_text().splitlines()[-1]
    assert f'"pairs": {size * num_steps}' in last
    assert all(value.isfinite().all() for value in weights(ended.folder).values())
