"""One evaluation of a model on the held-out set: its numbers with their intervals, and the answers people read.

evaluation = evaluate(held_out, processor, model, model, world, objective=None, reference=None, ...)
evaluation.metrics["eval/preference_accuracy"], evaluation.intervals["eval/preference_accuracy"]
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from pivot.batch import PackedBatch
from pivot.data.loader import Loader
from pivot.evaluate import intervals
from pivot.evaluate.held_out import HeldOut, Question, group_array
from pivot.evaluate.intervals import Interval, share_text
from pivot.evaluate.outcomes import Outcomes, SampleAnswer
from pivot.evaluate.pairs import score_pairs
from pivot.evaluate.questions import answer_questions
from pivot.evaluate.task import Result
from pivot.evaluate.tasks import TASKS, all_measures, titled_measures
from pivot.models.mllm import MLLM
from pivot.processor import Processor
from pivot.system.distributed import World

if TYPE_CHECKING:
    from pivot.data.reference_cache import ReferenceCache
    from pivot.objectives import Objective


@dataclass
class Evaluation:
    metrics: dict[str, float]
    outcomes: Outcomes = field(default_factory=dict)
    answers: list[SampleAnswer] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # metric -> why there is none
    seconds: float = 0.0

    def add(self, result: Result, held_out: HeldOut) -> None:
        """Add what a task gave; each outcome gets the group of its row."""
        self.metrics |= result.metrics
        self.skipped |= result.skipped
        self.answers += result.answers
        for name, (rows, values) in result.outcomes.items():
            self.outcomes[name] = values
            self.outcomes[f"{name}/row"] = rows.astype(np.int64)
            self.outcomes[f"{name}/group"] = group_array(held_out, rows)

    @property
    def intervals(self) -> dict[str, Interval]:
        names = [measure.key for measure in all_measures() if measure.key in self.outcomes]
        return {name: intervals.share(self.outcomes[name], self.outcomes[f"{name}/group"]) for name in names}


@dataclass(frozen=True)
class ScoredModel:
    """The Subject of the tasks: a model whose log-probs on the held-out samples are there, and that answers."""

    held_out: HeldOut
    processor: Processor
    records: np.ndarray  # PAIR_RECORD[samples]
    has_reference: bool
    model: MLLM
    world: World
    max_new_tokens: int
    max_tokens: int
    whole_weights: Callable[[], AbstractContextManager[bool]]

    def answer(self, questions: Sequence[Question]) -> dict[int, str]:
        with self.whole_weights() as alone:
            return answer_questions(
                self.held_out,
                questions,
                self.model,
                self.processor,
                self.world,
                max_new_tokens=self.max_new_tokens,
                max_tokens=self.max_tokens,
                in_step=not alone,
            )


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
    """Score the samples through `forward`, then run every task. Collective; the same on every rank.

    `whole_weights` is entered where `model` generates answers; it gives whether each rank can then run forwards on its
    own. An answer has at most `max_new_tokens`; a batch of answers and their prompts at most `max_tokens`.
    """
    started = time.monotonic()
    loader = Loader(held_out.shards, held_out.plan, processor, rank=world.rank, workers=workers)
    records, means = score_pairs(loader, forward, world, objective=objective, reference=reference)
    evaluation = Evaluation({f"eval/{name}": value for name, value in means.items()})
    evaluation.metrics["eval/num_samples"] = len(records)
    subject = ScoredModel(
        held_out,
        processor,
        records,
        reference is not None,
        model,
        world,
        max_new_tokens,
        max_tokens,
        whole_weights,
    )
    for task in TASKS:
        evaluation.add(task.run(subject), held_out)
    evaluation.seconds = time.monotonic() - started
    return evaluation


def describe(evaluation: Evaluation) -> str:
    """The evaluation in one line: the loss, shares with their intervals, what is no share, and what is missing."""
    metrics = evaluation.metrics
    texts = {"eval/loss": f"{metrics['eval/loss']:.4g}"} if "eval/loss" in metrics else {}
    texts |= {name: share_text(interval) for name, interval in evaluation.intervals.items()}
    plain = [measure.key for measure in titled_measures() if not measure.is_share and measure.key in metrics]
    texts |= {name: f"{metrics[name]:.3f}" for name in plain}
    parts = [f"{name.removeprefix('eval/')} {text}" for name, text in texts.items()]
    parts += [f"no {name.removeprefix('eval/')}: {reason}" for name, reason in evaluation.skipped.items()]
    return "  ".join(parts) + f"  ({evaluation.seconds:.0f} s)"
