"""Sets of single answers with a label: who borrows whose answer, and how they are planned and loaded."""

from __future__ import annotations

import numpy as np
import pytest

from pivot.batch import ANSWER, CHOSEN, CHOSEN_ANSWER, MISMATCHED, REJECTED, REJECTED_ANSWER, SAMPLE, StepCounts
from pivot.data.borrowed import borrow
from pivot.data.lengths import LENGTH_RECORD, Lengths, build_lengths, load_lengths
from pivot.data.loader import Loader
from pivot.data.plan import Plan, PlanSettings
from pivot.data.shards import ShardSet, require_kind
from tests.kit.sets import END_OF_TURN, FakeProcessor, make_answer_set, make_set

ROLES = (CHOSEN, REJECTED, MISMATCHED)


def lengths_of(chosen: list[int], rejected: list[int], prompt: int = 5) -> Lengths:
    records = np.zeros(len(chosen), dtype=LENGTH_RECORD)
    records["prompt"], records["chosen"], records["rejected"] = prompt, chosen, rejected
    return Lengths.from_records(records)


def test_neighbours_in_length_lend_to_each_other():
    """Lengths 9 1 4 8 2, sorted 1 2 4 8 9: the first two change, the last three go round; 4 is cut from 8 or 9."""
    lengths = borrow(lengths_of([9, 0, 4, 8, 0], [0, 1, 0, 0, 2]), [5])
    assert lengths.borrowed is not None
    assert lengths.borrowed.lender.tolist()[1] == 4 and lengths.borrowed.lender.tolist()[4] == 1
    assert sorted(lengths.borrowed.lender.tolist()) == [0, 1, 2, 3, 4]
    assert all(lender != row for row, lender in enumerate(lengths.borrowed.lender.tolist()))
    assert lengths.borrowed.is_rejected.tolist() == [False, True, False, False, True]
    own = [9, 1, 4, 8, 2]
    wanted = [min(own[lender], own[row]) for row, lender in enumerate(lengths.borrowed.lender.tolist())]
    assert lengths.mismatched.tolist() == wanted


def test_nobody_borrows_from_another_shard_nor_from_what_is_excluded():
    """Shards of 3, 4 and 1: row 3 has no tokens, since the template changes its answer; row 7 is alone."""
    lengths = lengths_of([3] * 8, [0] * 8)
    lengths.prompt[3] = lengths.chosen[3] = 0
    lender = borrow(lengths, [3, 4, 1]).borrowed.lender.tolist()
    assert sorted(lender[:3]) == [0, 1, 2] and sorted(lender[4:7]) == [4, 5, 6]
    assert all(lender[row] != row for row in (0, 1, 2, 4, 5, 6))
    assert lender[3] == 3 and lender[7] == 7


def test_a_shard_lends_alike_in_every_set():
    rng = np.random.default_rng(0)
    answers = rng.integers(1, 30, 40)
    alone = borrow(lengths_of(answers[:20].tolist(), [0] * 20), [20]).borrowed
    joined = borrow(lengths_of(answers.tolist(), [0] * 40), [20, 20]).borrowed
    for own, other in zip(alone, joined, strict=True):
        assert np.array_equal(own, other[:20])


def test_little_is_cut():
    """1,000 answers of 1 to 60 tokens: less than 1 % of the tokens."""
    answers = np.random.default_rng(1).integers(1, 61, 1000)
    borrowed = borrow(lengths_of(answers.tolist(), [0] * 1000), [1000]).borrowed
    assert borrowed.tokens.sum() > 0.99 * answers.sum()


