"""Files on an HTTP server, each read from start to end: the server's status is kept as it is, and a stall ends."""

from __future__ import annotations

import base64
import time
from http.client import HTTPResponse
from types import TracebackType
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from urllib.request import Request, urlopen

STALL_S = 30.0  # without a byte, after which a try ends
MIN_BYTES = 32_768  # that have to come in so many seconds: a server may also send a byte now and then
_KEPT = "/%:@!$&'()*+,;=~"  # what a path may hold as it is; the rest is written as %XX


class StatusError(OSError):
    """A server's answer that is not the file."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"HTTP {status} {reason[:80]}".rstrip())
        self.status = status


class Body:
    """What a server sends, as a file to read. Raises ConnectionError when it ends early, TimeoutError on a stall."""

    def __init__(self, response: HTTPResponse, num_bytes: int | None) -> None:
        """`num_bytes`: how long the file should be, for servers that do not say it."""
        self._response = response
        self._left = num_bytes if response.length is None else response.length
        self._since, self._came = time.monotonic(), 0

    def read(self, size: int) -> bytes:
        data = self._response.read1(size)
        if not data and self._left is not None and self._left > 0:
            raise ConnectionError(f"the connection ended {self._left:,} bytes before the end of the file")
        if self._left is not None:
            self._left -= len(data)
        self._require_progress(len(data))
        return data

    def _require_progress(self, count: int) -> None:
        self._came += count
        elapsed = time.monotonic() - self._since
        if elapsed > STALL_S:
            if self._came < MIN_BYTES:
                raise TimeoutError(f"{self._came:,} bytes came in {elapsed:.0f} s")
            self._since, self._came = time.monotonic(), 0

    def __enter__(self) -> Body:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._response.close()


def open_web(url: str, num_bytes: int | None = None) -> Body:
    """The file at an http or https address. Raises StatusError, or OSError when the server cannot be reached."""
    try:
        response: Any = urlopen(_request(url), timeout=STALL_S)
    except HTTPError as error:
        error.close()
        raise StatusError(error.code, str(error.reason)) from None  # its text may hold the query
    except URLError as error:
        raise error.reason if isinstance(error.reason, OSError) else ConnectionError(str(error.reason)) from None
    return Body(response, num_bytes)


def _request(url: str) -> Request:
    """With the user and password of the URL as a header, which urllib would take for a part of the host."""
    parts = urlsplit(url)
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2], path=quote(parts.path, safe=_KEPT), fragment="")
    request = Request(urlunsplit(bare), headers={"User-Agent": "pivot"})
    if parts.username is not None:
        secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(secret).decode()}")
    return request
