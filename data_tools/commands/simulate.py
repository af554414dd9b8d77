from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from data_tools.arguments import count, seed, whole_number
from data_tools.console import Output
from data_tools.copying import open_sets
from data_tools.letters import LetterProcessor, letter_lengths
from data_tools.runs import RunData, count_tokens, num_uncounted, open_run, read_overrides
from data_tools.simulate import balance, load_ranks, plan_ranks, sample_ids
from pivot.data.plan import Plan, PlanSettings
from pivot.data.samples import ROLES_OF_KIND, UNPAIRED
from pivot.data.shards import ShardSet

UNLIMITED = 1 << 62


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", nargs="?", metavar="DIR", help="a packed set; or --config")
    command.add_argument("--config", type=Path, help="a run's YAML: its data, tokens and limits, exactly")
    command.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="settings over --config")
    command.add_argument("--world-size", type=count, default=1, help="ranks (%(default)s)")
    command.add_argument("--steps", type=count, default=10, help="how many (%(default)s)")
    command.add_argument("--first-step", type=whole_number(0), default=0, help="where to start, as a resumed run does")
    command.add_argument("--global-batch-size", type=count, help="pairs per step (256, or the config's)")
    command.add_argument("--seed", type=seed, help="0, or the config's")
    command.add_argument("--max-tokens-per-micro-batch", type=count, help="of --config; else rows are not cut")
    command.add_argument("--real", action="store_true", help="read through the loader's processes (--workers of them)")


def run(options: argparse.Namespace, output: Output) -> int:
    overrides = read_overrides(options)
    if options.config is None:
        shards, plan, processor = _from_folder(options)
    else:
        data = _open_config(options, overrides)
        if options.dry_run and (missing := num_uncounted(*data.countable, output)):
            output.result({"missing": missing})
            return 0
        count_tokens(*data.countable, output, options.workers)
        shards, plan, processor = data.shards, data.plan(options.world_size), data.processor
    if options.real:
        ranks = load_ranks(shards, plan, processor, options.first_step, options.steps, options.workers)
    else:
        ranks = plan_ranks(plan, options.first_step, options.steps)
    steps = [plan.step(options.first_step + number) for number in range(len(ranks))]
    ids = sample_ids(shards, {row for step in ranks for rank in step for row in rank})
    document = {
        "balance": balance(steps),
        "steps_per_epoch": plan.steps_per_epoch,
        "steps": [
            {"step": step.step, "ranks": [[ids[row] for row in rank] for rank in rows_of_ranks]}
            for step, rows_of_ranks in zip(steps, ranks, strict=True)
        ],
    }
    output.result(document)
    _show(document, plan, output)
    return 0


def _from_folder(options: argparse.Namespace) -> tuple[ShardSet, Plan, Any]:
    if options.folder is None:
        raise ValueError("name a packed set, or a run's YAML with --config")
    shards = open_sets([options.folder])
    settings = PlanSettings(
        fingerprint=shards.fingerprint,
        shard_sizes=shards.shard_sizes,
        lengths=letter_lengths(shards),
        seed=options.seed or 0,
        global_batch_size=options.global_batch_size or 256,
        max_tokens=UNLIMITED,
        max_tokens_per_micro_batch=options.max_tokens_per_micro_batch or UNLIMITED,
        world_size=options.world_size,
        roles=ROLES_OF_KIND[shards.kind],
        single_answers=shards.kind == UNPAIRED,
        describe=shards.describe,
    )
    plan = Plan(settings)
    return shards, plan, LetterProcessor()


def _open_config(options: argparse.Namespace, overrides: list[str]) -> RunData:
    given = {
        "train.global_batch_size": options.global_batch_size,
        "train.seed": options.seed,
        "train.max_tokens_per_micro_batch": options.max_tokens_per_micro_batch,
    }
    return open_run(
        options.config, [*overrides, *(f"{key}={value}" for key, value in given.items() if value is not None)]
    )


def _show(document: dict[str, Any], plan: Plan, output: Output) -> None:
    output.say(
        f"{plan.num_pairs:,} pairs an epoch, {plan.steps_per_epoch:.2f} steps of {plan.global_batch_size} pairs on "
        f"{plan.world_size} ranks; costliest over mean rank {document['balance']:.3f}"
    )
    rows = [
        (step["step"], rank, len(ids), ", ".join(ids[:4]) + (", ..." if len(ids) > 4 else ""))
        for step in document["steps"]
        for rank, ids in enumerate(step["ranks"])
    ]
    output.table(("step", "rank", "pairs", "ids"), rows)
