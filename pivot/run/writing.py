"""The files of a checkpoint: written, flushed and hashed in one pass; at once, or in a thread from copies of the state.

The thread makes no collective and reads nothing that training changes: what it writes was copied beforehand.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import threading
import time
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from pivot.system import fault

END_WITHIN_S = 10.0  # for a thread that is told to stop: it does so between two tensors
Storages = dict[tuple[str, int, int], torch.UntypedStorage]


class Writer:
    """One rank's files of one checkpoint, in `folder`. Behind an error nothing more is written, and `wait` raises it.

    So a rank that cannot write goes on with what the others are at, and all learn of it where they meet.
    """

    def __init__(self, folder: Path, *, in_background: bool) -> None:
        self.folder, self.in_background = folder, in_background
        self.files: dict[str, dict[str, Any]] = {}  # name -> its "bytes" and "sha256", of what is written
        self.write_s = 0.0
        self._copies: list[tuple[HostCopy, Path]] = []
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self._error: Exception | None = None

    def write(self, value: Any, path: Path) -> None:
        """Write `value` as torch.save does (bytes: as they are) before this returns, or copy it for the thread."""
        if self._error is not None:
            return
        try:
            if self.in_background:
                self._copies.append((HostCopy(value), path))
            else:
                self._write(value, path)
        except Exception as error:
            self._error = error

    def start(self) -> None:
        """All files are handed over: in the background the writing begins."""
        if self._copies and self._error is None:
            self._thread = threading.Thread(target=self._write_copies, name="checkpoint", daemon=True)
            self._thread.start()

    def _write_copies(self) -> None:
        try:
            while self._copies:
                copy, path = self._copies.pop(0)
                self._write(copy.take(), path)
        except Exception as error:
            self._error = error
        self._copies.clear()

    def _write(self, value: Any, path: Path) -> None:
        started = time.monotonic()
        fault.fill_disk(self.folder)
        self.files[str(path.relative_to(self.folder))] = write_file(value, path, self._stopped)
        self.write_s += time.monotonic() - started

    @property
    def is_done(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Until every file is on the disk. Raises what kept one from it."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def abandon(self) -> None:
        """Stop writing, and wait until the thread does; what is written stays where it is."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(END_WITHIN_S)


def write_file(value: Any, path: Path, stopped: threading.Event) -> dict[str, Any]:
    """Write one file to the disk; its size and sha256. OSError names the file; RuntimeError once `stopped` is set."""
    file = _HashedFile(path.open("wb"), stopped)
    try:
        with contextlib.closing(file):
            if isinstance(value, bytes):
                file.write(value)
            else:
                torch.save(value, file)  # type: ignore[arg-type]  # which asks for these two methods alone
            file.sync()
    except Exception as error:
        cause = file.error or error  # behind the disk's error torch.save raises one of its own
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise cause from None
    return {"bytes": file.size, "sha256": file.digest.hexdigest()}


class _HashedFile:
    """What torch.save writes to: a file, hashed on the way. Python's lock is free during both."""

    def __init__(self, file: IO[bytes], stopped: threading.Event) -> None:
        self._file, self._stopped = file, stopped
        self.size, self.digest = 0, hashlib.sha256()
        self.error: Exception | None = None

    def write(self, content: bytes | memoryview) -> int:
        try:
            if self._stopped.is_set():
                raise RuntimeError("the run ended before its checkpoint was written")
            self._file.write(content)
        except Exception as error:
            self.error = self.error or error
            raise
        self.digest.update(content)
        self.size += len(content)
        return len(content)

    def flush(self) -> None:
        self._file.flush()

    def sync(self) -> None:
        """All that was written is on the disk when this returns."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class HostCopy:
    """A copy of a value, its tensors in host memory, that shares nothing with it: for torch.save, later.

    pickle finds the tensors, as torch.save does, so that none can be overlooked, and what they carry beside numbers.
    Tensors that share memory share it in the copy, too: a storage is copied once, and whole, as torch.save writes it.
    """

    def __init__(self, value: Any) -> None:
        self._structure = io.BytesIO()
        pickler = _TensorsApart(self._structure)
        pickler.dump(value)
        for tensor in pickler.tensors:  # which grow where an attribute holds another one
            pickler.dump(vars(tensor))
        storages: Storages = {}
        self._tensors = [_copy_tensor(tensor, storages) for tensor in pickler.tensors]

    def take(self) -> Any:
        """The copy, which this object does not hold any more."""
        self._structure.seek(0)
        unpickler, tensors = _TensorsBack(self._structure, self._tensors), self._tensors
        del self._structure, self._tensors
        value = unpickler.load()
        for tensor in tensors:
            vars(tensor).update(unpickler.load())
        return value


class _TensorsApart(pickle.Pickler):
    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []
        self._places: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        place = self._places.setdefault(id(value), len(self.tensors))
        if place == len(self.tensors):
            self.tensors.append(value)
        return place


class _TensorsBack(pickle.Unpickler):
    def __init__(self, file: IO[bytes], tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, place: Any) -> Tensor:
        return self._tensors[place]


def _copy_tensor(tensor: Tensor, storages: Storages) -> Tensor:
    """On the host, at its place in a copy of its storage. `storages`: those that are copied already."""
    source = tensor.untyped_storage()
    key = (str(source.device), source.data_ptr() or id(tensor), source.nbytes())  # an empty one has no address
    if key not in storages:
        storages[key] = source.clone() if source.device.type == "cpu" else source.cpu()
    place = tensor.storage_offset(), tensor.size(), tensor.stride()
    copy = torch.empty(0, dtype=tensor.dtype).set_(storages[key], *place)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(copy, requires_grad=tensor.requires_grad)
    return copy.requires_grad_(tensor.requires_grad)
