"""`simulate`: which samples every rank sees at every step, from the plan, or read by the loader's own processes."""

from __future__ import annotations

from typing import Any

from pivot.data.loader import Loader
from pivot.data.plan import Plan, StepPlan
from pivot.data.shards import ShardSet


def plan_ranks(plan: Plan, first_step: int, num_steps: int) -> list[list[list[int]]]:
    """[step][rank] -> rows, in the order in which the rank runs them."""
    last = num_steps + first_step
    steps = [plan.step(step) for step in range(first_step, last)]
    return [[[row for rows in rank for row in rows] for rank in step.micro_batches] for step in steps]


def load_ranks(
    shards: ShardSet, plan: Plan, processor: Any, first_step: int, num_steps: int, workers: int
) -> list[list[list[int]]]:
    """The same, as loaders with `workers` processes each deliver it, one rank after the other."""
    steps: list[list[list[int]]] = [[] for _ in range(num_steps)]
    for rank in range(plan.world_size):
        loader = Loader(shards, plan, processor, rank=rank, first_step=first_step, workers=workers)
        for rows_of_ranks, (_, micro_batches) in zip(steps, loader, strict=False):
            rows_of_ranks.append([int(row) for batch in micro_batches for row in batch.sample_index if row >= 0])
    return steps


def balance(steps: list[StepPlan]) -> float:
    """Time over work: the costliest rank's cost over the mean rank's, summed over the steps; 1 is perfect."""
    return sum(1 / step.balance for step in steps) / len(steps) if steps else 1.0


def sample_ids(shards: ShardSet, rows: set[int]) -> dict[int, str]:
    """row -> id of the sample."""
    return {row: str(shards.read_text(row).get("id")) for row in sorted(rows)}
