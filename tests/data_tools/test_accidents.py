"""Hostile images, a full disk, two packs into one folder, a kill: a clear error or a counted drop, and no loss."""

import errno
import fcntl
import json
import os
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools import writer as writer_module
from data_tools.__main__ import main
from data_tools.pack import PackOptions, pack
from pivot.data.images import decode_rgb
from pivot.data.shards import ShardSet
from tests.data.fakes import image_bytes, make_rows, write_rows
from tests.data.test_images import save, smooth
from tests.data_tools.test_pack import contents

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
    "moving.gif": animated("GIF"),
    "page.jpg": b"<html>404</html>",
    "empty.png": b"",
}


def test_images_of_every_kind(tmp_path):
    files = {name: data for name, (data, _, _) in KEPT.items()} | DROPPED
    rows = [{"prompt": f"What is {name}?", "chosen": "A", "rejected": "B", "image": name} for name in files]
    started = time.monotonic()
    result = pack(PackOptions(source=write_rows(tmp_path / "in", rows, files), out=tmp_path / "out", max_drop=0.5))
    assert result.tally.drops == {"undecodable image": len(DROPPED)}
    assert "12000 x 12000, more than 80000000 pixels" in json.dumps(result.tally.examples)
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
    assert time.monotonic() - started < 20  # the bomb was not decoded


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


@pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/bin/mount"), reason="mounting needs root")
def test_a_disk_that_is_really_full(tmp_path, capsys):
    """A tmpfs of 64 kB under a set of 150 kB."""
    rows = [{"prompt": f"{i}?", "chosen": "A", "rejected": "B", "image": f"{i}.png"} for i in range(10)]
    images = {f"{i}.png": image_bytes(i, size=(80, 60)) for i in range(10)}
    source = write_rows(tmp_path / "in", rows, images)
    small = tmp_path / "small"
    small.mkdir()
    command = ["pack", str(source), "--out", str(small / "set"), "--samples-per-shard", "2", "--workers", "1"]
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(small)], capture_output=True).returncode:
        pytest.skip("no mounts here")
    try:
        assert main(command) == 3
        assert "no space is left" in capsys.readouterr().err
        subprocess.run(["mount", "-o", "remount,size=1m", str(small)], check=True)
        assert main([*command, "-q"]) == 0
        assert main(["validate", str(small / "set"), "-q"]) == 0
    finally:
        subprocess.run(["umount", str(small)], check=True)


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


def test_urls_and_pickles_in_annotations(tmp_path):
    """`file://` and remote addresses are dropped, never fetched; a pickle named as the image is no image."""
    rows = [
        {"prompt": "What?", "chosen": "A", "rejected": "B", "image": path}
        for path in ("https://example.org/a.png", "file:///etc/hostname", "s3://b/a.png", "data:image/png;base64,AAAA")
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

    monkeypatch.setattr("data_tools.readers.rows._json", fail)
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
