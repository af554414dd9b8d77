"""A rank of `launch/train_dpo.py CONFIG` that hangs in a call: HANG="rank=1,kind=spin,call=2,at=pivot.FUNCTION"."""

from __future__ import annotations

import os
import pkgutil
import signal
import sys
import time
from typing import Any
from unittest import mock

from launch.command import main
from pivot.system.process import leave


def hang(kind: str) -> None:
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    while True:
        if kind == "sleep":
            time.sleep(1.0)


def run(config: str) -> int:
    told = dict(part.split("=", 1) for part in os.environ["HANG"].split(","))
    original, left = pkgutil.resolve_name(told["at"]), int(told["call"])

    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            hang(told["kind"])
        return original(*arguments, **named)

    if told["rank"] != os.environ["RANK"]:
        return main("dpo", [config])
    with mock.patch(told["at"], call):
        return main("dpo", [config])


if __name__ == "__main__":
    leave(run(sys.argv[1]))
