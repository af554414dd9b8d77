"""Preference accuracy: how often the chosen completion is likelier than the rejected one, under the model alone."""

from __future__ import annotations

import numpy as np

from pivot.evaluate.task import Measure, Result, Subject

PREFERENCE = "eval/preference_accuracy"
PER_TOKEN = f"{PREFERENCE}_per_token"

MEASURES = (
    Measure(
        PREFERENCE,
        "preference accuracy",
        title="Preference accuracy",
        meaning="share of held-out pairs whose right answer is the likelier one",
        legend="preference",
        chance=0.5,
    ),
    Measure(PER_TOKEN, "per token", is_share=False),
)


def run(subject: Subject) -> Result:
    """The share of pairs by summed log-prob, and by the mean of a token, which favours neither short nor long."""
    records = subject.records
    if not subject.held_out.has_pairs or not len(records):
        return Result(skipped={PREFERENCE: "the held-out set has no rejected completions beside chosen ones"})
    outcome = preferred(records)
    metrics = {PREFERENCE: float(outcome.mean()), PER_TOKEN: float(preferred_per_token(records).mean())}
    return Result(metrics, {PREFERENCE: (records["row"], outcome)})


def preferred(records: np.ndarray) -> np.ndarray:
    """float64[pairs]: 1 where the chosen completion is the likelier one, 1/2 at a tie."""
    return _compare(records["chosen_logp"], records["rejected_logp"])


def preferred_per_token(records: np.ndarray) -> np.ndarray:
    """The same for the mean log-prob of a token."""
    chosen, rejected = (
        records[f"{role}_logp"].astype(np.float64) / records[f"{role}_tokens"] for role in ("chosen", "rejected")
    )
    return _compare(chosen, rejected)


def _compare(chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    return np.where(chosen > rejected, 1.0, np.where(chosen == rejected, 0.5, 0.0))
