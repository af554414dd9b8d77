"""Shards that lie elsewhere: fetched whole through fsspec into a folder whose names are the content's sha256.

Two sets cannot collide there, equal shards of two sets are kept once, and a file under its own name is whole and
verified. One process downloads, the others of the machine wait for it; the oldest shards go when the cap is reached.
Nothing is run to fetch a file: a path that is a command is refused.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from pivot.data.web import StatusError, open_web
from pivot.system.lock import locked
from pivot.system.plain import plain

logger = logging.getLogger(__name__)

PROTOCOLS = ("http", "https", "s3", "gs", "hf", "memory")  # memory is fsspec's own, for tests
WINDOW_SHARDS = 8  # of a remote set: what the order mixes at a time, and so what has to lie here at a time
TRIES = 7
FIRST_WAIT_S = 1.0  # doubles from try to try: 63 s in all, so that a server may be started anew meanwhile
MAX_READ_BYTES = 50_000_000  # of a file that has no stated size, such as the manifest: 200,000 shards take so much
ABANDONED_S = 3600.0  # after which a .part that nobody writes to may go
CHUNK = 1 << 20
_AGAIN = (408, 425, 429)  # HTTP statuses below 500 that mean `later`
Result = TypeVar("Result")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>()\[\]]+")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(//)?")


class NotThere(ValueError):
    """An address that leads nowhere."""


class Refused(ValueError):
    """An address whose server will not give the file, however often it is asked."""


class Unreachable(OSError):
    """A server that did not give the file in TRIES."""


def is_remote(path: str) -> bool:
    """Whether `path` is a URL that can be fetched. Raises ValueError for unknown protocols, and for a command."""
    addresses = ", ".join(f"{protocol}://" for protocol in PROTOCOLS[:5])
    if path.lower().startswith("pipe:"):
        raise ValueError(
            f"{path}: pipe: would run a command, which is refused; give one of {addresses}, or mount the storage and "
            "give the folder"
        )
    scheme = _SCHEME.match(path)
    if not scheme or not scheme[2]:
        return False
    if scheme[1].lower() not in PROTOCOLS:
        raise ValueError(f"{shown(path)}: expected a folder, or one of {addresses}")
    return True


def join_url(folder: str, *names: str) -> str:
    parts = urlsplit(folder)
    return urlunsplit(parts._replace(path="/".join([parts.path.rstrip("/"), *names])))


def shown(url: str) -> str:
    """The URL without what may be a secret: user, password and query. A path is shown as it is."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class ShardCache:
    """FOLDER/ab/abcd....tar for each shard fetched, at most `max_bytes` of them."""

    def __init__(self, folder: str | Path, max_bytes: int = 200 << 30) -> None:
        self.folder, self.max_bytes = Path(folder), max_bytes

    def path(self, sha256: str, suffix: str = ".tar") -> Path:
        return self.folder / sha256[:2] / f"{sha256}{suffix}"

    def fetch(self, url: str, *, sha256: str, num_bytes: int = 0, suffix: str = ".tar") -> Path:
        """The local file with this content. Raises Unreachable when it cannot be had after TRIES, and ValueError for a
        protocol that this machine has no package for, or when the content is another.

        No more than `num_bytes` are taken, where they are given."""
        path = self.path(sha256, suffix)
        if not _touch(path):
            with locked(path.with_suffix(".lock")):
                if not _touch(path):  # another process fetched it meanwhile
                    part = self._make_room(path, num_bytes if suffix == ".tar" else 0)
                    try:
                        _download(url, part, sha256, num_bytes)
                        with self._undisturbed():
                            part.replace(path)
                    finally:
                        part.unlink(missing_ok=True)
        return path

    def read(self, url: str) -> bytes:
        """A small file that has no hash: fetched every time. Raises ValueError for one above MAX_READ_BYTES."""
        return _try_often(url, lambda: _read(url))

    def read_if_there(self, url: str) -> bytes | None:
        """The same of a file that need not exist."""
        try:
            return self.read(url)
        except NotThere:
            return None
        except Refused as error:  # a bucket that nobody may list answers so for what is not there
            logger.warning("%s; going on without this file, which need not exist", error)
            return None

    def _undisturbed(self) -> contextlib.AbstractContextManager[None]:
        """Hold off all that removes, adds or renames: who lists the folder meanwhile sees gone and new ones together,
        or misses one."""
        return locked(self.folder / "evict.lock")

    def _files(self) -> list[tuple[float, int, Path]]:
        files = []
        for path in self.folder.glob("*/*.tar*"):
            if path.suffix not in (".tar", ".part"):
                continue
            with contextlib.suppress(FileNotFoundError):  # a download that failed takes its .part away
                status = path.stat()
                files.append((status.st_mtime, status.st_size, path))
        return sorted(files)

    def _make_room(self, path: Path, num_bytes: int) -> Path:
        """A .part file of the size to come, after removing the shards used longest ago.

        Whoever has one of them open reads on; who needs it again fetches it again. A .part that a killed process left
        behind goes the same way.
        """
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        if num_bytes > self.max_bytes:
            raise ValueError(
                f"{self.folder}: a shard of {num_bytes} bytes is over the cap of {self.max_bytes}; raise it"
            )
        with self._undisturbed():
            files = self._files()
            used = sum(size for _, size, _ in files)
            for used_at, size, old in files:
                if used + num_bytes <= self.max_bytes:
                    break
                if old.suffix == ".part" and time.time() - used_at < ABANDONED_S:
                    continue  # being written
                old.unlink(missing_ok=True)
                used -= size
            with part.open("wb") as file:
                file.truncate(num_bytes)  # counts from now on
        return part


