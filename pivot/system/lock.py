"""Locks on files: the kernel lets go of them when their process dies, and no process forked from it keeps them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

HELD = (errno.EWOULDBLOCK, errno.EACCES)  # EACCES: CIFS
UNKNOWN = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)  # Lustre and NFS, as mounted

# A forked process has the open files of its parent, and with them the locks, for as long as it lives.
_open_files: set[int] = set()
_opening = threading.Lock()  # held over a fork, so that no file is between its opening and the set
_told: set[int] = set()  # devices whose lack of locks was said


def _close_in_child() -> None:
    for descriptor in _open_files:
        os.close(descriptor)
    _open_files.clear()
    _opening.release()


os.register_at_fork(before=_opening.acquire, after_in_parent=_opening.release, after_in_child=_close_in_child)


class Held(Exception):
    """Another process has the lock; the text says which."""


class FileLock:
    """An exclusive lock on the file `path`, which holds who has it. Where the file system knows no locks, a warning."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1

    def take(self, *, wait: bool = False) -> None:
        """Raises Held when another process has it, unless it is to `wait`. The folder must be there."""
        while True:
            self._open()
            try:
                _flock(self._descriptor, self.path, wait=wait)
                if self.path.exists() and os.path.samestat(os.fstat(self._descriptor), self.path.stat()):
                    break
            except BaseException:
                self.release()
                raise
            self.release()  # its holder removed it between our opening and our lock
        if not wait:  # nobody who waits reads who has it
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, _owner().encode())

    @property
    def held(self) -> bool:
        return self._descriptor in _open_files  # not so in a forked process, where the number may be another file's

    def release(self) -> None:
        """Let go of it; nothing happens where it is not held."""
        with _opening:
            if self.held:
                _open_files.remove(self._descriptor)
                os.close(self._descriptor)
            self._descriptor = -1

    __del__ = release  # as a file object closes

    def _open(self) -> None:
        with _opening:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            _open_files.add(self._descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock on `path`, after waiting for whoever has it; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    lock.take(wait=True)
    try:
        yield
    finally:
        lock.release()


def _flock(descriptor: int, path: Path, *, wait: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            raise Held(os.pread(descriptor, 1000, 0).decode(errors="replace").strip() or "another process") from error
        if error.errno not in UNKNOWN:
            raise
        device = os.fstat(descriptor).st_dev
        if device not in _told:
            _told.add(device)
            logger.warning(
                "%s: the file system knows no locks (%s); it goes on without, so see to it that no second process "
                "writes there meanwhile",
                path,
                error.strerror,
            )


def _owner() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return f"process {os.getpid()} on {socket.gethostname()}" + (f", job {job}" if job else "")
