"""A server that fails in each of its ways: what passes is tried again, the rest is told, too much is not taken."""

import functools
import http.server
import io
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest

from launch.command import tell_error
from pivot.data import index, remote, web
from pivot.data.lengths import build_lengths
from pivot.data.loader import Loader
from pivot.data.remote import NotThere, Refused, ShardCache, Unreachable
from pivot.data.shards import ShardSet
from tests.kit.batches import take
from tests.kit.sets import FakeProcessor, make_plan, make_set

SECRET = "?token=s3cret"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("faults"), count=12, samples_per_shard=4)


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("many"), count=12, samples_per_shard=1)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.0)


class Faulty(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; `self.server.faults` is a list of what happens to the first requests for paths in `affected`."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        if self.server.faults and self.server.affected in self.path:
            self.server.faults.pop(0)(self)
        else:
            super().do_GET()


class Server(http.server.ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False

    def handle_error(self, request, client_address):
        pass  # a client that hangs up is what some of these tests are about


@contextmanager
def serve(folder, faults=(), affected=""):
    with Server(("127.0.0.1", 0), functools.partial(Faulty, directory=str(folder))) as server:
        server.faults, server.affected, server.asked = list(faults), affected, []
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def status(code):
    return lambda handler: handler.send_error(code)


def hang_up(handler):
    handler.close_connection = True


def cut(handler):
    """Half of the bytes that were promised, fewer than the smallest file has."""
    handler.send_response(200)
    handler.send_header("Content-Length", "120")
    handler.end_headers()
    handler.wfile.write(b"x" * 60)


def cut_without_length(handler):
    """HTTP/1.0's way: the end of the connection is the end of the file."""
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(b"x" * 60)


def cut_between_chunks(handler):
    handler.protocol_version = "HTTP/1.1"
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"5\r\nabcde\r\n8\r\nab")
    handler.close_connection = True


def stall(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.flush()
    time.sleep(1.5)


def say_nothing(handler):
    time.sleep(1.5)


def drip(handler):
    """A byte now and then: no single wait is long."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(30):
        handler.wfile.write(b"x")
        handler.wfile.flush()
        time.sleep(0.05)


def endless(handler):
    handler.send_response(200)
    handler.end_headers()
    handler.server.sent = 0
    try:
        while True:
            handler.server.sent += handler.wfile.write(b" " * 65536)
    except OSError:
        pass


PASSING = [status(503), status(500), status(429), hang_up, cut, cut_between_chunks]


@pytest.mark.parametrize("affected", ["manifest.json", "/index/", "/shards/"])
def test_what_passes_is_tried_again_and_told_once(packed, tmp_path, caplog, affected):
    with serve(packed.folder, PASSING, affected) as (server, url), caplog.at_level(logging.WARNING):
        far = ShardSet.open(url + SECRET, ShardCache(tmp_path))
        assert all(far.read(row) == packed.read(row) for row in range(12))
        assert not server.faults
    first = [record.getMessage() for record in caplog.records]
    assert "HTTP 503 Service Unavailable; trying again for" in "".join(first)
    assert len(first) <= 3 and not any("s3cret" in line for line in first)  # at most one for each of three files


@pytest.mark.parametrize("affected", ["/index/", "/shards/"])
def test_a_file_that_ends_early_without_a_stated_length(packed, tmp_path, affected):
    with serve(packed.folder, [cut_without_length], affected) as (_, url):
        assert ShardSet.open(url, ShardCache(tmp_path)).read(0) == packed.read(0)


@pytest.mark.parametrize("fault", [stall, say_nothing, drip])
def test_a_stall_ends(packed, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(web, "STALL_S", 0.2)
    with serve(packed.folder, [fault], "manifest.json") as (_, url):
        began = time.monotonic()
        assert ShardSet.open(url, ShardCache(tmp_path)).read(0) == packed.read(0)
        assert 0.2 <= time.monotonic() - began < 1.4


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (404, NotThere, "does not exist (HTTP 404"),
        (410, NotThere, "does not exist (HTTP 410"),
        (401, Refused, "HTTP 401 Unauthorized; give the right to read it"),
        (403, Refused, "HTTP 403 Forbidden; give the right to read it"),
        (400, Refused, "HTTP 400 Bad Request; correct the address"),
    ],
)
def test_what_stays_is_told_at_once(packed, tmp_path, capsys, code, kind, words):
    with serve(packed.folder, [status(code)] * 9) as (server, url), pytest.raises(kind) as caught:
        ShardSet.open(url.replace("//", "//me:pa55@") + SECRET, ShardCache(tmp_path))
    assert len(server.asked) == 1
    assert tell_error(caught.value) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {url}/manifest.json") and words in told and told.count("\n") == 1
    assert "s3cret" not in told and "pa55" not in told


@pytest.mark.parametrize(
    ("fault", "words"), [(status(503), "HTTP 503 Service Unavailable"), (hang_up, "RemoteDisconnected")]
)
def test_a_server_that_stays_away_is_one_sentence(packed, tmp_path, capsys, fault, words):
    with serve(packed.folder, [fault] * 9) as (server, url), pytest.raises(Unreachable) as caught:
        ShardSet.open(url + SECRET, ShardCache(tmp_path))
    assert len(server.asked) == remote.TRIES
    assert tell_error(caught.value) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"error: {url}/manifest.json: {words}") and "(7 tries); see whether the server is up" in told


def test_nobody_listens(tmp_path):
    with serve(tmp_path) as (_, url):
        pass
    with pytest.raises(Unreachable, match=r"/manifest.json: ConnectionRefusedError: .* \(7 tries\)"):
        ShardSet.open(url, ShardCache(tmp_path))


def test_a_shard_out_of_reach_is_no_damaged_sample(packed, tmp_path):
    """The loader would mask damaged samples and train on without them."""
    with serve(packed.folder, [status(503)] * 99, "/shards/") as (_, url):
        far = ShardSet.open(url, ShardCache(tmp_path))
        with pytest.raises(Unreachable, match="HTTP 503"):
            far.read(0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_server_that_goes_away_ends_the_loader_in_one_sentence(packed, tmp_path, capsys, workers):
    """Also out of a worker process, whose errors torch would report with a traceback for each process."""
    with serve(packed.folder) as (server, url):
        far = ShardSet.open(url, ShardCache(tmp_path / "cache"))
        plan = make_plan(packed, tmp_path / "lengths", world_size=1)
        server.affected, server.faults = "/shards/", [status(503)] * 9999
        with pytest.raises(Unreachable) as caught:
            take(Loader(far, plan, FakeProcessor(), workers=workers), 1)
    assert tell_error(caught.value) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(told) == 1 and "HTTP 503 Service Unavailable (7 tries)" in told[0]
    assert "Traceback" not in capsys.readouterr().err


def test_a_server_that_is_away_is_not_waited_for_by_each_shard(many_shards, tmp_path, monkeypatch):
    """Of 12 shards in batches of one, two threads ask: 7 tries each, and those that had begun when the first failed."""
    monkeypatch.setattr(index, "OPENING_BATCH", 1)
    monkeypatch.setattr(index, "OPENING_THREADS", 2)
    with serve(many_shards.folder, [status(503)] * 9999, "/index/") as (server, url), pytest.raises(Unreachable):
        ShardSet.open(url, ShardCache(tmp_path))
    assert len({path for path, _ in server.asked}) <= 1 + 4 < 1 + 12


def test_a_server_is_told_once_for_many_files(packed, tmp_path, monkeypatch, caplog):
    """0.01 + 0.02 + ... + 0.32 = 0.63 s, in which three threads ask for a file each."""
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    with serve(packed.folder, [status(503)] * 9999, "/shards/") as (_, url), caplog.at_level(logging.WARNING):
        far = ShardSet.open(url, ShardCache(tmp_path))
        with ThreadPoolExecutor(3) as pool:
            problems = [future.exception() for future in [pool.submit(far.fetch, shard) for shard in range(3)]]
    assert all(isinstance(problem, Unreachable) for problem in problems)
    assert sum("trying again for 1 s" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("body", [b"", b"<html>", b"PK\3\4 a zip", "huge", "another type"])
def test_side_cars_that_are_none_are_counted_anew(packed, tmp_path, monkeypatch, caplog, body):
    """Whoever may write to the server may write anything."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<u8", "fortran_order": False, "shape": (10**12,)})
    body = {"huge": file.getvalue(), "another type": file.getvalue().replace(b"1000000000000", b"1            ")}.get(
        body, body
    )
    with serve(packed.folder) as (_, url):
        far = ShardSet.open(url, ShardCache(tmp_path))
        monkeypatch.setattr(ShardSet, "read_beside", lambda self, shard, *names: body)
        assert build_lengths(far, FakeProcessor(), tmp_path) == 12
    assert "beside the set holds no token counts of it; counting" in caplog.text


