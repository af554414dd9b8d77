"""A foreign tar whose headers lie is one sentence, and takes neither memory nor time."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from data_tools.pack import PackOptions, pack

ROW = b'{"prompt": "What is it?", "chosen": "A cup.", "rejected": "A plate."}'
BLOCK = 512


def write_tar(path: Path, **pax: str) -> bytearray:
    """Three rows; the second one's header may carry pax records."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(3):
            entry = tarfile.TarInfo(f"{number}.json")
            entry.size = len(ROW)
            entry.pax_headers = pax if number == 1 else {}
            tar.addfile(entry, io.BytesIO(ROW))
    return bytearray(path.read_bytes())


def set_size(content: bytearray, field: bytes) -> bytes:
    """The tar with another size in the header of its second row, and that header's checksum."""
    header = content[2 * BLOCK : 3 * BLOCK]
    header[124:136] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(content[: 2 * BLOCK] + header + content[3 * BLOCK :])


FIELDS = {
    "base-256, huge": b"\x80" + (2**80).to_bytes(11, "big"),
    "base-256, below zero": b"\xff" * 10 + (-512 & 0xFFFF).to_bytes(2, "big"),
    "beyond the end": b"77777777777\0",
    "no number": b"abcdefghijk\0",
}


@pytest.mark.parametrize("case", FIELDS)
def test_a_size_that_is_not_that_of_its_member_is_told(tmp_path: Path, case: str) -> None:
    (tmp_path / "0.tar").write_bytes(set_size(write_tar(tmp_path / "0.tar"), FIELDS[case]))
    refuse(tmp_path)


@pytest.mark.parametrize("size", ["9" * 18, "-512", "9" * 40])
def test_a_pax_size_that_is_not_that_of_its_member_is_told(tmp_path: Path, size: str) -> None:
    write_tar(tmp_path / "0.tar", size=size)
    refuse(tmp_path)


@pytest.mark.parametrize("keep", [2 * BLOCK + 100, 3 * BLOCK + 20, 4 * BLOCK])
def test_a_cut_tar_is_told(tmp_path: Path, keep: int) -> None:
    (tmp_path / "0.tar").write_bytes(write_tar(tmp_path / "0.tar")[:keep])
    refuse(tmp_path)


def refuse(folder: Path) -> None:
    """One sentence that names the file, and less than 50 MB on the way to it."""
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"0\.tar .*(fetch the file again|fetch it again)$") as told:
        pack(PackOptions(source=folder / "0.tar", out=folder / "out"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(told.value) and peak < 50e6


@pytest.mark.parametrize("kind", ["x", "g", "L", "K"])
def test_a_header_of_gigabytes_is_not_read(tmp_path: Path, kind: str) -> None:
    """tarfile holds the body of such an entry at once; here it is really there, as a hole in the file."""
    content = bytearray(set_size(write_tar(tmp_path / "0.tar"), b"%011o\0" % (3 << 30)))
    content[2 * BLOCK + 156] = ord(kind)
    content = set_size(content, bytes(content[2 * BLOCK + 124 : 2 * BLOCK + 136]))
    (tmp_path / "0.tar").write_bytes(content)
    os.truncate(tmp_path / "0.tar", 4 << 30)
    refuse(tmp_path)


@pytest.mark.parametrize("content", [b"", gzip.compress(bytes(50_000_000))])
def test_a_file_that_is_no_tar_is_told(tmp_path: Path, content: bytes) -> None:
    """Nothing in it is unpacked: 50 kB of gzip may hold 50 MB, or any number more."""
    (tmp_path / "0.tar").write_bytes(content)
    refuse(tmp_path)
