"""Checkpoints that are complete or not there: our own commit around DeepSpeed's files, and a verified way back.

    checkpoints/step-00000100/   manifest.json (written last: size and sha256 of every file), state.json, rank-*.pt,
                                 DeepSpeed's shards
    checkpoints/latest           the newest one's name, moved after it was published

DeepSpeed publishes its own `latest` before all ranks have written, and loads damaged or foreign shards without a
word, running what is pickled in them; none of it is used. Order of a save: write, flush and hash into step-N.tmp, each
rank its own files and maybe in the background (writing.py); once all ranks have: manifest, rename, latest, prune. A
step-N.tmp is never read and may go at any time.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from pivot.run.writing import Writer
from pivot.system import distributed
from pivot.system.distributed import World
from pivot.system.files import read_object, write_atomically
from pivot.system.redact import tell

FORMAT = 1
MANIFEST = "manifest.json"
VISIBLE_WITHIN_S = 60.0  # a shared file system may show a rename late


class Shards(Protocol):
    """The engine's side: this rank's share of weights and optimizer state below folder/tag; `write` writes a file."""

    def save(self, folder: Path, tag: str, write: Callable[[Any, Path], None]) -> None: ...
    def load(self, folder: Path, tag: str) -> None: ...
    def load_reshaped(self, folder: Path) -> None: ...
    def unknown_classes(self, path: Path) -> list[str]: ...


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: `step` optimizer steps are done."""

    folder: Path
    step: int
    manifest: dict[str, Any]
    state: dict[str, Any]


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


# -- save ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unpublished:
    """A checkpoint on its way to the disk: `writer` has this rank's files, and nothing reads them before `publish`."""

    final: Path
    manifest: dict[str, Any]  # all but its files
    writer: Writer


def begin(
    engine: Shards,
    checkpoints: Path,
    step: int,
    world: World,
    *,
    state: dict[str, Any],
    facts: dict[str, Any],
    size_bytes: int,
    in_background: bool = False,
    last_words: Callable[[BaseException], None] = lambda error: None,
) -> Unpublished:
    """Write the checkpoint of `step`, or copy it and begin to write, `in_background`. Collective; `publish` follows.

    `state` comes back from `load`, the same on all ranks. `facts` go into the manifest (the run, world size, ZeRO
    stage, fingerprints). OSError (ENOSPC) when the disk is too small; what a rank cannot write `publish` raises. A rank
    that fails otherwise says so, to `last_words` first, and ends the process: the others wait inside DeepSpeed's
    barriers, where only the launcher can reach them.
    """
    final = distributed.broadcast(step_folder(checkpoints, step))
    partial = final.with_name(final.name + ".tmp")
    with distributed.shared_failure(f"preparing {partial}"):
        if world.is_main:
            require_space(checkpoints, size_bytes)
            if os.path.lexists(partial):
                _remove(partial)
            partial.mkdir(parents=True)
    writer = Writer(partial, in_background=in_background)
    try:
        engine.save(checkpoints, partial.name, writer.write)
    except BaseException as error:
        last_words(error)
        tell(traceback.format_exc(), to=sys.stderr)
        _tell_unwritten(partial, world)
        os._exit(1)
    writer.write(distributed.rng_state(), partial / f"rank-{world.rank:05d}.pt")
    if world.is_main:
        writer.write(json.dumps(state, indent=1).encode(), partial / "state.json")
    writer.start()
    return Unpublished(final, {"format": FORMAT, "step": step, **facts}, writer)