def test_the_signature_of_an_address_that_a_server_sends_on_to_is_not_told(monkeypatch, tmp_path):
    def refuse(url):
        raise ConnectionError("cannot connect to 'https://me:pa55@store.example/a?X-Signature=s3cret'")

    monkeypatch.setattr(remote, "_read", refuse)
    with pytest.raises(Unreachable, match="cannot connect to 'https://store.example/a'") as caught:
        ShardCache(tmp_path).read("hf://datasets/o/n/manifest.json")
    assert "s3cret" not in str(caught.value) and "pa55" not in str(caught.value)


def test_the_waits_come_to_a_minute(monkeypatch):
    """1 + 2 + 4 + 8 + 16 + 32 = 63 s."""
    waited = []
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 1.0)
    monkeypatch.setattr(time, "sleep", waited.append)
    with pytest.raises(Unreachable):
        ShardCache("unused").read("http://127.0.0.1:1/manifest.json")
    assert waited == [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize("affected", ["/index/", "/shards/"])
def test_more_than_the_manifest_says_is_not_taken(packed, tmp_path, affected):
    with serve(packed.folder, [endless], affected) as (server, url):
        with pytest.raises(ValueError, match=r"holds more than the [\d,]+ bytes that the manifest says"):
            ShardSet.open(url, ShardCache(tmp_path)).read(0)
        time.sleep(0.1)
        assert server.sent < 50_000_000  # what the two sockets buffer
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".tar", ".part")]


