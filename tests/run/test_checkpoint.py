"""Folders of checkpoints as accidents leave them: what is removed, what is passed over, and what is never touched."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

from pivot.run import checkpoint
from pivot.run.checkpoint import _find_difference, _prune, _publish, published, require_space, sweep
from pivot.system.distributed import World

ALONE = World(0, 1, torch.device("cpu"))


def make(checkpoints: Path, *steps: int) -> list[Path]:
    folders = [checkpoint.step_folder(checkpoints, step) for step in steps]
    for folder, step in zip(folders, steps, strict=True):
        folder.mkdir(parents=True)
        (folder / "a.pt").write_text("weights")
        files = {"a.pt": checkpoint._describe(folder / "a.pt")}
        (folder / "manifest.json").write_text(json.dumps({"step": step, "files": files}))
    return folders


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_oldest_go(tmp_path: Path) -> None:
    make(tmp_path, 1, 2, 3, 4)
    _prune(tmp_path, 2, pytest.fail)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


def test_every_n_th_stays_for_ever(tmp_path: Path) -> None:
    """The newest two, whatever their steps; before them the multiples of 20. A save that was asked for is as others."""
    make(tmp_path, 10, 20, 25, 30, 40, 50, 60)
    _prune(tmp_path, 2, pytest.fail, 20)
    assert [checkpoint.step_of(tmp_path / name) for name in names(tmp_path)] == [20, 40, 50, 60]
    _prune(tmp_path, 2, pytest.fail)
    assert [checkpoint.step_of(tmp_path / name) for name in names(tmp_path)] == [50, 60]


def test_a_linked_checkpoint_loses_its_link_alone(tmp_path: Path) -> None:
    checkpoints, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    for folder in make(elsewhere, 1, 2):
        checkpoints.mkdir(exist_ok=True)
        (checkpoints / folder.name).symlink_to(folder)
    make(checkpoints, 3, 4)
    _prune(checkpoints, 2, pytest.fail)
    assert names(checkpoints) == ["step-00000003", "step-00000004"]
    assert [path.parent for path in sorted(elsewhere.rglob("a.pt"))] == published(elsewhere)


def test_a_checkpoint_takes_the_place_of_a_damaged_link(tmp_path: Path) -> None:
    (target,) = make(tmp_path / "elsewhere", 3)
    (tmp_path / "step-00000003").symlink_to(target)
    partial = tmp_path / "step-00000003.tmp"
    partial.mkdir()
    _publish(partial, tmp_path / "step-00000003", {"step": 3})
    assert not (tmp_path / "step-00000003").is_symlink()
    assert names(target) == ["a.pt", "manifest.json"]
    assert (tmp_path / "latest").read_text() == "step-00000003\n"


@pytest.mark.parametrize("where", ["rename", "removal"])
def test_what_cannot_be_removed_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """As on a busy NFS, or a mount point inside; what is half-removed is no checkpoint, and goes when it can."""
    make(tmp_path, 1, 2, 3)

    def fail(*_: object) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    said: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(*((Path, "replace", fail) if where == "rename" else (shutil, "rmtree", fail)))
        _prune(tmp_path, 2, said.append)
    assert len(said) == 1 and said[0].startswith(f"warning: {tmp_path}/step-00000001") and "busy" in said[0]
    assert [path.name for path in published(tmp_path)][-2:] == ["step-00000002", "step-00000003"]
    _prune(tmp_path, 2, pytest.fail)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_half_written_ones_are_swept_and_links_kept_out_of(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    (kept,) = make(checkpoints, 1)
    (precious,) = make(tmp_path / "elsewhere", 2)
    (checkpoints / "step-00000002.tmp").symlink_to(precious)
    (checkpoints / "step-00000003.tmp" / "deeper").mkdir(parents=True)
    (checkpoints / "notes.tmp").write_text("mine")
    sweep(checkpoints, pytest.fail)
    assert names(checkpoints) == ["notes.tmp", kept.name]
    assert (precious / "a.pt").is_file()


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda folder: (folder / "a.pt").write_text("weightz"), "a.pt is not the file of 7 bytes"),
        (lambda folder: (folder / "a.pt").unlink(), "a.pt is missing"),
        (lambda folder: (folder / "mp_rank_01_model_states.pt").write_text("x"), "is none of its files"),
        (lambda folder: folder.rename(folder.with_name("step-00000009")), "its manifest.json is that of step 1"),
    ],
)
def test_a_checkpoint_that_is_not_as_written_is_seen(tmp_path: Path, spoil: object, problem: str) -> None:
    (folder,) = make(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert _find_difference(folder, manifest, ALONE) is None
    spoil(folder)  # type: ignore[operator]
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert problem in (_find_difference(folder, manifest, ALONE) or "")


@pytest.mark.parametrize(
    "text", ["", "[]", "3", '{"step": 1}', '{"files": [1], "step": 1}', '{"files": {"a": 1}, "step": "x"}']
)
def test_a_manifest_of_anything_is_damage_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(checkpoint.distributed, "gather", lambda value: [value])
    (folder,) = make(tmp_path, 1)
    assert checkpoint._verify(folder, ALONE)[1] is None
    (folder / "manifest.json").write_text(text)
    assert checkpoint._verify(folder, ALONE)[1]


def test_room_is_asked_for_all_that_lie_there_at_a_time(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    require_space(tmp_path, free // 4, 3)
    with pytest.raises(OSError, match="5 checkpoints, the most at a time, take") as found:
        require_space(tmp_path, free // 4, 5)
    assert found.value.errno == errno.ENOSPC


def swap_ranks(folder: Path) -> None:
    """What rank 1 wrote under rank 0's name, and the reverse."""
    first, second = folder / "rank-00000.pt", folder / "rank-00001.pt"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


