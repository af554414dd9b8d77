"""The held-out set of a run: its fixed order, its questions, and which samples share an image."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pivot.batch import CHOSEN, REJECTED
from pivot.data.lengths import build_lengths, load_lengths
from pivot.data.plan import Plan, PlanSettings
from pivot.data.remote import ShardCache
from pivot.data.samples import Sample, all_completions, message_text
from pivot.data.shards import ShardSet, require_kind
from pivot.evaluate.answers import accepted_answers, normalise_answer
from pivot.processor import Processor
from pivot.system import distributed
from pivot.system.distributed import World

ORDER_SEED = 0  # not the run's: every run and every model sees the same samples
STEP_PAIRS = 256  # a step of the plan; only how the work is cut
NUM_SHOWN = 32  # samples whose answers are kept, for people to read


@dataclass(frozen=True)
class Question:
    """A prompt to be answered; without `accepted` answers it is shown and not counted."""

    row: int
    id: str
    text: str
    expected: str  # for people: the first accepted answer, else the chosen completion
    accepted: tuple[str, ...]
    kind: str | None  # the sample's meta.type


@dataclass(frozen=True)
class HeldOut:
    shards: ShardSet
    plan: Plan  # with an end: every pair once
    cache_dir: Path
    questions: tuple[Question, ...]  # those that carry an answer
    shown: tuple[Question, ...]  # whose generated answers are kept
    groups: dict[int, int]  # row -> u64: equal for samples with the same images

    @property
    def has_pairs(self) -> bool:
        """Whether all samples have both answers, and both are scored."""
        plan = self.plan
        return REJECTED in plan.roles and bool((plan.lengths.chosen * plan.lengths.rejected)[plan.kept].all())

    @property
    def blind_accuracy(self) -> float | None:
        """The share that a fixed answer per kind of question gets right, the best one; None where kinds are not told.

        What a model must beat to have looked at the images.
        """
        kinds: dict[str | None, Counter[str]] = {}
        for question in self.questions:
            answers = {normalise_answer(answer) for answer in question.accepted}
            kinds.setdefault(question.kind, Counter()).update(answers)
        if not kinds or None in kinds:
            return None
        return sum(counter.most_common(1)[0][1] for counter in kinds.values()) / len(self.questions)

    @property
    def num_pairs(self) -> int:
        assert self.plan.limit is not None
        return self.plan.limit


def open_held_out(
    path: str | Path,
    processor: Processor,
    world: World,
    *,
    roles: tuple[str, ...],
    cache_dir: Path,
    num_samples: int,
    max_tokens: int,
    max_tokens_per_micro_batch: int,
    say: Callable[[str], None],
    shard_cache: ShardCache | None = None,
    single_answers: bool = False,
) -> HeldOut:
    """The first `num_samples` of the set in its fixed order. Collective. Raises ValueError when it lacks `roles`.

    Both completions are scored wherever the set has both, whatever the objective learns from; with `single_answers` a
    sample need not have both. The order of a remote set
    is that of its local copy, so its shards stay in `shard_cache` (`fetched` in `cache_dir`) until all were read.
    """
    shards = ShardSet.open(path, shard_cache or ShardCache(cache_dir / "fetched"))
    require_kind("held-out set", shards, single_answers=single_answers)
    shards.check_cache(whole=True)
    distributed.on_main(
        "counting tokens",
        lambda: build_lengths(shards, processor, cache_dir, lambda done, of: say(f"counting tokens: {done} of {of}")),
    )
    distributed.check_preemption()
    lengths = load_lengths(shards, processor, cache_dir)
    if lengths.rejected.all():
        roles = (CHOSEN, REJECTED)
    settings = PlanSettings(
        fingerprint=shards.fingerprint,
        shard_sizes=shards.shard_sizes,
        lengths=lengths,
        seed=ORDER_SEED,
        global_batch_size=STEP_PAIRS,
        max_tokens=max_tokens,
        # A run that scores chosen completions alone may have planned for shorter rows than a pair is.
        max_tokens_per_micro_batch=max(max_tokens_per_micro_batch, 2 * max_tokens),
        world_size=world.size,
        roles=roles,
        single_answers=single_answers,
        describe=shards.describe,
    )
    plan = Plan(settings)
    plan.limit = min(num_samples, plan.num_pairs)  # only the plan knows how many pairs it keeps
    distributed.require_equal("the held-out plan", plan.fingerprint)
    return _read_texts(shards, plan, cache_dir)


def _read_texts(shards: ShardSet, plan: Plan, cache_dir: Path) -> HeldOut:
    every, groups = [], {}
    for step in range(plan.num_steps or 0):
        for row in plan.step_ids(step).tolist():
            sample = shards.read_text(row)
            groups[row] = _group(sample, row)
            every.append(_question(sample, row))
    questions = tuple(question for question in every if question.accepted)
    return HeldOut(shards, plan, cache_dir, questions, (questions or tuple(every))[:NUM_SHOWN], groups)


def _group(sample: Sample, row: int) -> int:
    images = "".join(image["sha256"] for image in sample["images"]) or f"row {row}"
    return int.from_bytes(hashlib.sha256(images.encode()).digest()[:8], "little")


def _question(sample: Sample, row: int) -> Question:
    accepted = accepted_answers(sample)
    expected = accepted[0] if accepted else message_text(all_completions(sample).get(CHOSEN, []))
    kind = (sample.get("meta") or {}).get("type")
    text = message_text(sample["prompt"][-1:]).strip()
    return Question(row, str(sample["id"]), text, expected, accepted, None if kind is None else str(kind))


def group_array(held_out: HeldOut, rows: np.ndarray) -> np.ndarray:
    """uint64[len(rows)]: the group of each row."""
    return np.array([held_out.groups[row] for row in rows.tolist()], dtype=np.uint64)
