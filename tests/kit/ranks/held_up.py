"""launch/train_dpo.py whose checkpoint of the step HELD_UP is never written: its thread waits in front of it."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from launch import command
from pivot.system.process import leave
from tests.kit.ranks.scenarios_saving import before_each_file


def wait(path: Path) -> None:
    if path.parent.name == f"step-{int(os.environ['HELD_UP']):08d}.tmp":
        time.sleep(600)


if __name__ == "__main__":
    with before_each_file(wait):
        code = command.main("dpo", sys.argv[1:])
    leave(code)
