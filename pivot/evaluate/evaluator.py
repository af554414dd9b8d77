"""One evaluation of a model on the held-out set: its numbers with their intervals, and the answers people read.

evaluation = evaluate(held_out, processor, model, model, world, objective=None, reference=None, ...)
evaluation.metrics["eval/preference_accuracy"], evaluation.intervals["eval/preference_accuracy"]
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from pivot.batch import PackedBatch
from pivot.data.loader import Loader
from pivot.evaluate import intervals
from pivot.evaluate.answers import is_right
from pivot.evaluate.held_out import HeldOut, group_array
from pivot.evaluate.intervals import Interval
from pivot.evaluate.outcomes import PREFERENCE, REWARDS, VQA, Outcomes, SampleAnswer
from pivot.evaluate.pairs import preferred, preferred_per_token, score_pairs
from pivot.evaluate.vqa import answer_questions
from pivot.models.mllm import MLLM
from pivot.processor import Processor
from pivot.system.distributed import World

if TYPE_CHECKING:
    from pivot.data.reference_cache import ReferenceCache
    from pivot.objectives import Objective


@dataclass(frozen=True)
class Evaluation:
    metrics: dict[str, float]
    outcomes: Outcomes
    answers: list[SampleAnswer]
    skipped: dict[str, str] = field(default_factory=dict)  # metric -> why there is none
    seconds: float = 0.0

    @property
    def intervals(self) -> dict[str, Interval]:
        names = [name for name in (PREFERENCE, VQA, REWARDS) if name in self.outcomes]
        return {name: intervals.share(self.outcomes[name], self.outcomes[f"{name}/group"]) for name in names}


def evaluate(
    held_out: HeldOut,
    processor: Processor,
    model: MLLM,
    forward: Callable[[PackedBatch], Tensor],
    world: World,
    *,
    objective: Objective | None = None,
    reference: ReferenceCache | None = None,
    max_new_tokens: int,
    max_tokens: int,
    workers: int = 0,
    whole_weights: Callable[[], AbstractContextManager[bool]] = lambda: contextlib.nullcontext(True),
) -> Evaluation:
    """Score the pairs through `forward`, answer the questions with `model`. Collective; the same on every rank.

    `whole_weights` is entered for the answers; it gives whether each rank can then run forwards on its own.
    """
    started = time.monotonic()
    loader = Loader(held_out.shards, held_out.plan, processor, rank=world.rank, workers=workers)
    records, means = score_pairs(loader, forward, world, objective=objective, reference=reference)
    metrics = {f"eval/{name}": value for name, value in means.items()}
    outcomes: Outcomes = {}
    skipped: dict[str, str] = {}
    metrics["eval/num_samples"] = len(records)
    if held_out.has_pairs and len(records):
        _add(outcomes, PREFERENCE, preferred(records), records["row"], held_out)
        metrics[PREFERENCE] = float(outcomes[PREFERENCE].mean())
        metrics[f"{PREFERENCE}_per_token"] = float(preferred_per_token(records).mean())
        if reference is not None:
            _add(outcomes, REWARDS, (records["margin"] > 0).astype(np.float64), records["row"], held_out)
    else:
        skipped[PREFERENCE] = "the held-out set has no rejected completions"
    with whole_weights() as alone:
        asked = held_out.questions or held_out.shown
        texts = answer_questions(
            held_out,
            asked,
            model,
            processor,
            world,
            max_new_tokens=max_new_tokens,
            max_tokens=max_tokens,
            in_step=not alone,
        )
    told = {row: processor.cut_answer(text) for row, text in texts.items()}
    right = {q.row: is_right(told[q.row], q.accepted) for q in held_out.questions if q.row in told}
    if right:
        rows = np.array(sorted(right))
        _add(outcomes, VQA, np.array([float(right[row]) for row in rows.tolist()]), rows, held_out)
        metrics[VQA] = float(outcomes[VQA].mean())
        metrics["eval/num_questions"] = len(rows)
        metrics |= _per_kind(held_out, right)
    else:
        skipped[VQA] = "no held-out sample carries an answer"
    answers = [
        SampleAnswer(q.row, q.id, q.text, q.expected, texts[q.row], right.get(q.row))
        for q in held_out.shown
        if q.row in texts
    ]
    return Evaluation(metrics, outcomes, answers, skipped, time.monotonic() - started)


def _per_kind(held_out: HeldOut, right: dict[int, bool]) -> dict[str, float]:
    """VQA accuracy per kind of question where the samples tell it, and what answering blindly would give."""
    kinds: dict[str, list[bool]] = {}
    for question in held_out.questions:
        if question.kind is not None and question.row in right:
            kinds.setdefault(question.kind, []).append(right[question.row])
    found = {f"{VQA}/{kind}": sum(values) / len(values) for kind, values in sorted(kinds.items())}
    blind = held_out.blind_accuracy
    return found if blind is None else found | {f"{VQA}_blind": blind}


def _add(outcomes: Outcomes, name: str, values: np.ndarray, rows: np.ndarray, held_out: HeldOut) -> None:
    outcomes[name] = values
    outcomes[f"{name}/row"] = rows.astype(np.int64)
    outcomes[f"{name}/group"] = group_array(held_out, rows)


def describe(evaluation: Evaluation) -> str:
    """The evaluation in one line."""
    found = evaluation.metrics
    parts = [f"{name.removeprefix('eval/')} {found[name]:.4g}" for name in ("eval/loss",) if name in found]
    for name, interval in evaluation.intervals.items():
        parts.append(f"{name.removeprefix('eval/')} {interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]")
    if "eval/rewards/margins" in found:
        parts.append(f"rewards/margins {found['eval/rewards/margins']:.3f}")
    parts += [f"no {name.removeprefix('eval/')}: {reason}" for name, reason in evaluation.skipped.items()]
    return "  ".join(parts) + f"  ({evaluation.seconds:.0f} s)"
