"""A file is whole or not there, also when writing it fails."""

import errno
import os

import pytest

from pivot.system.files import UNFINISHED, filling, read_json_lines, write_atomically


@pytest.mark.parametrize("step", ["fsync", "rename"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "new" / "a.json"
    write_atomically(path, "old")

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(*(("os.fsync", fail) if step == "fsync" else ("pathlib.Path.replace", fail)))
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, b"new")
    assert [file.name for file in path.parent.iterdir()] == ["a.json"] and path.read_text() == "old"
    write_atomically(path, b"new")
    assert path.read_text() == "new"


NAMES = ["config.json", "tower/config.json", "tower/weights", "weights"]


class Killed(BaseException):
    """Nothing behind it runs, as behind a SIGKILL."""


def fill(folder, text):
    with filling(folder, last=("config.json", "parts.json")) as part:
        (part / "tower").mkdir()
        for name in NAMES:
            (part / name).write_text(text)


def read_all(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("moved", range(len(NAMES)))
def test_a_folder_that_is_half_written_is_known_by_nothing(tmp_path, monkeypatch, moved):
    """Killed before each of the four files moves: no config.json where the folder is not whole, and `own` stays."""
    folder, left, replace = tmp_path / "model", [None] * moved, os.replace
    fill(folder, "old")
    (folder / "own").write_text("own")
    (folder / "parts.json").write_text("of another form")

    def stop(source, target):
        if not left:
            raise Killed
        left.pop()
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", stop)
        with pytest.raises(Killed):
            fill(folder, "new")
    assert not {"config.json", "parts.json"} & {path.name for path in folder.iterdir()}
    assert (folder / UNFINISHED).is_dir()
    fill(folder, "new")
    assert read_all(folder) == dict.fromkeys(NAMES, "new") | {"own": "own"}
    assert not (folder / UNFINISHED).exists()


def test_a_failure_leaves_the_folder_as_it_was(tmp_path):
    fill(tmp_path / "model", "old")
    with pytest.raises(OSError, match="full"), filling(tmp_path / "model", last=()) as part:
        (part / "weights").write_text("ne")
        raise OSError("full")
    assert read_all(tmp_path / "model") == dict.fromkeys(NAMES, "old")


def test_a_line_counts_when_it_is_an_object(tmp_path):
    """Foreign lines are None and stay in their places with their bytes; U+2028 inside a text ends no line."""
    lines = [b'{"step": 1}\n', b"[1]\n", b"\n", b"\xff\xfe\n", b'{"a": NaN}\n', b"[" * 5000 + b"\n"]
    lines += ['{"text": "one\u2028two"}\r\n'.encode(), b'{"step": 2}\n', b'{"step": 3}']
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"".join(lines))
    read = list(read_json_lines(path))
    assert [line for line, _ in read] == lines
    none = [None] * 5
    assert [row for _, row in read] == [{"step": 1}, *none, {"text": "one\u2028two"}, {"step": 2}, {"step": 3}]


@pytest.mark.parametrize("length", range(1, 13))
def test_a_cut_line_is_none_wherever_it_was_cut(tmp_path, length):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n' + b'{"step": 12}'[:length])
    _, (_, row) = read_json_lines(path)
    assert row == ({"step": 12} if length == 12 else None)


def test_a_file_that_is_not_there_has_no_lines(tmp_path):
    assert list(read_json_lines(tmp_path / "log.jsonl")) == []
