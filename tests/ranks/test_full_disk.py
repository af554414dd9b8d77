"""A disk that is really full while two ranks write a checkpoint: a small tmpfs that somebody else fills up."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pivot.config import REPOSITORY
from tests.kit.ranks.start import find_namespace, run_on_two_ranks
from tests.kit.sets import make_set
from tests.kit.tiny import tiny_llava

ROOM = 300_000  # bytes that are left: less than half of what one rank writes
# Ahead of the second checkpoint, and behind the look for room, which the filling comes too late for.
FILLED = """
import os
from pivot.run import checkpoint
from pivot.system import fault
checkpoint.require_space = lambda *_: None
def fill(rank, step):
    if step == 4:
        with open("{run}/filler.out", "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
            os.truncate(file.fileno(), file.tell() - {room})
fault.inject = fill
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    words = find_namespace(tmp_path)
    if words is None:
        pytest.skip("no mounts here, not even in a namespace of one's own")
    tiny_llava(tmp_path / "llava")
    make_set(tmp_path)
    code = f"from pathlib import Path; from {__name__} import fill_and_go_on; fill_and_go_on(Path({str(tmp_path)!r}))"
    done = subprocess.run([*words, sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def fill_and_go_on(folder: Path) -> None:
    run = folder / "full"
    run.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", run], check=True)
    ended = run_on_two_ranks(folder, "full", patches=(FILLED.format(run=run, room=ROOM), ""))
    assert 0 not in ended.codes, ended.texts
    told = "".join(ended.texts)
    assert f"could not write {run}/checkpoints/step-00000004.tmp (0.00 GiB free there)" in told
    print(ended.status, told[-3000:])
    assert ended.saved == [2]
    (run / "filler.out").unlink()
    again = run_on_two_ranks(folder, "full")
    assert again.codes == [0, 0], again.texts
    assert f"resumed from {run}/checkpoints/step-00000002" in again.texts[0]
    unbroken = run_on_two_ranks(folder, "unbroken")
    left, right = (load_file(one.folder / "export" / "model.safetensors") for one in (again, unbroken))
    assert all(torch.equal(left[name], value) for name, value in right.items())