HARM = {
    "cut": lambda folder: os.truncate(folder / "rank-00001.pt", 3),
    "empty": lambda folder: (folder / "rank-00001.pt").write_bytes(b""),
    "a flipped bit": lambda folder: flip(folder / "rank-00001.pt"),
    "gone": lambda folder: (folder / "rank-00001.pt").unlink(),
    "another rank's": swap_ranks,
    "another step's": lambda folder: shutil.copy(folder.with_name("step-00000001") / "rank-00001.pt", folder),
    "a state of another step": lambda folder: shutil.copy(folder.with_name("step-00000001") / "state.json", folder),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "half a manifest": lambda folder: os.truncate(folder / "manifest.json", 40),
}
LATEST = {
    "": None,
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_text(""),
    "dangling": lambda path: path.write_text("step-00000009\n"),
    "no text": lambda path: path.write_bytes(b"\xff\xfe"),
}


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Checkpoints of steps 1 and 2 by two ranks, read by one."""
    monkeypatch.setattr(checkpoint.distributed, "gather", lambda value: [value])
    monkeypatch.setattr(checkpoint.distributed, "broadcast", lambda value: value)
    for step in (1, 2):
        folder = checkpoint.step_folder(tmp_path, step)
        folder.mkdir()
        (folder / "state.json").write_text(json.dumps({"step": step}))
        for rank in (0, 1):
            torch.save({"values": torch.full((50,), step + 10 * rank)}, folder / f"rank-{rank:05d}.pt")
        files = {path.name: checkpoint._describe(path) for path in sorted(folder.iterdir())}
        (folder / "manifest.json").write_text(json.dumps({"step": step, "files": files}))
    (tmp_path / "latest").write_text("step-00000002\n")
    return tmp_path


@pytest.mark.parametrize("latest", LATEST)
@pytest.mark.parametrize("harm", ["", *HARM])
def test_a_damaged_one_is_passed_over_for_the_older(two: Path, harm: str, latest: str) -> None:
    """Whatever was done to it, and whatever `latest` says, which decides nothing."""
    if harm:
        HARM[harm](two / "step-00000002")
    if latest:
        LATEST[latest](two / "latest")
    said: list[str] = []
    found = checkpoint.find(two, ALONE, said.append)
    assert found is not None and found.step == found.state["step"] == (1 if harm else 2)
    if harm and harm != "no manifest":  # without one it is none
        assert any(text.startswith(f"warning: {two}/step-00000002 is damaged and is not used: ") for text in said)
    assert any("names step-00000009, which is not there" in text for text in said) == (latest == "dangling")


def test_where_all_are_damaged_nothing_begins_again(two: Path) -> None:
    for folder in published(two):
        HARM["cut"](folder)
    with pytest.raises(RuntimeError, match="every checkpoint is damaged; start afresh in another output_dir"):
        checkpoint.find(two, ALONE, print)


def test_a_folder_that_shows_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a rename on a network's file system may; one that never shows ends the run in a sentence."""
    monkeypatch.setattr(checkpoint.distributed, "gather", lambda value: [value])
    (hidden,) = make(tmp_path / "elsewhere", 1)
    late = threading.Timer(0.5, hidden.rename, [tmp_path / hidden.name])
    late.start()
    checkpoint._wait_for(tmp_path / hidden.name)
    assert not late.is_alive()
    monkeypatch.setattr(checkpoint, "VISIBLE_WITHIN_S", 0.2)
    with pytest.raises(RuntimeError, match="step-00000002 is not visible here after 0.2 s; is output_dir shared"):
        checkpoint._wait_for(tmp_path / "step-00000002")
