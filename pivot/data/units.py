"""What a step's pairs cost and which of them share a row's tokens: the units that are dealt to ranks and rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pivot.data.lengths import Lengths


@dataclass(frozen=True)
class Costs:
    """What a unit costs, in any one unit of work (FLOPs serve well); it balances ranks and decides nothing else."""

    per_token: float = 1.0  # language model, a token of the row
    per_image_token: float = 0.0  # encoder and projector, an image token
    per_attention: float = 0.0  # language model, a query attending to a key
    # The last block and the head, where a hidden state is read:
    per_query: float = 0.0
    per_target: float = 0.0
    per_read_attention: float = 0.0


@dataclass(frozen=True)
class Unit:
    """Pairs that share a row: one, or with image trees several that begin with the same image."""

    places: tuple[int, ...]  # in the step's ids
    tokens: int
    cost: float


class Work:
    """Tokens and cost of every sample of a data set, and of pairs that share an image's tokens.

    A completion attends to its prompt and, causally, to itself. Of pairs with equal `groups` (int64[rows]; None:
    nothing is shared) the tokens up to the image's last count once.
    """

    def __init__(
        self, lengths: Lengths, roles: tuple[str, ...], costs: Costs, groups: np.ndarray | None = None
    ) -> None:
        self._groups = groups
        targets = lengths.completion_tokens(roles)
        self.tokens = lengths.prompt + targets
        read = lengths.prompt.astype(np.float64)  # the prompt's last token predicts the first of each completion
        for role in roles:
            length = getattr(lengths, role)
            read = read + length * (length + 1) / 2 + length * lengths.prompt
        self.costs = (
            costs.per_token * self.tokens
            + costs.per_query * (targets + 1)
            + costs.per_target * targets
            + costs.per_image_token * lengths.image
            + costs.per_attention * (read + lengths.prompt * (lengths.prompt - 1) / 2)
            + costs.per_read_attention * read
        )
        self._prefix_tokens = lengths.image_prefix
        self._prefix_costs = (
            costs.per_token * lengths.image_prefix
            + costs.per_image_token * lengths.image
            + costs.per_attention * lengths.image_prefix * (lengths.image_prefix + 1) / 2
        )

    def units(self, ids: np.ndarray, *, max_tokens: int, num_shares: int) -> list[Unit]:
        """The units of a step that holds the rows `ids`, in the order of their first pairs.

        The pairs of one image are cut where they would not fit into `max_tokens`, or are more than a fair share of
        the step's work for one of `num_shares` ranks: sharing less costs less than ranks that wait.
        """
        if self._groups is None:
            alone = zip(self.tokens[ids].tolist(), self.costs[ids].tolist(), strict=True)
            return [Unit((place,), tokens, cost) for place, (tokens, cost) in enumerate(alone)]
        together: dict[int, list[int]] = {}
        for place, group in enumerate(self._groups[ids].tolist()):
            together.setdefault(group, []).append(place)
        whole = [self._unit(ids, places) for places in together.values()]
        fair = sum(unit.cost for unit in whole) / num_shares
        units = []
        for unit in whole:
            units += self._cut(ids, unit, max_tokens, fair)
        return units

    def _cut(self, ids: np.ndarray, unit: Unit, max_tokens: int, max_cost: float) -> list[Unit]:
        if len(unit.places) == 1 or (unit.tokens <= max_tokens and unit.cost <= max_cost):
            return [unit]
        half = len(unit.places) // 2
        parts = (unit.places[:half], unit.places[half:])
        return [small for part in parts for small in self._cut(ids, self._unit(ids, part), max_tokens, max_cost)]

    def _unit(self, ids: np.ndarray, places: Sequence[int]) -> Unit:
        rows = ids[list(places)]
        shared = len(places) - 1
        return Unit(
            tuple(places),
            int(self.tokens[rows].sum() - shared * self._prefix_tokens[rows[0]]),
            float(self.costs[rows].sum() - shared * self._prefix_costs[rows[0]]),
        )
