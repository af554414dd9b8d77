"""VQA accuracy: how often a greedily generated answer is one of those that its sample accepts."""

from __future__ import annotations

import numpy as np

from pivot.evaluate.answers import is_right
from pivot.evaluate.outcomes import SampleAnswer
from pivot.evaluate.task import Measure, Result, Subject

VQA = "eval/vqa_accuracy"
BLIND = f"{VQA}_blind"  # the best fixed answer to each kind of question
NUM_QUESTIONS = "eval/num_questions"

MEASURES = (
    Measure(
        VQA,
        "VQA accuracy",
        title="Answer accuracy",
        meaning="share of held-out questions answered right, greedily, in the model's own words",
        legend="answers",
    ),
)


def run(subject: Subject) -> Result:
    """Answer every question that carries an answer; where none does, a few samples all the same, to be read."""
    held_out = subject.held_out
    texts = subject.answer(held_out.questions or held_out.shown)
    said = {row: subject.processor.cut_answer(text) for row, text in texts.items()}
    right = {q.row: is_right(said[q.row], q.accepted) for q in held_out.questions if q.row in said}
    answers = [
        SampleAnswer(q.row, q.id, q.text, q.expected, texts[q.row], right.get(q.row))
        for q in held_out.shown
        if q.row in texts
    ]
    if not right:
        return Result(answers=answers, skipped={VQA: "no held-out sample carries an answer"})
    rows = np.array(sorted(right))
    outcome = np.array([float(right[row]) for row in rows.tolist()])
    metrics = {VQA: float(outcome.mean()), NUM_QUESTIONS: len(rows)} | accuracy_by_kind(subject, right)
    return Result(metrics, {VQA: (rows, outcome)}, answers)


def accuracy_by_kind(subject: Subject, right: dict[int, bool]) -> dict[str, float]:
    """Accuracy for each kind of question where the samples tell it, and what answering blindly would give.

    `right`: row -> whether its answer is right.
    """
    kinds: dict[str, list[bool]] = {}
    for question in subject.held_out.questions:
        if question.kind is not None and question.row in right:
            kinds.setdefault(question.kind, []).append(right[question.row])
    shares = {f"{VQA}/{kind}": sum(values) / len(values) for kind, values in sorted(kinds.items())}
    blind = subject.held_out.blind_accuracy
    return shares if blind is None else shares | {BLIND: blind}
