"""Hostile images, a full disk, two packs into one folder, a kill: a clear error or a counted drop, and no loss."""

import contextlib
import errno
import fcntl
import io
import json
import multiprocessing
import os
import resource
import shutil
import struct
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools import writer as writer_module
from data_tools.__main__ import main
from data_tools.pack import PackOptions, pack
from pivot.data.images import decode_rgb
from pivot.data.shards import ShardSet
from tests.kit.images import save, smooth
from tests.kit.packed import contents
from tests.kit.sets import image_bytes, make_rows, write_rows

ROOT = Path(__file__).resolve().parents[2]


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(width, height):
    """A PNG of this size that is a few hundred kilobytes: rows of zeros compress a thousandfold."""
    deflate = zlib.compressobj(9)
    row = b"\0" * (1 + 3 * width)
    rows = b"".join(deflate.compress(row) for _ in range(height)) + deflate.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return save(Image.fromarray(smooth(24, 16)), "JPEG", exif=exif)


def animated(format):
    frames = [Image.fromarray(np.full((8, 8, 3), level, dtype=np.uint8)) for level in (10, 250)]
    return save(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)


sixteen = Image.fromarray(np.full((8, 8), 0x8000, dtype=np.uint16))
KEPT = {  # name -> (file, expected size, mean level of the first pixel or None)
    "cmyk.jpg": (save(Image.fromarray(smooth(32, 24)).convert("CMYK"), "JPEG"), (32, 24), None),
    "palette.png": (save(Image.fromarray(smooth(32, 24)).convert("P")), (32, 24), None),
    "sixteen.png": (save(sixteen), (8, 8), 128),
    "clear.png": (save(Image.new("RGBA", (8, 8), (0, 0, 0, 0))), (8, 8), 255),
    "moving.webp": (animated("WEBP"), (8, 8), 10),
    "moving.png": (animated("PNG"), (8, 8), 10),
    "rotated.jpg": (rotated(), (16, 24), None),
    "wrong.jpg": (image_bytes(1, "PNG"), (12, 10), None),  # a PNG by another name
}
DROPPED = {
    "bomb.png": png_bomb(12_000, 12_000),
    "half.jpg": image_bytes(2, "JPEG", (200, 200))[:6000],
    "half.png": image_bytes(2)[:200],
    "page.jpg": b"<html>404</html>",
    "empty.png": b"",
}


def test_images_of_every_kind(tmp_path):
    files = {name: data for name, (data, _, _) in KEPT.items()} | DROPPED
    rows = [{"prompt": f"What is {name}?", "chosen": "A", "rejected": "B", "image": name} for name in files]
    before = cpu_seconds()
    result = pack(PackOptions(source=write_rows(tmp_path / "in", rows, files), out=tmp_path / "out", max_drop=0.5))
    assert result.tally.drops == {"undecodable image": len(DROPPED)}
    assert "the image (12000 x 12000) takes 1008 MB to decode" in json.dumps(result.tally.examples)
    shards = ShardSet.open(tmp_path / "out")
    assert len(shards) == len(KEPT)
    kept = {sample["images"][0]["origin"]: (sample, images) for sample, images in map(shards.read, range(len(KEPT)))}
    for name, (data, (width, height), level) in KEPT.items():
        sample, images = kept[name]
        assert images == [data], name  # the bytes are kept; the loader decodes them alike
        assert (sample["images"][0]["w"], sample["images"][0]["h"]) == (width, height), name
        rgb = decode_rgb(images[0])
        assert rgb.shape == (height, width, 3), name
        assert level is None or abs(int(rgb[0, 0].mean()) - level) <= 1, name
    assert kept["wrong.jpg"][0]["images"][0]["member"] == "png"
    assert main(["validate", str(tmp_path / "out"), "-q"]) == 0
    assert cpu_seconds() - before < 1.0  # 0.1 s; decoding the bomb alone takes 1.6


