"""launch/train_dpo.py with a wait at one place, for moments that are too short to be hit from outside.

PIVOT_TEST_WAIT names the place. A process that comes there says `waiting at PLACE`, once, and goes on after WAIT_S: a
test strikes within that time.
"""

from __future__ import annotations

import os
import pkgutil
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from launch import command
from pivot.config import Config
from pivot.system.process import leave

WAIT_S = 1.0
NEVER_S = 60.0  # for data that do not come: the start must end long before


class Place(NamedTuple):
    """What is called there, with which arguments, and whether it counts only once a step was made."""

    target: str
    with_these: Callable[..., bool] = lambda *arguments, **named: True
    later: bool = False
    wait_s: float = WAIT_S


def _renames_to(pattern: str) -> Callable[..., bool]:
    return lambda source, target, **named: re.fullmatch(pattern, Path(target).name) is not None


PLACES = {
    "weights load": Place("pivot.train.build_mllm"),
    "token counting": Place("pivot.data.lengths.count_tokens"),
    "scoring": Place("pivot.data.reference_cache.ReferenceCache._score"),
    "load": Place("torch.load", lambda path, *arguments, **named: "/checkpoints/step-" in str(path)),
    "step": Place("pivot.train.run_micro_batch", later=True),
    "save": Place("torch.save"),  # training calls it for checkpoints alone
    "rename": Place("os.replace", _renames_to(r"step-\d{8}")),  # the manifest is written
    "latest": Place("os.replace", _renames_to("latest")),  # the folder has its name
    "prune": Place("os.replace", _renames_to(r"step-\d{8}\.tmp")),  # an older one is about to go
    "evaluation": Place("pivot.evaluate.pairs._records", later=True),
    "generation": Place("pivot.evaluate.questions._answer", later=True),
    "data wait": Place("pivot.data.loader.Loader._next", later=True, wait_s=NEVER_S),
    "export": Place("pivot.train.Trainer._export"),
    "writing the export": Place("os.replace", _renames_to("config.json")),  # comes last
}


def train(config: Config, check_only: bool) -> int:
    """As launch/train_dpo.py, with the wait."""
    name = os.environ["PIVOT_TEST_WAIT"]
    place, steps, waited = PLACES[name], 0, False
    import pivot.train  # noqa: F401  # only here: signals are listened to by now, as in the script itself

    original, count_work = pkgutil.resolve_name(place.target), pkgutil.resolve_name("pivot.train.Trainer._count_work")

    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal waited
        if not waited and (steps or not place.later) and place.with_these(*arguments, **named):
            waited = True
            print(f"waiting at {name}", flush=True)
            time.sleep(place.wait_s)
        return original(*arguments, **named)

    def count(*arguments: Any) -> None:
        nonlocal steps
        count_work(*arguments)
        steps += 1

    with mock.patch(place.target, call), mock.patch("pivot.train.Trainer._count_work", count):
        return command.train(config, check_only)


if __name__ == "__main__":
    leave(command.main("dpo", sys.argv[1:], task=train))
