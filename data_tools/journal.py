"""How far a data set has come that is being written: a lock, `pack.json` while it grows, `manifest.json` at its end.

A set is a pure function of its identity (input and options). A second run with the same identity goes on behind the
last finished shard; one with another is refused; one at the same time waits for nobody and is refused too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

from pivot.data.index import BYTES_PER_RECORD
from pivot.data.manifest import MANIFEST_VERSION, Shard, set_fingerprint
from pivot.system.files import write_json
from pivot.system.lock import FileLock, Held

# What write_json leaves when it is killed. It is nobody's: who else would finish it does not hold our lock.
LEFTOVER = re.compile(r"(pack|manifest|stats)\.json\.\d+\.part")


class Journal:
    """Held with `with`, which takes the lock of folder `out`.

    `state` is what the last run saved, or None for a fresh start. Raises ValueError when the folder holds something
    else or lacks shards that it lists, or when another process is writing there.
    """

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        self.out, self._identity = out, identity
        self._path, self._manifest = out / "pack.json", out / "manifest.json"
        self._lock = FileLock(out / "pack.lock")
        self.finished = False
        self.state: dict[str, Any] | None = None

    def __enter__(self) -> Journal:
        try:
            return self._open()
        except BaseException:
            self._release()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def _open(self) -> Journal:
        self._require_folder()
        if not self._manifest.is_file():
            self._take_lock()
        return self.look()

    def look(self) -> Journal:
        """Read what the folder holds, without the lock and without a change in it; raises ValueError like `with`."""
        self._require_folder()
        self.finished = self._manifest.is_file()
        path = self._manifest if self.finished else self._path
        if path.is_file():
            try:
                self.state = json.loads(path.read_text())
            except ValueError as error:
                raise ValueError(f"{path} is damaged ({error}); remove {self.out} and run the command again") from error
            self._require_same(self.state or {})
            require_files(self.out, self.shards)
        elif self.out.is_dir():
            self._require_empty()
        return self

    def _release(self) -> None:
        if self._lock.held:
            self._lock.path.unlink(missing_ok=True)
            self._lock.release()
            if self.state is None and not any(self.out.iterdir()):  # nothing came of it
                self.out.rmdir()

    @property
    def shards(self) -> list[Shard]:
        """Those that are finished."""
        return [Shard(**entry) for entry in (self.state or {}).get("shards", [])]

    def save(self, shards: Iterable[Shard], **state: Any) -> None:
        self.state = {"options": self._identity, "shards": [asdict(shard) for shard in shards], **state}
        write_json(self._path, self.state)

    def finish(self, shards: list[Shard], *, name: str, kind: str, **facts: Any) -> None:
        """Write the manifest: from now on the folder is a data set."""
        counts = {"samples": sum(shard.samples for shard in shards), "bytes": sum(shard.bytes for shard in shards)}
        head = {"version": MANIFEST_VERSION, "name": name, "kind": kind, **counts}
        listed = {"fingerprint": set_fingerprint(shards), "shards": [asdict(shard) for shard in shards]}
        write_json(self._manifest, {**head, **facts, **listed, "options": self._identity})
        self._path.unlink(missing_ok=True)

    def clear_leftovers(self) -> None:
        """Remove what an interrupted run left behind the last shard that is finished."""
        known = {shard.name for shard in self.shards}
        for path in chain((self.out / "shards").glob("*"), (self.out / "index").glob("*")):
            if path.name.split(".")[0] not in known or path.name.endswith(".part"):
                path.unlink()
        for path in self.out.iterdir():
            if LEFTOVER.fullmatch(path.name):
                path.unlink()

    def _require_folder(self) -> None:
        there = next(path for path in (self.out.absolute(), *self.out.absolute().parents) if path.exists())
        if not there.is_dir():
            raise ValueError(f"--out {self.out}: {there} is a file, expected a folder to write; choose another --out")

    def _require_same(self, state: dict[str, Any]) -> None:
        before = state.get("options", {})
        changed = [
            f"{key} was {before.get(key)!r}, is {value!r}"
            for key, value in self._identity.items()
            if before.get(key) != value
        ]
        if changed:
            raise ValueError(f"{self.out} holds a pack with other options ({'; '.join(changed)}); choose another --out")

    def _require_empty(self) -> None:
        if any(path.name != "pack.lock" and not LEFTOVER.fullmatch(path.name) for path in self.out.iterdir()):
            raise ValueError(f"{self.out} is not empty and holds no pack; choose another --out")

    def _take_lock(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.take()
        except Held as held:
            raise ValueError(f"{self.out} is being written by {held}; wait for it, or choose another --out") from held


def require_files(out: Path, shards: Iterable[Shard]) -> None:
    """Raise ValueError unless the shards are there in their sizes; to read them again is the work of `validate`."""
    for shard in shards:
        sizes = {
            out / "shards" / f"{shard.name}.tar": shard.bytes,
            out / "index" / f"{shard.name}.idx": shard.samples * BYTES_PER_RECORD,
        }
        for path, size in sizes.items():
            actual_size = path.stat().st_size if path.is_file() else None
            if actual_size != size:
                state = "is not there" if actual_size is None else f"has {actual_size} bytes"
                raise ValueError(
                    f"{path} {state}, and was written with {size}; "
                    f"put it back, or remove {out} and run the same command again to write it all anew"
                )
