"""A `wandb` that needs no network: what pivot calls of it, written down; and a server that remembers runs in a file.

`install(folder)` puts it where `import wandb` finds it. WANDB_FAKE says what goes wrong: unreachable, hangs, breaks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MODULE = """
import json, os, time
from pathlib import Path

HERE = Path(__file__).parent
FAULT = os.environ.get("WANDB_FAKE", "")
_in_use = False


def _note(call, **facts):
    with (HERE / "calls.jsonl").open("a") as file:
        file.write(json.dumps({"call": call, **facts}) + "\\n")


class Settings:
    def __init__(self, *, console, disable_git, save_code, silent, init_timeout):
        self.init_timeout = init_timeout


class Run:
    def __init__(self, file, url):
        self._file, self.url = file, url
        self.resumed = file is not None and file.is_file()
        self.step = 1 + json.loads(file.read_text())[-1] if self.resumed else 0
        self.summary = self

    def log(self, data, step=None):
        if FAULT == "breaks":
            raise OSError("the socket is gone")
        _note("log", step=step, data=data)
        if self._file is not None:
            steps = json.loads(self._file.read_text()) if self._file.is_file() else []
            assert not steps or step >= steps[-1], "W&B drops a step that is behind its last"
            self._file.write_text(json.dumps([*steps, step]))

    def update(self, data):
        _note("summary", data=data)

    def finish(self, exit_code=None):
        _note("finish", exit_code=exit_code)


def init(project=None, dir=None, id=None, name=None, config=None, mode=None, resume=None, settings=None):
    global _in_use
    assert not _in_use, "run ID is in use"
    _in_use = True
    _note("init", project=project, dir=dir, id=id, name=name, config=config, mode=mode, resume=resume)
    if FAULT == "hangs":
        time.sleep(1000)
    if FAULT == "unreachable" and mode == "online":
        raise ConnectionError("nobody answers\\nat https://api")
    online = mode == "online"
    return Run(HERE / f"server-{id}.json" if online and resume == "allow" else None, f"https://wandb/{id}")


def teardown():
    global _in_use
    _in_use = False
"""


def install(folder: Path) -> Path:
    """The folder to put on PYTHONPATH; what was called lies in calls.jsonl there."""
    (folder / "wandb").mkdir(parents=True)
    (folder / "wandb" / "__init__.py").write_text(MODULE)
    return folder


def calls(folder: Path, kind: str) -> list[dict[str, Any]]:
    path = folder / "wandb" / "calls.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [row for row in rows if row["call"] == kind]
