"""Which samples a step holds, and which rank runs which of them: integers computed alike on every rank.

The order (order.py) is a pure function of (data fingerprint, lengths, seed, position), so a resume is a jump, and
world size, workers, objective and micro-batch budget cannot change which ids a step holds. Step t is positions
[t * global_batch_size, (t + 1) * global_batch_size) of an endless stream of epochs; a step may straddle the border of
two.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pivot.batch import REJECTED
from pivot.counts import StepCounts
from pivot.data.lengths import Lengths
from pivot.data.order import ORDER_VERSION, EpochOrder, MixtureOrder, Source

STATE_FORMAT = 1


@dataclass(frozen=True)
class Costs:
    """What a unit costs, in any one unit of work (FLOPs serve well); it balances ranks and decides nothing else."""

    per_token: float = 1.0  # language model, a token of the row
    per_image_token: float = 0.0  # encoder and projector, an image token
    per_target: float = 0.0  # head, a token that is scored
    per_attention: float = 0.0  # a query attending to a key


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step, the same on every rank."""

    step: int
    ids: np.ndarray  # int64[global_batch_size]: rows of the data set, in the order of the stream
    micro_batches: list[list[list[int]]]  # [rank][micro-batch] -> rows; an empty list is a weight-0 dummy
    counts: StepCounts  # planned, over all ranks
    balance: float  # mean over maximum of the ranks' costs; 1 is perfect

    @property
    def num_micro_batches(self) -> int:
        """Per rank, equal on all of them."""
        return len(self.micro_batches[0])


