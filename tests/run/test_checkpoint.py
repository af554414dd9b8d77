"""Folders of checkpoints as accidents leave them: what is removed, what is passed over, and what is never touched."""

from __future__ import annotations

import errno
import json
import os
import shutil
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