def publish(
    saved: Unpublished, world: World, *, keep: int, keep_every_steps: int | None = None, say: Callable[[str], None]
) -> float:
    """Commit a checkpoint once all ranks have written it; the seconds that the slowest of them wrote. Collective.

    What was published before stays as it is where a rank could not write: its error is raised, FailedElsewhere on the
    others.
    """
    final, partial = saved.final, saved.writer.folder
    with distributed.shared_failure(f"writing {partial}"):
        try:
            saved.writer.wait()
        except Exception:
            _tell_unwritten(partial, world)
            raise
    files, seconds = _gather_files(saved.writer)
    with distributed.shared_failure(f"publishing {final}"):
        if world.is_main:
            others = {str(path.relative_to(partial)): path for path in partial.rglob("*") if path.is_file()}
            files |= {name: _describe(path, sync=True) for name, path in others.items() if name not in files}
            _publish(partial, final, saved.manifest | {"files": dict(sorted(files.items()))})
            _prune(final.parent, keep, say, keep_every_steps)
    _wait_for(final)
    return seconds


def _tell_unwritten(partial: Path, world: World) -> None:
    free = shutil.disk_usage(partial.parent).free / 2**30
    tell(f"error: rank {world.rank} could not write {partial} ({free:.2f} GiB free there)", to=sys.stderr)


def _gather_files(writer: Writer) -> tuple[dict[str, dict[str, Any]], float]:
    """Size and sha256 of the files that the ranks wrote, and the seconds of the slowest."""
    files: dict[str, dict[str, Any]] = {}
    told = distributed.gather((writer.files, writer.write_s))
    for own, _ in told:
        files |= own
    return files, max(seconds for _, seconds in told)


def require_space(folder: Path, size_bytes: int, number: int = 1) -> None:
    """OSError (ENOSPC) unless `number` checkpoints of `size_bytes` find room in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < number * size_bytes:
        what = "a checkpoint takes" if number == 1 else f"{number} checkpoints, the most at a time, take"
        needs = f"{what} {number * size_bytes / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free, nothing was deleted"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({needs})", str(folder))


def _describe(path: Path, *, sync: bool = False) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if sync:
            os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": digest}


def _publish(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    write_atomically(partial / MANIFEST, json.dumps(manifest, indent=1))
    if os.path.lexists(final):  # the same step saved again after a resume that passed it over
        _remove(final)
    os.replace(partial, final)
    write_atomically(final.parent / "latest", final.name + "\n")


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _prune(checkpoints: Path, keep: int, say: Callable[[str], None], keep_every_steps: int | None = None) -> None:
    """Remove all but the newest `keep` and those of each `keep_every_steps`-th step.

    Each is renamed first: one that a kill leaves half-removed is not taken for a checkpoint.
    """
    for folder in published(checkpoints)[:-keep]:
        if keep_every_steps is not None and step_of(folder) % keep_every_steps == 0:
            continue
        try:
            if folder.is_symlink():
                folder.unlink()  # what lies elsewhere is not ours to remove
            else:
                folder.replace(folder.with_name(folder.name + ".tmp"))
        except OSError as error:
            say(f"warning: {folder} could not be removed ({error.strerror}); it takes room until it is")
    sweep(checkpoints, say)


def sweep(checkpoints: Path, say: Callable[[str], None]) -> None:
    """Remove half-written and half-removed checkpoints; for the one process that may write here, between its saves."""
    for partial in sorted(checkpoints.glob("step-????????.tmp")):
        try:
            _remove(partial)
        except OSError as error:
            say(f"warning: {partial} could not be removed ({error.strerror}); it takes room until it is")


def _remove(path: Path) -> None:
    """A link goes, and what it leads to stays."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def _wait_for(folder: Path) -> None:
    deadline = time.monotonic() + VISIBLE_WITHIN_S
    with distributed.shared_failure(f"waiting for {folder}"):
        while not (folder / MANIFEST).is_file():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{folder} is not visible here after {VISIBLE_WITHIN_S:g} s; is output_dir shared?")
            time.sleep(0.1)


# -- load ----------------------------------------------------------------------------------------------------------


def published(checkpoints: Path) -> list[Path]:
    """Folders that carry a manifest, oldest first."""
    return sorted(path.parent for path in checkpoints.glob(f"step-????????/{MANIFEST}"))


