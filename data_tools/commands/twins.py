from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from data_tools.arguments import count
from data_tools.console import Output
from data_tools.runs import RunData, count_tokens, num_uncounted, open_run
from pivot.objectives import objective_class


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("configs", type=Path, nargs=2, metavar="CONFIG", help="the YAMLs of two runs, say SFT and DPO")
    command.add_argument("--steps", type=count, default=100, help="how many to compare (%(default)s)")


def run(options: argparse.Namespace, output: Output) -> int:
    one, other = (open_run(config, []) for config in options.configs)
    if options.dry_run:
        missing = [num_uncounted(*run.countable, output) for run in (one, other)]
        if any(missing):
            output.result({"missing": missing})
            return 0
    for run in (one, other):
        count_tokens(*run.countable, output, options.workers)
    plans = one.plan(1), other.plan(1)
    differing = [
        f"{name}: {plans[0].parts.get(name)} and {plans[1].parts.get(name)}"
        for name in {**plans[0].parts, **plans[1].parts}
        if plans[0].parts.get(name) != plans[1].parts.get(name)
    ]
    if plans[0].global_batch_size != plans[1].global_batch_size:
        differing.append(f"train.global_batch_size: {plans[0].global_batch_size} and {plans[1].global_batch_size}")
    first = None if differing else _first_other_step(plans[0].step_ids, plans[1].step_ids, options.steps)
    same = not differing and first is None
    for text in differing:
        output.error(text)
    output.table(("", *(str(config) for config in options.configs)), _facts(one, other))
    if same:
        output.say(f"twins: the same ids in the same order at each of the first {options.steps} steps")
    elif first is not None:
        output.error(f"the ids differ from step {first} on")
    output.result({"twins": same, "steps": options.steps, "differing": differing, "first_other_step": first})
    return 0 if same else 1


def _first_other_step(left: object, right: object, steps: int) -> int | None:
    for step in range(steps):
        if not np.array_equal(left(step), right(step)):  # type: ignore[operator]
            return step
    return None


def _facts(one: RunData, other: RunData) -> list[tuple[str, ...]]:
    plans = one.plan(1), other.plan(1)
    runs = (one, other)
    return [
        ("objective", *(objective_class(run.config.objective).name for run in runs)),
        ("pairs an epoch", *(f"{plan.num_pairs:,}" for plan in plans)),
        ("steps an epoch", *(f"{plan.steps_per_epoch:.2f}" for plan in plans)),
        ("seed", *(str(run.config.train.seed) for run in runs)),
        ("plan", *(plan.fingerprint[:16] for plan in plans)),
        ("init_from", *(str(run.config.init_from) for run in runs)),
    ]
