"""Held-out pairs under a policy: one record a pair, gathered over the ranks once, and the objective's own terms."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pivot.batch import CHOSEN, REFERENCE, REJECTED, PackedBatch, StepCounts
from pivot.objectives.matching import match_step
from pivot.system import distributed
from pivot.system.distributed import World

if TYPE_CHECKING:
    from pivot.data.reference_cache import ReferenceCache
    from pivot.objectives import Objective, Outcome
    from pivot.step import StepSource

PAIR_RECORD = np.dtype(
    [
        ("row", "<i8"),
        ("chosen_logp", "<f4"),
        ("rejected_logp", "<f4"),
        ("chosen_tokens", "<u4"),
        ("rejected_tokens", "<u4"),
        ("margin", "<f4"),  # nat that chosen gained on rejected over the reference; NaN without one
    ]
)


@torch.no_grad()
def score_pairs(
    source: StepSource,
    forward: Callable[[PackedBatch], Tensor],
    world: World,
    *,
    objective: Objective | None = None,
    reference: ReferenceCache | None = None,
) -> tuple[np.ndarray, dict[str, float]]:
    """PAIR_RECORD[pairs] in the order of their rows, and the objective's loss and metrics over them. Collective.

    `forward` maps a batch on the device to float32[N]. Samples that could not be read are left out of both. A loss that
    depends on all pairs of a step is that of the steps that `source` gives.
    """
    terms, parts = Terms(objective), []
    matching = None if objective is None else objective.matching
    for _, micro_batches in distributed.until_asked(source):
        waiting: list[tuple[PackedBatch, Tensor]] = []  # what the rest of the step has yet to be matched with
        if reference is not None:
            micro_batches = reference.add_to(micro_batches)
        for host_batch in distributed.until_asked(micro_batches):
            batch = host_batch.to(world.device)
            token_logps = forward(batch)
            parts.append(_records(host_batch, batch.completion_logps(token_logps).float().cpu()))
            if matching is not None:
                waiting.append((host_batch, token_logps.float().cpu()))
            elif objective is not None:
                terms.add(objective(token_logps, batch), host_batch)
        if objective is not None and matching is not None:
            match_step(matching, [batch for batch, _ in waiting], [logps for _, logps in waiting], world)
            for host_batch, token_logps in waiting:
                terms.add(objective(token_logps, host_batch), host_batch)
    gathered = distributed.gather((np.concatenate(parts), terms.sums()))
    records = np.concatenate([records for records, _ in gathered])
    return records[np.argsort(records["row"], kind="stable")], terms.means([sums for _, sums in gathered])


def _records(batch: PackedBatch, logps: Tensor) -> np.ndarray:
    """PAIR_RECORD of each sample of a batch on the host that was really scored; `logps`: float32[C]."""
    records = np.zeros(batch.num_groups, dtype=PAIR_RECORD)
    records["row"] = batch.sample_index.numpy()
    group = batch.group.numpy()
    for role in (CHOSEN, REJECTED):
        index = batch.completions_of[role].numpy()
        records[f"{role}_logp"][group[index]] = logps.numpy()[index]
        records[f"{role}_tokens"][group[index]] = batch.completion_tokens.numpy()[index]
    records["margin"] = np.nan
    if REFERENCE in batch.completion_values:
        gained = (logps - batch.completion_values[REFERENCE]).numpy()
        chosen, rejected = (index.numpy() for index in batch.pairs)
        records["margin"][group[chosen]] = gained[chosen] - gained[rejected]
    return records[np.unique(group[batch.completion_weight.numpy() > 0])]


class Terms:
    """Sums of an objective's terms, and of what they are to be divided by: the samples that were really scored."""

    def __init__(self, objective: Objective | None) -> None:
        self._objective = objective
        self._sums: dict[str, Tensor] = {}
        self._units: dict[str, str] = {}
        self._weights: dict[str, float] = {}  # of the terms that make up the loss
        self._counts = StepCounts()

    def add(self, outcome: Outcome, batch: PackedBatch) -> None:
        assert self._objective is not None
        self._weights = {f"loss/{name}": weight for name, (weight, _) in outcome.loss.items()}
        losses = {f"loss/{name}": term for name, (_, term) in outcome.loss.items()}
        for name, term in (losses | outcome.metrics).items():
            value = term.total.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._units[name] = term.unit
        self._counts += batch.counts(self._objective.roles)

    def sums(self) -> tuple[dict[str, float], StepCounts]:
        """This rank's part, on the host."""
        return {name: float(value) for name, value in self._sums.items()}, self._counts

    def means(self, parts: list[tuple[dict[str, float], StepCounts]]) -> dict[str, float]:
        """`loss` and the metrics over all ranks' parts: each sum divided once."""
        if not self._sums:
            return {}
        counts = sum((counts for _, counts in parts), StepCounts())
        means = {
            name: sum(sums[name] for sums, _ in parts) / counts.denominator(unit) for name, unit in self._units.items()
        }
        loss = sum(weight * means[name] for name, weight in self._weights.items())
        return {"loss": loss} | {n: v for n, v in means.items() if len(self._weights) > 1 or n not in self._weights}
