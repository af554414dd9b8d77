"""How much one optimizer step holds over all ranks, as the plan knows beforehand: the denominators of its means."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepCounts:
    """Planned numbers of pairs (for SFT: samples) and targets; the field names are the units of a `Term`.

    A masked pair is counted: it adds zero to the sums and leaves the denominators as planned, so that every rank
    knows them without talking to the others.
    """

    pair: int
    chosen_token: int  # targets of the chosen completions
    target_token: int  # targets of all completions

    def denominator(self, unit: str) -> int:
        """The count of `unit`, at least 1: a step without any has a sum of zero, and a mean of zero."""
        return max(1, int(getattr(self, unit)))

    def __add__(self, other: StepCounts) -> StepCounts:
        return StepCounts(
            pair=self.pair + other.pair,
            chosen_token=self.chosen_token + other.chosen_token,
            target_token=self.target_token + other.target_token,
        )
