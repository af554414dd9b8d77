"""Remote sets: fetched once, verified, under the cap, by one downloader at a time; commands run where allowed."""

import contextlib
import functools
import http.server
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest
import torch

from pivot.data import remote
from pivot.data.ahead import FetchAhead
from pivot.data.lengths import build_lengths, load_lengths
from pivot.data.loader import Loader
from pivot.data.remote import ShardCache, is_remote, join_url, shown
from pivot.data.shards import ShardSet
from pivot.evaluate.held_out import open_held_out
from pivot.system.distributed import World
from pivot.system.lock import locked
from tests.kit.batches import assert_equal_batches, take
from tests.kit.sets import FakeProcessor, make_plan, make_set

URL = "memory://sets/tiny"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("remote"), count=40, samples_per_shard=4)


@pytest.fixture
def uploaded(packed):
    """The set in fsspec's memory, which has the one interface that s3, gs and hf have too."""
    files = fsspec.filesystem("memory")
    files.put(str(packed.folder) + "/", "/sets/tiny/", recursive=True)
    yield files
    files.rm("/sets", recursive=True)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.0)


def test_a_remote_set_reads_as_the_local_one(packed, uploaded, tmp_path):
    far = ShardSet.open(URL, ShardCache(tmp_path / "cache"))
    assert far.fingerprint == packed.fingerprint and far.is_remote and not packed.is_remote
    assert not list(tmp_path.rglob("*.tar")), "the index alone opens it"
    assert far.read(7) == packed.read(7)
    assert len(list(tmp_path.rglob("*.tar"))) == 1
    assert all(far.read(row) == packed.read(row) for row in range(40))
    assert not list(tmp_path.rglob("*.part"))
    for path in (tmp_path / "cache").rglob("*.tar"):
        assert path.parent.name == path.name[:2]


def test_a_second_reader_fetches_nothing(uploaded, tmp_path):
    cache = ShardCache(tmp_path)
    first = ShardSet.open(URL, cache)
    [first.read(row) for row in range(40)]
    again = ShardSet.open(URL, cache)
    uploaded.rm("/sets/tiny/shards", recursive=True)
    assert again.read(0) == first.read(0)
    uploaded.put(str(tmp_path), "/sets/tiny/shards", recursive=True)  # for the fixture to remove


def test_loaders_read_ahead_and_hold_equal_batches(packed, uploaded, tmp_path):
    far = ShardSet.open(URL, ShardCache(tmp_path / "cache"))
    plan = make_plan(packed, tmp_path / "lengths", window_shards=2, world_size=1)
    near = take(Loader(packed, plan, FakeProcessor()), 6)
    for workers in (0, 2):
        found = take(Loader(far, plan, FakeProcessor(), workers=workers), 6)
        for step, other in zip(near, found, strict=True):
            for left, right in zip(step, other, strict=True):
                assert_equal_batches(left, right)