class Plan:
    """The steps of a run over one data set, or over a `mixture` of the sets that it joins.

    `excluded` is bool[rows]: what an exclude list names. `limit` ends the stream after that many positions, for
    evaluation and for visiting each pair once; the last step may then hold fewer pairs. `describe` names a row in
    messages. Raises ValueError when nothing is kept, when `roles` asks for completions that samples lack, and when the
    longest kept pair is over the micro-batch budget.
    """

    def __init__(
        self,
        *,
        fingerprint: str,
        shard_sizes: Sequence[int],
        lengths: Lengths,
        seed: int,
        global_batch_size: int,
        max_tokens: int,
        max_tokens_per_micro_batch: int,
        world_size: int,
        roles: tuple[str, ...],
        costs: Costs = Costs(),
        window_shards: int | None = None,
        mixture: Sequence[Source] | None = None,
        excluded: np.ndarray | None = None,
        limit: int | None = None,
        describe: Callable[[int], str] = "row {}".format,
    ) -> None:
        assert sum(shard_sizes) == len(lengths), "lengths of another data set"
        self.lengths, self.seed, self.roles, self.limit = lengths, seed, roles, limit
        self.global_batch_size, self.world_size = global_batch_size, world_size
        self._budget = max_tokens_per_micro_batch
        self.kept, self.exclusions = _exclude(lengths, max_tokens, excluded)  # bool[rows], reason -> count
        self.parts: dict[str, Any] = {
            "data": fingerprint[:16],
            "lengths": lengths.fingerprint[:16],
            "seed": seed,
            "data.max_tokens": max_tokens,
            "window_shards": window_shards,
            "order_version": ORDER_VERSION,
        }
        if mixture:
            self.parts["mixture"] = [source.facts() for source in mixture]
        if excluded is not None and excluded.any():
            self.parts["data.exclude"] = hashlib.sha256(np.packbits(excluded).tobytes()).hexdigest()[:16]
        if not self.kept.any():
            raise ValueError(f"no sample is left to train on; excluded: {self.exclusions}")
        if REJECTED in roles and not lengths.rejected[self.kept].all():
            row = int(np.flatnonzero(self.kept & (lengths.rejected == 0))[0])
            raise ValueError(f"{describe(row)} has no rejected completion; a preference objective needs pairs")
        self._row_tokens = lengths.prompt + lengths.completion_tokens(roles)
        self._check_budget(describe)
        self._costs = _unit_costs(lengths, roles, costs)
        self._order: EpochOrder | MixtureOrder
        if mixture:
            assert sum(source.samples for source in mixture) == len(lengths), "lengths of another mixture"
            self._order = MixtureOrder(mixture, self.kept, seed, window_shards)
        else:
            self._order = EpochOrder(fingerprint, shard_sizes, self.kept, seed, window_shards)
        self.num_pairs = self._order.num_rows  # of one epoch; a mixture may repeat rows or leave some for the next

    @property
    def fingerprint(self) -> str:
        """Covers all that decides the order; not the world size, the budget or the workers."""
        return hashlib.sha256(json.dumps(self.parts, sort_keys=True).encode()).hexdigest()

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
        ids = self.step_ids(step)
        costs, tokens = self._costs[ids].tolist(), self._row_tokens[ids].tolist()
        shares = deal(costs, self.world_size)
        rows = cut(shares, costs, tokens, self._budget)
        loads = [sum(costs[unit] for row in rank for unit in row) for rank in rows]
        return StepPlan(
            step=step,
            ids=ids,
            micro_batches=[[[int(ids[unit]) for unit in row] for row in rank] for rank in rows],
            counts=StepCounts(
                pair=len(ids),
                chosen_token=int(self.lengths.chosen[ids].sum()),
                target_token=int(self.lengths.completion_tokens(self.roles)[ids].sum()),
            ),
            balance=sum(loads) / (len(loads) * max(loads)) if max(loads) > 0 else 1.0,
        )

    def state(self, steps: int, masked: int) -> dict[str, Any]:
        """Where a run stands after `steps` steps, for its checkpoint."""
        pairs = steps * self.global_batch_size
        position = {"epoch": pairs // self.num_pairs, "pairs": pairs, "steps": steps, "masked": masked}
        plan = {"plan_fp": self.fingerprint, "seed": self.seed, "plan": self.parts}
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

    def _check_budget(self, describe: Callable[[int], str]) -> None:
        longest = int(np.argmax(np.where(self.kept, self._row_tokens, 0)))
        tokens = int(self._row_tokens[longest])
        if tokens > self._budget:
            raise ValueError(
                f"train.max_tokens_per_micro_batch is {self._budget}, but the longest pair, {describe(longest)}, "
                f"needs {tokens} tokens; raise it to {tokens}, or lower data.max_tokens to exclude such pairs"
            )


def deal(costs: Sequence[float], num_shares: int) -> list[list[int]]:
    """Units (indices into `costs`) per share: the costliest first, each to the least loaded share."""
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    loads = [(0.0, share) for share in range(num_shares)]
    for unit in _costliest_first(range(len(costs)), costs):
        load, share = heapq.heappop(loads)
        shares[share].append(unit)
        heapq.heappush(loads, (load + costs[unit], share))
    return shares


def cut(shares: list[list[int]], costs: Sequence[float], tokens: Sequence[int], budget: int) -> list[list[list[int]]]:
    """[share][row] -> units: every share cut into the same, smallest number of rows within `budget` tokens.

    No row is empty as long as there are as many units as rows. Rows of a share lie in falling order of cost: under
    ZeRO-3 the ranks wait for each other at every micro-batch, so equals should meet.
    """
    num_rows = max(1, max(-(-sum(tokens[unit] for unit in share) // budget) for share in shares))
    while True:
        evened = _give_each(shares, costs, num_rows)
        rows = [_fill_rows(share, costs, tokens, budget, num_rows) for share in evened]
        fitting = [share_rows for share_rows in rows if share_rows is not None]
        if len(fitting) == len(shares):
            return fitting
        num_rows += 1  # ends: with a row for each unit everything fits


def best_fit_decreasing(units: Sequence[int], tokens: Sequence[int], budget: int) -> list[list[int]]:
    """Rows of at most `budget` tokens: the longest unit first, each into the fullest row that has room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for unit in sorted(units, key=lambda unit: (-tokens[unit], unit)):
        fits = [row for row in range(len(rows)) if room[row] >= tokens[unit]]
        row = min(fits, key=lambda row: room[row], default=len(rows))
        if row == len(rows):
            rows.append([])
            room.append(budget)
        rows[row].append(unit)
        room[row] -= tokens[unit]
    return rows


def _give_each(shares: list[list[int]], costs: Sequence[float], least: int) -> list[list[int]]:
    """The same shares, where those with under `least` units got the cheapest of those with more, if there are any."""
    shares = [list(share) for share in shares]
    for poor in shares:
        while len(poor) < least:
            rich = max(shares, key=len)
            if len(rich) <= least:
                break
            poor.append(rich.pop(rich.index(min(rich, key=lambda unit: (costs[unit], unit)))))
    return shares


def _fill_rows(
    units: list[int], costs: Sequence[float], tokens: Sequence[int], budget: int, num_rows: int
) -> list[list[int]] | None:
    """The units in exactly `num_rows` rows, or None when they do not fit."""
    rows = _spread(units, costs, tokens, budget, num_rows)
    if rows is None:  # too tight to be even
        rows = best_fit_decreasing(units, tokens, budget)
        if len(rows) > num_rows:
            return None
        while len(rows) < num_rows and max(map(len, rows), default=0) > 1:
            rows.append([max(rows, key=len).pop()])
        rows += [[] for _ in range(num_rows - len(rows))]
    return sorted(rows, key=lambda row: -sum(costs[unit] for unit in row))


def _spread(
    units: list[int], costs: Sequence[float], tokens: Sequence[int], budget: int, num_rows: int
) -> list[list[int]] | None:
    """Rows of even cost, the costliest unit first into the least loaded row with room; None when one has none."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    loads, room = [0.0] * num_rows, [budget] * num_rows
    for unit in _costliest_first(units, costs):
        fits = [row for row in range(num_rows) if room[row] >= tokens[unit]]
        if not fits:
            return None
        row = min(fits, key=lambda row: (loads[row], len(rows[row]), row))
        rows[row].append(unit)
        loads[row] += costs[unit]
        room[row] -= tokens[unit]
    return rows


def _costliest_first(units: Sequence[int], costs: Sequence[float]) -> list[int]:
    return sorted(units, key=lambda unit: (-costs[unit], unit))


def _exclude(lengths: Lengths, max_tokens: int, excluded: np.ndarray | None) -> tuple[np.ndarray, dict[str, int]]:
    """bool[rows] of what is kept, and the count of each reason for the rest.

    It looks at both completions whatever the objective scores, so that SFT and DPO twins keep the same pairs.
    """
    kept = np.ones(len(lengths), dtype=bool)
    exclusions = {}
    longest = lengths.prompt + np.maximum(lengths.chosen, lengths.rejected)
    reasons = {
        "named in data.exclude": np.zeros(len(lengths), dtype=bool) if excluded is None else excluded,
        "chosen equals rejected": lengths.same == 1,
        "zero-length completion": lengths.chosen == 0,
        "longer than data.max_tokens": longest > max_tokens,
    }
    for reason, hit in reasons.items():
        count = int((hit & kept).sum())
        if count:
            exclusions[reason] = count
        kept &= ~hit
    return kept, exclusions


def _unit_costs(lengths: Lengths, roles: tuple[str, ...], costs: Costs) -> np.ndarray:
    """float64[rows]: each sample's work; a completion attends to the prompt and, causally, to itself."""
    tokens = lengths.prompt + lengths.completion_tokens(roles)
    attention = lengths.prompt * (lengths.prompt + 1) / 2
    for role in roles:
        length = getattr(lengths, role)
        attention = attention + length * (length + 1) / 2 + length * lengths.prompt
    targets = lengths.completion_tokens(roles)
    return (
        costs.per_token * tokens
        + costs.per_target * targets
        + costs.per_image_token * lengths.image
        + costs.per_attention * attention
    )