def find(checkpoints: Path, world: World, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose every byte is as written; None when there is none at all. Collective.

    A damaged one is named and left alone, and the next older is taken. RuntimeError when all are damaged: a run that
    asked to go on must not begin again.
    """
    folders, named = distributed.broadcast((published(checkpoints), _read_latest(checkpoints)))
    if folders and named not in ("", *(folder.name for folder in folders)):
        say(f"warning: {checkpoints / 'latest'} names {named}, which is not there")
    for folder in reversed(folders):
        manifest, problem = _verify(folder, world)
        if problem is None:
            return _opened(folder, manifest)
        say(f"warning: {folder} is damaged and is not used: {problem}")
    if folders:
        raise RuntimeError(f"{checkpoints}: every checkpoint is damaged; start afresh in another output_dir")
    return None


def open_one(folder: Path, world: World) -> Checkpoint:
    """The checkpoint in `folder`, verified. Collective. ValueError where it is none, or is damaged."""
    manifest, problem = _verify(folder, world)
    if problem is not None:
        raise ValueError(f"{folder} is damaged, or no checkpoint: {problem}")
    return _opened(folder, manifest)


def _opened(folder: Path, manifest: dict[str, Any]) -> Checkpoint:
    return Checkpoint(folder, manifest["step"], manifest, json.loads((folder / "state.json").read_text()))


def _read_latest(checkpoints: Path) -> str:
    try:
        return (checkpoints / "latest").read_text().strip()
    except (OSError, ValueError):
        return ""


def _verify(folder: Path, world: World) -> tuple[dict[str, Any], str | None]:
    """Compare each file with the manifest, the work split over the ranks; the first difference, or None."""
    manifest = read_object(folder / MANIFEST)
    try:
        problem = _find_difference(folder, manifest, world)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{MANIFEST}: {type(error).__name__}: {error}"
    return manifest, next((text for text in distributed.gather(problem) if text), None)


def _find_difference(folder: Path, manifest: dict[str, Any], world: World) -> str | None:
    files = manifest["files"]
    if step_folder(folder.parent, manifest["step"]).name != folder.name:
        return f"its {MANIFEST} is that of step {manifest['step']}"
    for path in sorted(folder.rglob("*.pt")):  # what DeepSpeed would read without asking
        if str(path.relative_to(folder)) not in files:
            return f"{path.relative_to(folder)} is none of its files"
    for name in sorted(files)[world.rank :: world.size]:
        expected = files[name]
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _describe(folder / name) != expected:
            return f"{name} is not the file of {expected['bytes']} bytes that was written"
    return None


def load(engine: Shards, checkpoint: Checkpoint, world: World, *, reshaped: bool = False) -> None:
    """Put weights, optimizer state and this rank's random state back as they were saved. Collective.

    `reshaped` says that another number of ranks or another ZeRO stage wrote it. A rank that was not there then takes
    rank 0's random state; pivot's training draws from none.
    ValueError for a checkpoint with a file that needs more than tensors and plain values: loading it could run what
    somebody put there, whatever the manifest says.
    """
    with distributed.shared_failure(f"opening {checkpoint.folder}"):
        for path in sorted(checkpoint.folder.rglob("*.pt"))[world.rank :: world.size]:
            unknown = engine.unknown_classes(path)
            if unknown:
                raise ValueError(
                    f"{path} holds {', '.join(unknown)}, which training never writes there, and was not loaded; remove "
                    "this checkpoint to go on from the one before it, and find out who put it there"
                )
    if reshaped:
        engine.load_reshaped(checkpoint.folder)
    else:
        engine.load(checkpoint.folder.parent, checkpoint.folder.name)
    own = checkpoint.folder / f"rank-{world.rank:05d}.pt"
    states = torch.load(own if own.is_file() else own.with_name("rank-00000.pt"), weights_only=True)
    distributed.set_rng_state(states)