def cpu_seconds():
    """Of this process and its workers, whatever else the machine does."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


@pytest.fixture
def source(tmp_path):
    return write_rows(tmp_path / "source", *make_rows(24))


def fill_disk_at(monkeypatch, shard):
    """The write that would finish shard number `shard` finds no space."""
    real, count = writer_module._fsync, [0]

    def fsync(file):
        count[0] += str(file.name).endswith(".tar.part")
        if count[0] > shard:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file)

    monkeypatch.setattr(writer_module, "_fsync", fsync)


@pytest.mark.parametrize("shard", [0, 2])
def test_a_full_disk_loses_nothing(source, tmp_path, monkeypatch, capsys, shard):
    options = ["pack", str(source), "--samples-per-shard", "5", "--workers", "1"]
    with monkeypatch.context() as patched:
        fill_disk_at(patched, shard)
        assert main([*options, "--out", str(tmp_path / "set")]) == 3
        shown = capsys.readouterr().err
    assert f"no space is left on the disk of {tmp_path}/set" in shown and "it goes on" in shown
    assert not list((tmp_path / "set").rglob("*.part")), "the half-written shard keeps the disk full"
    assert len(list((tmp_path / "set" / "shards").glob("*.tar"))) == shard
    assert main([*options, "--out", str(tmp_path / "set"), "-q"]) == 0
    assert main([*options, "--out", str(tmp_path / "whole"), "-q"]) == 0
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_a_disk_that_is_really_full(tmp_path):
    """Small tmpfs under a set of 230 kB, mounted in a namespace of its own: that needs no root.

    The size decides which write fails, and whether the file keeps something in its buffer that fails again later.
    """
    small = tmp_path / "small"
    small.mkdir()
    namespaces = [command for command in (["unshare", "-rm"], ["unshare", "-m"]) if shutil.which("unshare")]
    mount = ["mount", "-t", "tmpfs", "none", str(small)]
    namespace = next((n for n in namespaces if not subprocess.run([*n, *mount], capture_output=True).returncode), None)
    if namespace is None:
        pytest.skip("no mounts here, not even in a namespace of one's own")
    names = [f"{i}.{('png', 'jpg')[i % 2]}" for i in range(20)]  # two shapes: two shards are open when the disk is full
    rows = [{"prompt": f"{name}?", "chosen": "A", "rejected": "B", "image": name} for name in names]
    images = {
        name: image_bytes(i, "JPEG" if name.endswith("jpg") else "PNG", size=(80, 60)) for i, name in enumerate(names)
    }
    source = write_rows(tmp_path / "in", rows, images)
    code = f"from {__name__} import fill_small_disks; fill_small_disks({str(source)!r}, {str(small)!r})"
    done = subprocess.run([*namespace, sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def fill_small_disks(source, small):
    command = ["pack", source, "--samples-per-shard", "4", "--workers", "1", "-q"]
    assert main([*command, "--out", f"{small}/whole"]) == 0
    for kilobytes in (116, 120, 124, 128):
        disk = Path(small, str(kilobytes))
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", disk], check=True)
        for _ in range(2):  # the second finds what the first finished, and a disk that is as small
            with contextlib.redirect_stderr(io.StringIO()) as shown:
                assert main([*command, "--out", f"{disk}/set"]) == 3, kilobytes
            assert f"no space is left on the disk of {disk}/set" in shown.getvalue(), shown.getvalue()
            assert not list(disk.rglob("*.part")), f"{kilobytes}: what was half written keeps the disk full"
            assert list(disk.rglob("shards/*.tar")), f"{kilobytes}: the finished shards are gone"
        subprocess.run(["mount", "-o", "remount,size=2m", disk], check=True)
        assert main([*command, "--out", f"{disk}/set"]) == 0
        assert contents(disk / "set") == contents(Path(small, "whole"))


@pytest.mark.parametrize("where", ["stat", "read_bytes"])
@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.EACCES, errno.ESTALE])
def test_an_image_that_cannot_be_read_is_no_missing_image(tmp_path, monkeypatch, capsys, number, where):
    """The pack stops, and when the disk answers again it goes on and ends as an unbroken one."""
    rows, images = make_rows(24)
    source = write_rows(tmp_path / "source", [*rows, rows[0] | {"id": "gone", "image": "none.png"}], images)
    options = ["pack", str(source), "--samples-per-shard", "5", "--workers", "1", "--max-drop", "0.1"]
    real = getattr(Path, where)

    def fail(path, **settings):
        if path.name == "17.png":
            raise OSError(number, os.strerror(number), str(path))
        return real(path, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(Path, where, fail)
        assert main([*options, "--out", str(tmp_path / "set")]) == 3
    shown = capsys.readouterr().err
    assert "source/r17: its image cannot be read" in shown and os.strerror(number) in shown and "17.png" in shown
    assert "run the same command again, it goes on" in shown
    assert list((tmp_path / "set" / "shards").glob("*.tar")) and not list((tmp_path / "set").rglob("*.part"))
    assert main([*options, "--out", str(tmp_path / "set"), "-q"]) == 0
    assert main([*options, "--out", str(tmp_path / "whole"), "-q"]) == 0
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")
    assert ShardSet.open(tmp_path / "set").manifest["drops"] == {"missing image": 1}


def test_a_worker_that_is_killed(tmp_path, monkeypatch, capsys):
    """As the kernel does when memory runs out: exit code 3, and the same command goes on."""
    rows, images = make_rows(300)
    source = write_rows(tmp_path / "source", rows, images)
    options = ["pack", str(source), "--samples-per-shard", "5", "--workers", "2"]

    def kill_workers(tally):
        if tally.rows == 20:
            for process in multiprocessing.active_children():
                process.kill()

    with monkeypatch.context() as patched:
        patched.setattr("data_tools.commands.pack.pack", lambda wanted, progress: pack(wanted, kill_workers))
        assert main([*options, "--out", str(tmp_path / "set")]) == 3
    shown = capsys.readouterr().err
    assert "a worker process died" in shown and "Run the same command again" in shown
    assert list((tmp_path / "set" / "shards").glob("*.tar")) and not list((tmp_path / "set").rglob("*.part"))
    assert main([*options, "--out", str(tmp_path / "set"), "-q"]) == 0
    assert main([*options, "--out", str(tmp_path / "whole"), "-q"]) == 0
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


LEFTOVERS = ("pack.json.999.part", "manifest.json.999.part", "stats.json.999.part")


def test_what_a_dead_process_was_writing_is_removed(source, tmp_path):
    """Killed before the first `pack.json` had its name, and again later; other files of a folder are not touched."""
    out = tmp_path / "set"
    out.mkdir()
    for name in LEFTOVERS:
        (out / name).write_text("half")
    pack(PackOptions(source=source, out=out))
    pack(PackOptions(source=source, out=tmp_path / "whole"))
    assert contents(out) == contents(tmp_path / "whole")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.json.7.part").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no pack"):
        pack(PackOptions(source=source, out=tmp_path / "notes"))
    assert (tmp_path / "notes" / "mine.json.7.part").exists()


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("harm", ["tar gone", "tar cut", "index gone"])
def test_a_shard_that_is_gone_is_missed(source, tmp_path, capsys, harm, finished, shuffle):
    """Neither a resume nor a repetition says that all is well; the file put back, both go on."""
    options = PackOptions(source=source, out=tmp_path / "set", samples_per_shard=5)
    command = ["pack", str(source), "--out", str(options.out), "--samples-per-shard", "5", "--workers", "1"]
    command += ["--shuffle"] if shuffle else []
    folder = tmp_path / "set-unshuffled" if shuffle and not finished else options.out

    def stop(tally):
        if tally.rows == 20:
            raise RuntimeError

    if finished:
        assert main([*command, "-q"]) == 0
    else:
        with pytest.raises(RuntimeError):
            pack(replace(options, out=folder), stop)
    path = min((folder / "shards").glob("*.tar") if "tar" in harm else (folder / "index").glob("*.idx"))
    before = path.read_bytes()
    if "gone" in harm:
        path.unlink()
    else:
        path.write_bytes(before[:-512])
    for extra in ([], ["--dry-run"]):
        assert main([*command, *extra]) == 2
        shown = capsys.readouterr().err
        found = "is not there" if "gone" in harm else f"has {len(before) - 512} bytes"
        assert f"{path} {found}, and was written with {len(before)}; put it back, or remove {folder} and" in shown
        assert (folder / "manifest.json").is_file() == finished
    path.write_bytes(before)
    assert main([*command, "-q"]) == 0
    assert main(["validate", str(options.out), "-q"]) == 0


def test_a_damaged_journal_is_named(source, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "pack.json").write_text('{"options": ')
    with pytest.raises(ValueError, match=r"set/pack.json is damaged .*; remove .*set and run the command again"):
        pack(PackOptions(source=source, out=tmp_path / "set"))


def test_two_packs_into_one_folder(source, tmp_path, capsys):
    out = tmp_path / "set"
    out.mkdir()
    with (out / "pack.lock").open("w") as lock:
        lock.write("process 77 on another")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["pack", str(source), "--out", str(out)]) == 2
        assert "is being written by process 77 on another; wait for it" in capsys.readouterr().err
    assert main(["pack", str(source), "--out", str(out), "-q"]) == 0  # whoever died holds no lock
    assert not (out / "pack.lock").exists()


def test_a_second_pack_while_the_first_runs(source, tmp_path):
    tried = []

    def try_too(tally):
        if tally.rows == 7:
            with pytest.raises(ValueError, match=rf"is being written by process {os.getpid()} on "):
                pack(PackOptions(source=source, out=tmp_path / "set", samples_per_shard=5))
            tried.append(True)

    assert pack(PackOptions(source=source, out=tmp_path / "set", samples_per_shard=5), try_too).complete and tried
    pack(PackOptions(source=source, out=tmp_path / "alone", samples_per_shard=5))
    assert contents(tmp_path / "set") == contents(tmp_path / "alone")


@pytest.mark.slow
def test_kill_and_go_on(source, tmp_path):
    """kill -9 in the middle, with workers; a second run ends as an unbroken one."""
    rows, images = make_rows(1500)
    images = dict.fromkeys(images, image_bytes(3))
    source = write_rows(tmp_path / "many", rows, images)
    command = [sys.executable, "-m", "data_tools", "pack", str(source), "--samples-per-shard", "50", "--workers", "2"]
    run = subprocess.Popen([*command, "--out", str(tmp_path / "cut")], cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "cut" / "shards").glob("*.tar"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    assert len(children) == 2
    run.kill()
    run.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(Path(f"/proc/{child}").exists() for child in children), "workers outlive their parent"
    assert not (tmp_path / "cut" / "manifest.json").exists()
    subprocess.run([*command, "--out", str(tmp_path / "cut"), "-q"], cwd=ROOT, check=True)
    pack(PackOptions(source=source, out=tmp_path / "whole", samples_per_shard=50))
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_paths_that_lead_out_cost_nothing_but_their_rows(tmp_path):
    """Absolute, relative and linked ways to a secret picture, devices and commands, each between two good rows."""
    rows, images = make_rows(16)
    write_rows(tmp_path / "in", rows, images)
    secret, ran = tmp_path / "secret" / "s.png", tmp_path / "ran"
    secret.parent.mkdir()
    secret.write_bytes(image_bytes(99))
    for name, target in {
        "link.png": secret,
        "folder": secret.parent,
        "zero.png": "/dev/zero",
        "loop": "loop",
        "dangling.png": "none.png",
    }.items():
        (tmp_path / "in" / name).symlink_to(target)
    os.mkfifo(tmp_path / "in" / "fifo.png")
    outside = [str(secret), "../secret/s.png", "link.png", "folder/s.png", "zero.png", "/etc/passwd"]
    missing = [
        "loop",
        "dangling.png",
        "fifo.png",
        ".",
        "1.png/x",
        "x" * 5000,
        "a\0b",
        f"pipe:touch {ran}",
        f"|touch {ran}",
    ]
    bad = [
        {"prompt": "?", "chosen": "A", "rejected": "B", "image": path} for path in [*outside, *missing, "\ud800.png"]
    ]
    mixed = [row for pair in zip(rows, bad, strict=True) for row in pair]
    result = pack(PackOptions(source=write_rows(tmp_path / "in", mixed), out=tmp_path / "out", max_drop=0.5, workers=2))
    dropped = {"path outside the roots": len(outside), "missing image": len(missing), "malformed row": 1}
    assert result.tally.drops == dropped
    assert not ran.exists()
    pack(PackOptions(source=write_rows(tmp_path / "in", rows), out=tmp_path / "good"))
    assert samples_of(tmp_path / "out") == samples_of(tmp_path / "good")


def samples_of(folder):
    shards = ShardSet.open(folder)
    return [shards.read(row) for row in range(len(shards))]


def test_urls_and_pickles_in_annotations(tmp_path):
    """`file://` and remote addresses are dropped, never fetched; a pickle named as the image is no image."""
    rows = [
        {"prompt": "What?", "chosen": "A", "rejected": "B", "image": path}
        for path in ("https://example.org/a.png", "file:///etc/hostname", "s3://b/a.png", "data:image/png,%89PNG")
    ]
    rows.append({"prompt": "What?", "chosen": "A", "rejected": "B", "image": "evil.png"})
    files = {"evil.png": b"cos\nsystem\n(S'touch run'\ntR."}
    rows.append({"prompt": "What?", "chosen": "A", "rejected": "B"})
    result = pack(PackOptions(source=write_rows(tmp_path / "in", rows, files), out=tmp_path / "out", max_drop=0.9))
    assert result.tally.drops == {"URL": 4, "undecodable image": 1} and result.num_samples == 1


def test_the_lock_of_a_folder_is_gone_after_an_error(source, tmp_path):
    pack(PackOptions(source=source, out=tmp_path / "set"))
    (tmp_path / "set" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="holds no pack"):
        pack(PackOptions(source=source, out=tmp_path / "set"))
    assert not (tmp_path / "set" / "pack.lock").exists()


def test_machine_errors_have_their_exit_code(tmp_path, capsys, monkeypatch):
    source = write_rows(tmp_path / "in", *make_rows(3))

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error", str(source))

    monkeypatch.setattr("data_tools.readers.files.load_json", fail)
    assert main(["pack", str(source), "--out", str(tmp_path / "x"), "--format", "llava_dpo"]) == 3
    assert "Input/output error" in capsys.readouterr().err


def test_output_of_a_command_is_one_document(source, tmp_path, capsys):
    out = tmp_path / "set"
    for command in (["pack", str(source), "--out", str(out)], ["info", str(out)], ["validate", str(out), "--fast"]):
        assert main([*command, "--json"]) == 0
        assert isinstance(json.loads(capsys.readouterr().out), dict)
    assert main(["info", str(out), "-q"]) == 0
    assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit) as stopped:
        main(["info"])
    assert stopped.value.code == 2