def test_fetching_ahead_goes_in_the_order_of_need_and_stays_in_two_windows(packed, uploaded, tmp_path):
    far = ShardSet.open(URL, ShardCache(tmp_path / "cache"))
    plan = make_plan(packed, tmp_path / "lengths", window_shards=2, world_size=1, global_batch_size=8)
    ahead = FetchAhead(far, plan, first_step=0, max_shards=4)
    wanted = ahead.upcoming(0)
    assert len(wanted) == 4
    assert set(wanted[:2]) == {far.locate(int(row))[0] for row in plan.step_ids(0)}
    deadline = time.monotonic() + 10
    while len(list(tmp_path.rglob("*.tar"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    names = {path.stem for path in tmp_path.rglob("*.tar")}
    assert names == {far.shards[number].sha256 for number in wanted}
    ahead.move_to(1)
    ahead.stop()


def used_bytes(folder):
    """Of the shards in a cache, those on their way included; held still meanwhile, as whoever makes room holds it."""
    with locked(folder / "evict.lock"):
        paths = [path for path in folder.rglob("*.tar*") if path.suffix in (".tar", ".part")]
        return sum(path.stat().st_size for path in paths)


def test_the_cap_holds_and_the_oldest_goes(packed, uploaded, tmp_path):
    size = max(shard.bytes for shard in packed.shards)
    cache = ShardCache(tmp_path, max_bytes=3 * size)
    far = ShardSet.open(URL, cache)
    for shard in range(10):
        far.fetch(shard)
        os.utime(cache.path(far.shards[shard].sha256), (shard, shard))
        assert used_bytes(tmp_path) <= cache.max_bytes
    left = {path.stem for path in tmp_path.rglob("*.tar")}
    assert far.shards[9].sha256 in left and far.shards[0].sha256 not in left
    assert all(far.read(row) == packed.read(row) for row in range(39, -1, -1))  # fetched again where it must be
    assert used_bytes(tmp_path) <= cache.max_bytes
    with pytest.raises(ValueError, match="is over the cap"):
        ShardCache(tmp_path / "small", max_bytes=100).fetch(
            join_url(URL, "shards", "tiny-000000.tar"), sha256="0" * 64, num_bytes=size
        )


def test_an_open_file_of_an_evicted_shard_is_closed(packed, uploaded, tmp_path):
    cache = ShardCache(tmp_path)
    far = ShardSet.open(URL, cache)
    far.read(0)
    cache.path(far.shards[0].sha256).unlink()
    far.read(4)
    assert list(far._files) == [1]


def test_content_that_is_another_is_refused(packed, uploaded, tmp_path):
    with uploaded.open("/sets/tiny/shards/tiny-000003.tar", "wb") as file:
        file.write(b"another upload")
    far = ShardSet.open(URL, ShardCache(tmp_path))
    with pytest.raises(ValueError, match=r"tiny-000003.tar: sha256 .* is not that of the manifest"):
        far.fetch(3)
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("*.tar"))


def test_what_is_missing_is_named(uploaded, tmp_path):
    with pytest.raises(ValueError, match=r"memory://sets/none/manifest.json does not exist"):
        ShardSet.open("memory://sets/none", ShardCache(tmp_path))
    with pytest.raises(ValueError, match="there is no shard cache"):
        ShardSet.open(URL)


def test_a_network_that_stutters_is_tried_again(uploaded, tmp_path, monkeypatch):
    failures = iter([ConnectionError("reset"), TimeoutError("slow")])
    real = remote._copy

    def copy(url, part, num_bytes):
        for error in failures:
            raise error
        return real(url, part, num_bytes)

    monkeypatch.setattr(remote, "_copy", copy)
    assert ShardSet.open(URL, ShardCache(tmp_path)).read(0)

    def refuse(url, part, num_bytes):
        raise ConnectionError("reset")

    monkeypatch.setattr(remote, "_copy", refuse)
    far = ShardSet.open(URL, ShardCache(tmp_path))
    with pytest.raises(remote.Unreachable, match="ConnectionError: reset .7 tries.; see whether"):
        far.fetch(5)


def test_one_download_for_many_readers(uploaded, tmp_path, monkeypatch):
    copied, real = [], remote._copy

    def copy(url, part, num_bytes):
        copied.append(url)
        time.sleep(0.05)
        return real(url, part, num_bytes)

    monkeypatch.setattr(remote, "_copy", copy)
    far = ShardSet.open(URL, ShardCache(tmp_path))
    copied.clear()
    with ThreadPoolExecutor(4) as pool:
        assert len({str(path) for path in pool.map(far.fetch, [2] * 4)}) == 1
    assert len(copied) == 1


def test_equal_shards_of_two_sets_are_kept_once_and_names_cannot_collide(packed, uploaded, tmp_path):
    uploaded.put(str(packed.folder) + "/", "/sets/copy/", recursive=True)
    cache = ShardCache(tmp_path)
    one, other = ShardSet.open(URL, cache), ShardSet.open("memory://sets/copy", cache)
    assert one.fetch(0) == other.fetch(0) != one.fetch(1)


@pytest.mark.parametrize("path", ["pipe:touch {ran}", "pipe://touch {ran}", "PIPE: touch {ran}"])
def test_commands_are_refused(path, tmp_path):
    """As a set, as a file of a set, and by all who ask whether a path is remote; nothing is run."""
    ran, cache = tmp_path / "ran", ShardCache(tmp_path)
    path = path.format(ran=ran)
    for ask in (is_remote, cache.read, cache.read_if_there, lambda path: ShardSet.open(path, cache), ShardSet.open):
        with pytest.raises(ValueError, match="would run a command, which is refused; give one of http.*or mount"):
            ask(path)
    with pytest.raises(ValueError, match="would run a command"):
        cache.fetch(path, sha256="0" * 64)
    assert not ran.exists()


def test_what_is_remote():
    assert (
        is_remote("s3://b/set")
        and is_remote("https://h/set")
        and is_remote("hf://datasets/o/n")
        and is_remote("gs://b")
    )
    assert not any(map(is_remote, ["/data/set", "shards/demo", "C:set", "a:b/c"]))
    with pytest.raises(ValueError, match="expected a folder, or one of http://"):
        is_remote("ftp://h/set")
    assert shown("https://user:secret@host/a?token=secret") == "https://host/a"
    assert join_url("https://h/a/?token=1", "shards", "x.tar") == "https://h/a/shards/x.tar?token=1"


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_over_http(packed, tmp_path):
    handler = functools.partial(_Handler, directory=str(packed.folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        far = ShardSet.open(url, ShardCache(tmp_path / "cache"))
        plan = make_plan(packed, tmp_path / "lengths", window_shards=2, world_size=1)
        near = take(Loader(packed, plan, FakeProcessor()), 5)
        for step, other in zip(near, take(Loader(far, plan, FakeProcessor(), workers=2), 5), strict=True):
            assert_equal_batches(step[0], other[0])
        with pytest.raises(ValueError, match="does not exist"):
            ShardSet.open(f"{url}/none", ShardCache(tmp_path / "cache"))
        server.shutdown()


def test_a_local_copy_and_the_remote_set_share_side_cars(packed, uploaded, tmp_path):
    copy = ShardSet.open(shutil.copytree(packed.folder, tmp_path / "copy"))
    far = ShardSet.open(URL, ShardCache(tmp_path / "cache"))
    assert [shard.sha256 for shard in copy.shards] == [shard.sha256 for shard in far.shards]


def test_token_counts_that_were_uploaded_are_not_counted_again(packed, uploaded, tmp_path):
    build_lengths(packed, FakeProcessor(), tmp_path / "here")
    uploaded.put(str(tmp_path / "here" / "lengths") + "/", "/sets/tiny/lengths/", recursive=True)
    far = ShardSet.open(URL, ShardCache(tmp_path / "cache"))
    assert build_lengths(far, FakeProcessor(), tmp_path / "there") == 0
    assert not list((tmp_path / "cache").rglob("*.tar")), "training may start with the first window"
    found = load_lengths(far, FakeProcessor(), tmp_path / "there")
    assert found.fingerprint == load_lengths(packed, FakeProcessor(), tmp_path / "here").fingerprint
    assert build_lengths(far, FakeProcessor("e" * 64), tmp_path / "other") == 40  # another tokenizer's are counted


@pytest.mark.parametrize("workers", [0, 1])
def test_disk_use_stays_under_the_cap_while_training(packed, uploaded, tmp_path, workers):
    """Ten shards in windows of two, room for five: an epoch reads them all and never holds more."""
    size = max(shard.bytes for shard in packed.shards)
    cache = ShardCache(tmp_path / "cache", max_bytes=5 * size)
    far = ShardSet.open(URL, cache)
    plan = make_plan(packed, tmp_path / "lengths", window_shards=2, world_size=1, global_batch_size=4)
    seen, near = [], take(Loader(packed, plan, FakeProcessor()), 10)
    for step, (_, micro_batches) in zip(near, Loader(far, plan, FakeProcessor(), workers=workers), strict=False):
        for left, right in zip(step, micro_batches, strict=True):
            assert_equal_batches(left, right)
        seen.append(used_bytes(tmp_path / "cache"))
    assert len(seen) == 10 and 0 < max(seen) <= cache.max_bytes


def test_nothing_is_renamed_or_added_while_another_lists_the_folder(uploaded, tmp_path, monkeypatch):
    """A list taken between two of these would hold what is gone, or miss what is there, and the cap with it."""
    cache, real, listing, listed = ShardCache(tmp_path), remote._copy, contextlib.ExitStack(), threading.Event()
    far = ShardSet.open(URL, cache)

    def copy(url, part, num_bytes):
        copied = real(url, part, num_bytes)
        if not listed.is_set():
            listing.enter_context(locked(tmp_path / "evict.lock"))
            listed.set()
        return copied

    monkeypatch.setattr(remote, "_copy", copy)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(far.fetch, 2)
        with listing:
            assert listed.wait(10)
            second = pool.submit(far.fetch, 3)
            time.sleep(0.2)
            assert not first.done() and not second.done()
            assert not list(tmp_path.rglob("*.tar")) and len(list(tmp_path.rglob("*.part"))) == 1
        assert [done.result().stat().st_size for done in (first, second)] == [far.shards[i].bytes for i in (2, 3)]


def test_a_cap_below_two_windows_is_refused(uploaded, tmp_path):
    with pytest.raises(ValueError, match="data.shard_cache_gb: 1e-05 GB, but two windows of 8 shards need"):
        ShardSet.open(URL, ShardCache(tmp_path, max_bytes=10_000)).check_cache()
    ShardSet.open(URL, ShardCache(tmp_path)).check_cache()


@pytest.fixture
def group_of_one(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group_of_one")
def test_a_held_out_set_may_be_remote(packed, uploaded, tmp_path):
    """It holds the same samples in the same order as its local copy, and is refused where it would not stay."""
    world = World(rank=0, size=1, device=torch.device("cpu"))

    def opened(path, cache=None):
        return open_held_out(
            path, FakeProcessor(), world, roles=("chosen", "rejected"), cache_dir=tmp_path / "side", num_samples=9,
            max_tokens=100, max_tokens_per_micro_batch=200, say=print, shard_cache=cache
        )  # fmt: skip

    near, far = opened(packed.folder), opened(URL, ShardCache(tmp_path / "cache"))
    assert list(near.groups) == list(far.groups) and len(near.groups) == 9
    for left, right in zip(take(Loader(near.shards, near.plan, FakeProcessor()), 1),
                           take(Loader(far.shards, far.plan, FakeProcessor()), 1), strict=True):  # fmt: skip
        for one, other in zip(left, right, strict=True):
            assert_equal_batches(one, other)
    assert list((tmp_path / "cache").rglob("*.tar"))
    opened(URL)
    assert list((tmp_path / "side" / "fetched").rglob("*.tar"))
    with pytest.raises(ValueError, match=r"data.shard_cache_gb: 1e-05 GB, but all of tiny need"):
        opened(URL, ShardCache(tmp_path / "small", max_bytes=10_000))