def _download(url: str, part: Path, sha256: str, num_bytes: int) -> None:
    got = _try_often(url, lambda: _copy(url, part, num_bytes))
    if got != sha256:
        raise ValueError(
            f"{shown(url)}: sha256 {got[:12]} is not that of the manifest ({sha256[:12]}); the upload is damaged "
            "or of another version: upload the set again, manifest.json last"
        )


def _copy(url: str, part: Path, num_bytes: int) -> str:
    """Fetch into `part`; the content's sha256. Raises ValueError when there is more than the `num_bytes` expected."""
    digest = hashlib.sha256()
    copied = 0
    with _open(url, num_bytes or None) as source, part.open("r+b") as target:
        while chunk := source.read(CHUNK):
            copied += len(chunk)
            if num_bytes and copied > num_bytes:
                raise ValueError(
                    f"{shown(url)} holds more than the {num_bytes:,} bytes that the manifest says; the upload is of "
                    "another version: upload the set again, manifest.json last"
                )
            digest.update(chunk)
            target.write(chunk)
        target.truncate()
        target.flush()
        os.fsync(target.fileno())
    return digest.hexdigest()


def _read(url: str) -> bytes:
    data = bytearray()
    with _open(url) as source:
        while chunk := source.read(CHUNK):
            data += chunk
            if len(data) > MAX_READ_BYTES:
                raise ValueError(
                    f"{shown(url)} holds more than {MAX_READ_BYTES:,} bytes, expected a small file; name the folder "
                    "that python -m data_tools wrote"
                )
    return bytes(data)


def _open(url: str, num_bytes: int | None = None) -> Any:
    """The file at `url`, to be read in a `with`; it has `num_bytes`, if its size is known from elsewhere."""
    is_remote(url)  # raises for what is never fetched
    if url.lower().startswith(("http://", "https://")):
        return open_web(url, num_bytes)
    import fsspec

    return fsspec.open(url, "rb")


def _try_often(url: str, fetch: Callable[[], Result]) -> Result:
    """What `fetch` gives; again after a wait that doubles, as long as waiting may help."""
    for attempt in range(TRIES):
        try:
            return fetch()
        except Exception as error:  # each backend has its own errors for a network that stutters
            _raise_if_final(url, error)
            seen = f"{shown(url)}: {_in_words(url, error)}"
            if attempt == TRIES - 1:
                raise Unreachable(
                    f"{seen} ({TRIES} tries); see whether the server is up, then run the same command again"
                ) from error
            if attempt == 0:
                _tell_once(url, seen, FIRST_WAIT_S * (2 ** (TRIES - 1) - 1))
            time.sleep(FIRST_WAIT_S * 2**attempt)
    raise AssertionError("the last try returns or raises")


_told_at: dict[str, float] = {}  # server -> when


def _tell_once(url: str, seen: str, wait_s: float) -> None:
    """Say what was seen of a server: once in the time of all tries, of however many files threads ask it for."""
    server = urlsplit(url).netloc
    now = time.monotonic()
    if now - _told_at.get(server, -float("inf")) >= wait_s:
        _told_at[server] = now
        logger.warning("%s; trying again for %.0f s", seen, wait_s)


def _raise_if_final(url: str, error: Exception) -> None:
    """Raise what the user is to read, unless another try may do better."""
    status, seen = _status(error), _in_words(url, error)
    if isinstance(error, ImportError):
        raise ValueError(f"{shown(url)}: {error}; or install pivot[remote], which brings all of them") from error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise error
    if status in (404, 410) or (isinstance(error, FileNotFoundError) and status is None):
        raise NotThere(f"{shown(url)} does not exist ({seen}); name the folder that python -m data_tools wrote")
    if isinstance(error, ssl.SSLCertVerificationError):
        raise Refused(f"{shown(url)}: {seen}; correct the address, or install the certificate that it needs")
    if isinstance(error, PermissionError) or status in (401, 403, 407):
        raise Refused(f"{shown(url)}: {seen}; give the right to read it: a user and password, a token or a login")
    if status is not None and 400 <= status < 500 and status not in _AGAIN:
        raise Refused(f"{shown(url)}: {seen}; correct the address")
    if isinstance(error, ValueError):
        raise error


def _status(error: Exception) -> int | None:
    """The HTTP status that the libraries behind https, s3, gs and hf keep under one name or another."""
    for value in (error, getattr(error, "response", None)):
        for name in ("status", "status_code", "code"):
            if isinstance(status := getattr(value, name, None), int):
                return status
    return None


def _in_words(url: str, error: Exception) -> str:
    """What was seen, in one short line without the URL's secrets."""
    without = str(error).replace(url, shown(url))
    without = _URL.sub(lambda other: shown(other[0]), without)  # where it was sent on to, signed perhaps
    said = plain(" ".join(without.split())[:300])
    return said if isinstance(error, StatusError) else f"{type(error).__name__}: {said}"


def _touch(path: Path) -> bool:
    """Mark as just used; False when it is not there."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True
