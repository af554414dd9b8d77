"""What a loss needs that compares each pair with all others of its optimizer step, over all ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from pivot.batch import PackedBatch
from pivot.system import distributed
from pivot.system.distributed import World


class Matching(Protocol):
    """What an objective does whose loss of a pair depends on all pairs of its step."""

    def pair_scores(self, token_logps: Tensor, batch: PackedBatch) -> Tensor:
        """float32[P, K]: what has to be known of each pair of a batch."""
        ...

    def match(self, pair_scores: Tensor) -> dict[str, Tensor]:
        """Of all pairs of a step, on all ranks: name -> float32[P, 2] for their chosen and rejected completions."""
        ...


@torch.no_grad()
def see_step(
    forward: Callable[[PackedBatch], Tensor], matching: Matching, batches: Iterable[PackedBatch], world: World
) -> list[PackedBatch]:
    """The step's micro-batches on the host, matched: for losses that depend on all pairs of a step. Collective.

    Costs a forward pass of the whole step more: the order of all pairs must be known before the first gradient.
    """
    seen = list(batches)
    match_step(matching, seen, [forward(batch.to(world.device)).float().cpu() for batch in seen], world)
    return seen


def match_step(matching: Matching, batches: Sequence[PackedBatch], token_logps: Sequence[Tensor], world: World) -> None:
    """Put what each pair of the step is compared with into its batch, given the log-probs on the host. Collective."""
    own = [matching.pair_scores(logps, batch) for logps, batch in zip(token_logps, batches, strict=True)]
    ranks = distributed.gather(torch.cat(own))
    first = sum(len(scores) for scores in ranks[: world.rank])
    for name, partners in matching.match(torch.cat(ranks)).items():
        of_rank = partners[first : first + len(ranks[world.rank])]
        for batch, of_batch in zip(batches, of_rank.split([len(scores) for scores in own]), strict=True):
            values = torch.zeros(batch.num_completions)
            for role, index in enumerate(batch.pairs):
                values[index] = of_batch[:, role]
            batch.completion_values[name] = values
