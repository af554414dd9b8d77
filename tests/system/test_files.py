"""A file is whole or not there, also when writing it fails."""

import errno
import os

import pytest

from pivot.system.files import write_atomically


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