def test_a_manifest_without_end_is_not_read(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "MAX_READ_BYTES", 100_000)
    with (
        serve(packed.folder, [endless]) as (_, url),
        pytest.raises(ValueError, match=r"/manifest.json holds more than 100,000 bytes, expected a small file"),
    ):
        ShardSet.open(url, ShardCache(tmp_path))


def test_side_cars_need_not_exist(packed, tmp_path, caplog):
    """A bucket that nobody may list answers 403 for what is not there; a server that is away is waited for."""
    with serve(packed.folder) as (server, url):
        far = ShardSet.open(url, ShardCache(tmp_path))
        assert far.read_beside(0, "lengths", "none") is None
        server.faults, server.affected = [status(403)], "lengths"
        with caplog.at_level(logging.WARNING):
            assert far.read_beside(0, "lengths", "none") is None
        assert "/lengths/none: HTTP 403 Forbidden" in caplog.text and "need not exist" in caplog.text
        server.faults, server.affected = [status(503)], "manifest"
        assert far.read_beside(0, "manifest.json") == (packed.folder / "manifest.json").read_bytes()


def test_the_password_of_a_url_is_sent_as_a_header(packed, tmp_path):
    """The base64 of `me:p@ss`; a folder with a space is asked for as %20."""
    (tmp_path / "my set").symlink_to(packed.folder)
    with serve(tmp_path) as (server, url):
        ShardSet.open(url.replace("//", "//me:p%40ss@") + "/my set" + SECRET, ShardCache(tmp_path / "cache"))
    assert server.asked[0] == ("/my%20set/manifest.json?token=s3cret", "Basic bWU6cEBzcw==")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PermissionError("Access Denied"), Refused),  # s3fs
        (type("HttpError", (Exception,), {"code": 403})("no"), Refused),  # gcsfs
        (type("HubError", (OSError,), {"response": type("R", (), {"status_code": 404})})("no"), NotThere),  # hf
        (type("HubError", (OSError,), {"response": type("R", (), {"status_code": 502})})("bad"), Unreachable),
    ],
)
def test_the_statuses_of_other_libraries_are_understood(monkeypatch, tmp_path, error, kind):
    def refuse(url):
        raise error

    monkeypatch.setattr(remote, "_read", refuse)
    with pytest.raises(kind, match="s3://bucket/set/manifest.json"):
        ShardCache(tmp_path).read("s3://bucket/set/manifest.json")
