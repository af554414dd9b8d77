"""Copies of what is saved, and the thread that writes them: the bytes that torch.save would have written, no later."""

from __future__ import annotations

import errno
import hashlib
import io
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pivot.run import writing
from pivot.run.writing import HostCopy, Writer, write_file


@dataclass
class Held:
    """A tensor where no container is looked through by hand."""

    tensor: Tensor


def everything() -> dict[str, Any]:
    """Views of one buffer, gaps between them, parameters, empty tensors, one tensor twice, classes of their own."""
    flat = torch.arange(24, dtype=torch.float32)
    module = OrderedDict(first=flat[2:8].view(2, 3), second=flat[10:20:2])
    module._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]  # as nn.Module.state_dict leaves it
    twice = torch.randn(3).to(torch.bfloat16)
    marked = torch.zeros(3)
    marked.mark = {"id": 4, "other": torch.ones(2)}  # type: ignore[attr-defined]  # as DeepSpeed marks its masters
    return {
        "marked": marked,
        "module": module,
        "master": torch.randn(5).requires_grad_(),
        "parameter": nn.Parameter(torch.randn(2, 2)),
        "empty": [torch.empty(0), torch.empty(0, 3)],
        "twice": (twice, twice, torch.Size([3, 4])),
        "held": Held(torch.tensor(7.0)),
        "step": 3,
        "text": {"a": "b"},
    }


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def test_a_copy_is_saved_as_the_value_was(tmp_path: Path) -> None:
    value = everything()
    expected = saved(value)
    copy = HostCopy(value)
    for tensor in (
        value["module"]["first"],
        value["master"].data,
        value["twice"][0],
        value["held"].tensor,
        value["marked"].mark["other"],
    ):
        tensor.fill_(-1)
    value["text"]["a"] = "c"
    assert saved(copy.take()) == expected
    assert saved(value) != expected


def test_shared_memory_is_copied_once() -> None:
    """Ten views of 4 MB are 4 MB, as in the file."""
    flat = torch.zeros(2**20)
    copies = HostCopy([flat[i * 1000 : (i + 1) * 1000] for i in range(10)]).take()
    assert len({copy.untyped_storage().data_ptr() for copy in copies}) == 1
    assert copies[0].untyped_storage().nbytes() == 2**22


def test_a_file_s_hash_is_that_of_what_is_on_the_disk(tmp_path: Path) -> None:
    for value in (everything(), b"{}"):
        told = write_file(value, tmp_path / "a.pt", threading.Event())
        content = (tmp_path / "a.pt").read_bytes()
        assert told == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The thread writes nothing before it is set."""
    gate, write = threading.Event(), write_file

    def slow(value: Any, path: Path, stopped: threading.Event) -> dict[str, Any]:
        if threading.current_thread().name == "checkpoint":
            assert gate.wait(30)
        return write(value, path, stopped)

    monkeypatch.setattr(writing, "write_file", slow)
    return gate


def test_the_thread_writes_what_was_handed_over(tmp_path: Path, gate: threading.Event) -> None:
    value, expected = everything(), {}
    for name in ("a.pt", "b.pt"):
        expected[name] = write_file(value, tmp_path / name, threading.Event())
        (tmp_path / name).unlink()
    writer = Writer(tmp_path, in_background=True)
    for name in expected:
        writer.write(value, tmp_path / name)
    writer.start()
    value["module"]["first"].fill_(-1)
    assert not writer.is_done and not list(tmp_path.iterdir())
    gate.set()
    writer.wait()
    assert writer.is_done and writer.files == expected and writer.write_s > 0


def test_at_once_nothing_is_left_to_wait_for(tmp_path: Path) -> None:
    writer = Writer(tmp_path, in_background=False)
    writer.write(everything(), tmp_path / "a.pt")
    assert (tmp_path / "a.pt").is_file() and set(writer.files) == {"a.pt"}
    writer.start()
    assert writer.is_done
    writer.wait()


@pytest.mark.parametrize("in_background", [False, True])
def test_a_full_disk_is_told_by_wait_alone(tmp_path: Path, in_background: bool) -> None:
    """By its number and the file's name, whatever torch.save makes of it; behind it nothing is written."""
    (tmp_path / "a.pt").symlink_to("/dev/full")
    writer = Writer(tmp_path, in_background=in_background)
    for name in ("a.pt", "b.pt"):
        writer.write(everything() | {"large": torch.zeros(2**20)}, tmp_path / name)
    writer.start()
    with pytest.raises(OSError, match="No space left on device") as found:
        writer.wait()
    assert found.value.errno == errno.ENOSPC and found.value.filename == str(tmp_path / "a.pt")
    assert writer.is_done and not (tmp_path / "b.pt").exists() and not writer.files


@pytest.mark.parametrize("num_writes", range(8))
def test_the_disk_s_error_is_told_not_torch_save_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_writes: int
) -> None:
    """Which mostly raises "unexpected pos 30 vs 0" behind it (torch 2.14.1)."""

    class Full(io.BytesIO):
        written = 0

        def write(self, content: Any) -> int:
            self.written += 1
            if self.written > num_writes:
                raise OSError(errno.EIO, "Input/output error")
            return super().write(content)

    monkeypatch.setattr(Path, "open", lambda path, mode: Full())
    with pytest.raises(OSError, match="Input/output error") as found:
        write_file([torch.zeros(10)], tmp_path / "a.pt", threading.Event())
    assert found.value.filename == str(tmp_path / "a.pt")


def test_an_abandoned_thread_ends_between_two_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing._HashedFile, "flush", lambda file: time.sleep(0.01))
    original, entered = writing._HashedFile.write, threading.Event()

    def slow(file: Any, content: bytes) -> int:
        entered.set()
        time.sleep(0.05)
        return original(file, content)

    monkeypatch.setattr(writing._HashedFile, "write", slow)
    writer = Writer(tmp_path, in_background=True)
    for number in range(100):
        writer.write([torch.zeros(10) for _ in range(100)], tmp_path / f"{number}.pt")
    writer.start()
    assert entered.wait(30)
    started = time.monotonic()
    writer.abandon()
    assert writer.is_done and time.monotonic() - started < 5
    with pytest.raises(RuntimeError, match="the run ended before its checkpoint was written"):
        writer.wait()
