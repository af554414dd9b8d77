"""Which samples a step holds, and which rank runs which of them: integers computed alike on every rank.

The order (order.py) is a pure function of (data fingerprint, lengths, seed, position), so a resume is a jump, and
world size, workers, objective and micro-batch budget cannot change which ids a step holds. Step t is positions
[t * global_batch_size, (t + 1) * global_batch_size) of an endless stream of epochs; a step may straddle the border of
two.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pivot.batch import (
    ANSWER,
    CHOSEN,
    CHOSEN_ANSWER,
    CHOSEN_TOKEN,
    REJECTED,
    REJECTED_ANSWER,
    SAMPLE,
    TARGET_TOKEN,
    StepCounts,
)
from pivot.data.dealing import cut, deal
from pivot.data.lengths import Lengths
from pivot.data.order import ORDER_VERSION, EpochOrder, MixtureOrder, MixtureSource
from pivot.data.units import Costs, Work

STATE_FORMAT = 1
PLAIN_COSTS = Costs()  # a token is a token


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step, the same on every rank."""

    step: int
    ids: np.ndarray  # int64[global_batch_size]: rows of the data set, in the order of the stream
    micro_batches: list[list[list[int]]]  # [rank][micro-batch] -> rows; an empty list is a weight-0 dummy
    counts: StepCounts  # planned, over all ranks
    balance: float  # mean over maximum of the ranks' costs; 1 is perfect
    cost: float  # over all ranks, in the unit of `Costs`
    num_tokens: int  # of all rows
    num_units: int  # trees, over all ranks

    @property
    def num_micro_batches(self) -> int:
        """Per rank, equal on all of them."""
        return len(self.micro_batches[0])


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What decides a plan: the data, its order, and how a step is cut and dealt."""

    fingerprint: str  # of the data set
    shard_sizes: Sequence[int]  # samples of each shard
    lengths: Lengths
    seed: int
    global_batch_size: int
    max_tokens: int  # of a pair; longer ones are excluded
    max_tokens_per_micro_batch: int
    world_size: int
    roles: tuple[str, ...]  # the completions that are scored
    single_answers: bool = False  # a sample need not have both of a pair: the objective takes each answer by itself
    costs: Costs = PLAIN_COSTS
    window_shards: int | None = None  # shards that the order draws from at a time; None: all of them
    mixture: Sequence[MixtureSource] | None = None
    excluded: np.ndarray | None = None  # bool[rows]: what an exclude list names
    # Ends the stream after so many positions, for evaluation and for visiting each pair once; the last step may then
    # hold fewer pairs.
    limit: int | None = None
    image_trees: bool = False  # the pairs of one image follow each other in the order and share a row's image
    describe: Callable[[int], str] = "row {}".format  # names a row in messages


class Plan:
    """The steps of a run over one data set, or over a `mixture` of the sets that it joins.

    Raises ValueError when nothing is kept, when `roles` asks for completions that samples lack, and when the longest
    kept pair is over the micro-batch budget.
    """

    def __init__(self, settings: PlanSettings) -> None:
        lengths, excluded = settings.lengths, settings.excluded
        assert sum(settings.shard_sizes) == len(lengths), "lengths of another data set"
        self.settings, self.lengths, self.roles, self.limit = settings, lengths, settings.roles, settings.limit
        self.global_batch_size, self.world_size = settings.global_batch_size, settings.world_size
        # bool[rows], reason -> count
        self.kept, self.exclusions = _exclude(lengths, settings.max_tokens, excluded, settings.single_answers)
        self.parts = self._name_parts()
        if not self.kept.any():
            raise ValueError(f"no sample is left to train on; excluded: {self.exclusions}")
        if REJECTED in self.roles and not settings.single_answers and not lengths.rejected[self.kept].all():
            row = int(np.flatnonzero(self.kept & (lengths.rejected == 0))[0])
            raise ValueError(f"{settings.describe(row)} has no rejected completion; a preference objective needs pairs")
        groups = lengths.image_groups() if settings.image_trees else None
        self._work = Work(lengths, self.roles, settings.costs, groups)
        self._check_budget()
        self._order: EpochOrder | MixtureOrder
        order = (self.kept, settings.seed, settings.window_shards, groups)
        if settings.mixture:
            assert sum(source.samples for source in settings.mixture) == len(lengths), "lengths of another mixture"
            self._order = MixtureOrder(settings.mixture, *order)
        else:
            self._order = EpochOrder(settings.fingerprint, settings.shard_sizes, *order)
        self.num_pairs = self._order.num_rows  # of one epoch; a mixture may repeat rows or leave some for the next

    def _name_parts(self) -> dict[str, Any]:
        """What decides the order, by name: a resume tells from it what has changed."""
        settings = self.settings
        parts: dict[str, Any] = {
            "data": settings.fingerprint[:16],
            "lengths": settings.lengths.fingerprint[:16],
            "seed": settings.seed,
            "data.max_tokens": settings.max_tokens,
            "window_shards": settings.window_shards,
            "order_version": ORDER_VERSION,
        }
        if settings.image_trees:
            parts["data.image_trees"] = True
        if settings.mixture:
            parts["mixture"] = [source.facts() for source in settings.mixture]
        if settings.excluded is not None and settings.excluded.any():
            packed = np.packbits(settings.excluded).tobytes()
            parts["data.exclude"] = hashlib.sha256(packed).hexdigest()[:16]
        return parts

    def another(self, **changes: Any) -> Plan:
        """Another walk over the same data; `changes` are fields of PlanSettings."""
        return Plan(replace(self.settings, **changes))

    @property
    def fingerprint(self) -> str:
        """Covers all that decides the order; not the world size, the budget or the workers."""
        return hashlib.sha256(json.dumps(self.parts, sort_keys=True).encode()).hexdigest()

    @property
    def num_with_images(self) -> int:
        """How many of the samples that the plan keeps show an image."""
        return int((self.lengths.image[self.kept] > 0).sum())

    @property
    def steps_per_epoch(self) -> float:
        return self.num_pairs / self.global_batch_size

    @property
    def num_steps(self) -> int | None:
        """Steps until `limit`, or None for an endless stream."""
        return None if self.limit is None else -(-self.limit // self.global_batch_size)

    def step_ids(self, step: int) -> np.ndarray:
        """int64[global_batch_size]: the rows of a step."""
        first = step * self.global_batch_size
        last = first + self.global_batch_size
        return self._order.rows(first, (last if self.limit is None else min(last, self.limit)) - first)

    def step(self, step: int) -> StepPlan:
        """The step dealt to ranks by cost and cut into micro-batches, equally many on every rank."""
        ids, budget = self.step_ids(step), self.settings.max_tokens_per_micro_batch
        units = self._work.units(ids, max_tokens=budget, num_shares=self.world_size)
        costs, tokens = [unit.cost for unit in units], [unit.tokens for unit in units]
        shares = deal(costs, self.world_size)
        rows = cut(shares, costs, tokens, budget)
        loads = [sum(costs[unit] for row in rank for unit in row) for rank in rows]
        return StepPlan(
            step=step,
            ids=ids,
            micro_batches=[
                [[int(ids[place]) for unit in row for place in units[unit].places] for row in rank] for rank in rows
            ],
            counts=self._counts(ids),
            balance=sum(loads) / (len(loads) * max(loads)) if max(loads) > 0 else 1.0,
            cost=sum(loads),
            num_tokens=sum(tokens),
            num_units=len(units),
        )

    def _counts(self, ids: np.ndarray) -> StepCounts:
        lengths = self.lengths
        chosen, rejected = (
            int(np.count_nonzero(getattr(lengths, role)[ids])) if role in self.roles else 0
            for role in (CHOSEN, REJECTED)
        )
        return StepCounts(
            {
                SAMPLE: len(ids),
                CHOSEN_TOKEN: int(lengths.chosen[ids].sum()),
                TARGET_TOKEN: int(lengths.completion_tokens(self.roles)[ids].sum()),
                CHOSEN_ANSWER: chosen,
                REJECTED_ANSWER: rejected,
                ANSWER: chosen + rejected,
            }
        )

    def state(self, steps: int, masked: int) -> dict[str, Any]:
        """Where a run stands after `steps` steps, for its checkpoint."""
        pairs = steps * self.global_batch_size
        position = {"epoch": pairs // self.num_pairs, "pairs": pairs, "steps": steps, "masked": masked}
        plan = {"plan_fp": self.fingerprint, "seed": self.settings.seed, "plan": self.parts}
        return {"format": STATE_FORMAT, **plan, **position}

    def check_state(self, state: dict[str, Any]) -> int:
        """The first step of a run that resumes from `state`. Raises ValueError, naming what changed."""
        if state.get("format") != STATE_FORMAT:
            raise ValueError(f"the checkpoint's data state has format {state.get('format')}, expected {STATE_FORMAT}")
        before: dict[str, Any] = state["plan"]
        changed = [
            f"{name} was {before.get(name)}, is {self.parts.get(name)}"
            for name in {**self.parts, **before}
            if before.get(name) != self.parts.get(name)
        ]
        if state["pairs"] != state["steps"] * self.global_batch_size:
            changed.append(
                f"train.global_batch_size was {state['pairs'] / state['steps']:g}, is {self.global_batch_size}"
            )
        if changed:
            raise ValueError(
                f"the data plan is not the checkpoint's ({'; '.join(changed)}); "
                "set it back to resume, or start a new run in another output_dir"
            )
        return int(state["steps"])

    def _check_budget(self) -> None:
        budget, describe = self.settings.max_tokens_per_micro_batch, self.settings.describe
        longest = int(np.argmax(np.where(self.kept, self._work.tokens, 0)))
        tokens = int(self._work.tokens[longest])
        if tokens > budget:
            raise ValueError(
                f"train.max_tokens_per_micro_batch is {budget}, but the longest pair, {describe(longest)}, "
                f"needs {tokens} tokens; raise it to {tokens}, or lower data.max_tokens to exclude such pairs"
            )


def _exclude(
    lengths: Lengths, max_tokens: int, excluded: np.ndarray | None, single_answers: bool
) -> tuple[np.ndarray, dict[str, int]]:
    """bool[rows] of what is kept, and the count of each reason for the rest.

    It looks at both completions whatever the objective scores, so that SFT and DPO twins keep the same pairs.
    """
    kept = np.ones(len(lengths), dtype=bool)
    exclusions = {}
    longest = lengths.prompt + np.maximum(lengths.chosen, lengths.rejected)
    reasons = {
        "named in data.exclude": np.zeros(len(lengths), dtype=bool) if excluded is None else excluded,
        "whose answer the chat template changes (see data.chat_template)": lengths.prompt == 0,
        "chosen equals rejected": lengths.same == 1,
        "zero-length completion": longest == lengths.prompt if single_answers else lengths.chosen == 0,
        "longer than data.max_tokens": longest > max_tokens,
    }
    for reason, hit in reasons.items():
        count = int((hit & kept).sum())
        if count:
            exclusions[reason] = count
        kept &= ~hit
    return kept, exclusions