def test_answers_of_one_length_are_mixed():
    """Four questions to a picture, all with answers of one length: few borrow from their own picture's."""
    answers = np.repeat(np.random.default_rng(1).integers(1, 9, 250), 4)
    lender = borrow(lengths_of(answers.tolist(), [0] * 1000), [1000]).borrowed.lender
    assert np.mean(lender // 4 == np.arange(1000) // 4) < 0.1


def test_of_pairs_every_other_lends_its_rejected_answer():
    lengths = borrow(lengths_of([5] * 6, [7] * 6), [6])
    lender = lengths.borrowed.lender
    assert lengths.borrowed.is_rejected.tolist() == (lender % 2 == 1).tolist()
    assert lengths.mismatched.tolist() == [7 if row % 2 else 5 for row in lender.tolist()]


def make_plan(shards: ShardSet, cache_dir, **changes) -> Plan:
    build_lengths(shards, FakeProcessor(), cache_dir)
    lengths = borrow(load_lengths(shards, FakeProcessor(), cache_dir), shards.shard_sizes)
    settings = {
        "fingerprint": shards.fingerprint,
        "shard_sizes": shards.shard_sizes,
        "lengths": lengths,
        "seed": 7,
        "global_batch_size": 8,
        "max_tokens": 100,
        "max_tokens_per_micro_batch": 200,
        "world_size": 2,
        "roles": ROLES,
        "single_answers": True,
        "describe": shards.describe,
    }
    return Plan(PlanSettings(**(settings | changes)))


def test_every_answer_is_loaded_with_its_label_and_another_answer(tmp_path):
    """24 answers, 16 good: each once an epoch, by role; beside it as many tokens as the plan says of a lender's."""
    shards = make_answer_set(tmp_path)
    plan = make_plan(shards, tmp_path / "cache")
    assert plan.num_pairs == 24 and not plan.exclusions
    seen: dict[int, str] = {}
    counts = StepCounts()
    for rank in range(2):
        loader = Loader(shards, plan.another(limit=24), FakeProcessor(), rank=rank)
        for _, micro_batches in loader:
            for batch in micro_batches:
                counts += batch.counts(ROLES)
                for role in (CHOSEN, REJECTED):
                    for index in batch.completions_of[role].tolist():
                        row = int(batch.completion_rows[index])
                        seen[row] = role
                        assert words(batch, index) == shards.read_text(row)["completion"][0]["content"].encode()
                for index in batch.completions_of[MISMATCHED].tolist():
                    row = int(batch.completion_rows[index])
                    lender = shards.read_text(int(plan.lengths.borrowed.lender[row]))
                    lent = [*lender["completion"][0]["content"].encode(), END_OF_TURN]
                    own = int(plan.lengths.mismatched[row])
                    assert batch.target_ids[batch.target_completion == index].tolist() == lent[:own]
    assert len(seen) == 24 and all((role == CHOSEN) == shards.read_text(row)["label"] for row, role in seen.items())
    planned = sum((plan.step(step).counts for step in range(3)), StepCounts())
    assert counts == planned and planned[SAMPLE] == planned[ANSWER] == 24
    assert (planned[CHOSEN_ANSWER], planned[REJECTED_ANSWER]) == (16, 8)


def words(batch, index: int) -> bytes:
    tokens = batch.target_ids[batch.target_completion == index].tolist()
    assert tokens[-1] == END_OF_TURN
    return bytes(tokens[:-1])


@pytest.mark.parametrize("image_trees", [False, True])
def test_a_step_is_the_same_samples_whatever_the_ranks_and_trees(tmp_path, image_trees):
    shards = make_answer_set(tmp_path)
    plans = [
        make_plan(
            shards, tmp_path / "cache", world_size=world, image_trees=image_trees, max_tokens_per_micro_batch=room
        )
        for world, room in ((1, 1000), (2, 200), (3, 110))
    ]
    for step in range(3):
        steps = [plan.step(step) for plan in plans]
        assert all(one.counts == steps[0].counts for one in steps)
        assert all(np.array_equal(one.ids, steps[0].ids) for one in steps)


def test_pairs_are_planned_as_two_answers_each(tmp_path):
    plan = make_plan(make_set(tmp_path), tmp_path / "cache")
    counts = plan.step(0).counts
    assert (counts[SAMPLE], counts[ANSWER], counts[CHOSEN_ANSWER], counts[REJECTED_ANSWER]) == (8, 16, 8, 8)


def test_a_damaged_lender_masks_its_borrower_too(tmp_path):
    """Both lie in one shard; each is counted, and keeps its place with weight 0."""
    shards = make_answer_set(tmp_path)
    plan = make_plan(shards, tmp_path / "cache", world_size=1).another(limit=24)
    path = shards.fetch(0)
    content = bytearray(path.read_bytes())
    offset = int(shards.index[0]["offset"])
    content[offset + 512 : offset + 512 + int(shards.index[0]["json_len"])] = b"{" * int(shards.index[0]["json_len"])
    path.write_bytes(content)
    loader = Loader(shards, plan, FakeProcessor())
    masked = []
    for _, micro_batches in loader:
        for batch in micro_batches:
            masked += batch.completion_rows[batch.completion_weight == 0].unique().tolist()
    borrower = plan.lengths.borrowed.lender.tolist().index(0)
    assert sorted(masked) == sorted({0, borrower}) and loader.num_masked == 2


def test_only_kto_learns_from_single_answers(tmp_path):
    shards = make_answer_set(tmp_path)
    require_kind("data.train", shards, single_answers=True)
    with pytest.raises(ValueError, match=r"data.train: answers is of kind unpaired.*launch/train_kto.py"):
        require_kind("data.train", shards, single_answers=False)
