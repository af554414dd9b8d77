"""Laws of image trees: pairs of one image meet, everything comes once, and a row holds what the plan counted."""

import numpy as np
import pytest
import torch

from pivot.batch import DUMMY_SAMPLE
from pivot.data.collate import Completion, Example, collate, masked_example
from pivot.data.lengths import LENGTH_RECORD, Lengths, image_prefix
from pivot.data.order import EpochOrder, MixtureOrder, MixtureSource
from pivot.data.units import Costs, Work
from tests.kit.sets import GEOMETRY, IMAGE_TOKEN_ID, plan_of

ROLES = ("chosen", "rejected")
I = IMAGE_TOKEN_ID  # noqa: E741
PER_IMAGE = GEOMETRY.num_tokens
COSTS = Costs(per_token=1.0, per_image_token=2.0, per_target=3.0, per_attention=0.01)


def grouped_lengths(groups: list[int], seed: int = 0) -> Lengths:
    """Pairs whose images are `groups` (0: no image), behind one common token; three tokens follow at the least."""
    random = np.random.default_rng(seed)
    records = np.zeros(len(groups), dtype=LENGTH_RECORD)
    with_image = np.array(groups) > 0
    records["image"] = np.where(with_image, PER_IMAGE, 0)
    records["image_prefix"] = np.where(with_image, PER_IMAGE + 1, 0)
    records["image_prefix_hash"] = groups
    records["prompt"] = records["image_prefix"] + random.integers(3, 9, len(groups))
    records["chosen"] = random.integers(1, 9, len(groups))
    records["rejected"] = random.integers(1, 9, len(groups))
    return Lengths.from_records(records)


def examples_of(lengths: Lengths, rows: list[int]) -> list[Example]:
    """Pairs of exactly these lengths: a token 7, the image's tokens, then what tells the row."""
    found = []
    for row in rows:
        group, rest = int(lengths.image_prefix_hash[row]), int(lengths.prompt[row] - lengths.image_prefix[row])
        prompt = np.array(([7] + [I] * PER_IMAGE if group else []) + [row % 200] * rest)
        completions = [Completion(role, np.full(int(getattr(lengths, role)[row]), 9)) for role in ROLES]
        pixels = [torch.full((3, 8, 8), group, dtype=torch.uint8)] if group else []
        found.append(Example(row, prompt, completions, pixels, [str(group)] if group else []))
    return found


def test_pairs_of_an_image_follow_each_other_and_every_pair_comes_once():
    groups = np.random.default_rng(1).integers(0, 12, 60)
    order = EpochOrder("data", [10] * 6, np.ones(60, dtype=bool), seed=1, groups=groups)
    epochs = order.rows(0, 120).reshape(2, 60)
    for epoch in epochs:
        assert sorted(epoch) == list(range(60))
        seen = groups[epoch]
        assert (np.diff(seen) != 0).sum() == len(set(groups)) - 1
    assert epochs[0].tolist() != epochs[1].tolist()


def test_windows_bound_what_is_brought_together():
    groups = np.zeros(60, dtype=np.int64)
    order = EpochOrder("data", [10] * 6, np.ones(60, dtype=bool), seed=1, window_shards=2, groups=groups)
    assert {tuple(sorted(set(part // 10))) for part in order.rows(0, 60).reshape(3, 20)} <= {
        (a, b) for a in range(6) for b in range(a + 1, 6)
    }


def test_a_row_without_an_image_is_alone():
    lengths = grouped_lengths([0, 5, 0, 5, 0, 6])
    found = lengths.image_groups()
    assert len(set(found)) == 5 and found[1] == found[3]


@pytest.mark.parametrize("changes", [{"world_size": 1}, {"world_size": 7}, {"max_tokens_per_micro_batch": 60}], ids=str)
@pytest.mark.parametrize("roles", [ROLES, ("chosen",)])
def test_nothing_but_data_and_seed_decides_the_ids_of_a_step(changes, roles):
    lengths = grouped_lengths(np.random.default_rng(2).integers(0, 14, 50).tolist())
    plan = plan_of(lengths, image_trees=True)
    other = plan_of(lengths, image_trees=True, roles=roles, **changes)
    assert plan.fingerprint == other.fingerprint != plan_of(lengths).fingerprint
    for step in range(15):
        np.testing.assert_array_equal(plan.step_ids(step), other.step_ids(step))
        rows = [row for rank in other.step(step).micro_batches for rows in rank for row in rows]
        assert sorted(rows) == sorted(plan.step_ids(step))


@pytest.mark.parametrize("budget", [60, 90, 400])
@pytest.mark.parametrize("world_size", [1, 3])
def test_rows_hold_what_the_plan_counted(world_size, budget):
    """Collated rows are as long as planned, within the budget, and hold each image once.

    They are shorter where two parts of an image that had to be cut meet again in one row.
    """
    groups = np.random.default_rng(3).integers(0, 9, 40).tolist()
    lengths = grouped_lengths(groups)
    plan = plan_of(
        lengths, image_trees=True, world_size=world_size, max_tokens_per_micro_batch=budget, global_batch_size=16
    )
    shorter = 0
    for step in range(5):
        planned = plan.step(step)
        total = 0
        for rank in planned.micro_batches:
            for rows in rank:
                examples = examples_of(lengths, rows) or [masked_example(DUMMY_SAMPLE, ROLES, I)]
                batch = collate(examples, GEOMETRY, I, image_trees=True)
                assert batch.num_tokens <= budget
                total += batch.num_tokens if rows else 0
                assert len(batch.pixel_values) == max(1, len({groups[row] for row in rows} - {0}))
        whole = len({group or -row for row, group in enumerate(groups) if row in planned.ids})
        assert total == planned.num_tokens or (planned.num_units > whole and total < planned.num_tokens)
        shorter += total < sum(int(plan_of(lengths)._work.tokens[row]) for row in planned.ids)
    assert shorter == 5


def test_a_tree_by_hand():
    """Image tokens once, then two questions with two completions each; a stranger opens a tree of its own."""
    red = torch.full((3, 8, 8), 1, dtype=torch.uint8)
    image = [7, *[I] * PER_IMAGE]

    def example(row, question, chosen, rejected, name="red"):
        completions = [Completion("chosen", np.array(chosen)), Completion("rejected", np.array(rejected))]
        return Example(row, np.array([*image, *question]), completions, [red], [name])

    batch = collate(
        [example(0, [1], [2], [3, 3]), example(1, [4, 4], [5], [6]), example(2, [1], [2], [3], "blue")],
        GEOMETRY,
        I,
        image_trees=True,
    )
    assert batch.token_ids.tolist() == [*image, 1, 2, 3, 3, 4, 4, 5, 6, *image, 1, 2, 3]
    assert batch.segments.parent.tolist() == [-1, 0, 1, 1, 0, 4, 4, -1, 7, 8, 8]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 6, 7, 5, 6, 7, 7, 0, 1, 2, 3, 4, 5, 6, 6]
    assert batch.target_ids.tolist() == [2, 3, 3, 5, 6, 2, 3]
    assert batch.target_positions.tolist() == [5, 5, 7, 10, 10, 18, 18]
    assert batch.feature_index.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert batch.sample_index.tolist() == [0, 1, 2]


def test_a_masked_sample_ends_the_tree():
    lengths = grouped_lengths([5, 5, 5])
    first, _, last = examples_of(lengths, [0, 1, 2])
    batch = collate([first, masked_example(1, ROLES, I), last], GEOMETRY, I, image_trees=True)
    assert batch.segments.parent.tolist() == [-1, 0, 1, 1, -1, 4, 4, -1, 7, 8, 8]
    assert batch.completion_weight[batch.pairs.chosen].tolist() == [1, 0, 1] and len(batch.pixel_values) == 1


def test_a_prompt_that_ends_with_its_image_has_no_question():
    completions = [Completion("chosen", np.array([2])), Completion("rejected", np.array([3]))]
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    example = Example(0, np.array([I] * PER_IMAGE), completions, [image], ["a"])
    batch = collate([example, example], GEOMETRY, I, image_trees=True)
    assert batch.segments.parent.tolist() == [-1, 0, 0, -1, 3, 3]
    assert image_prefix(np.array([1, 2]), I) == 0


def test_an_image_is_cut_where_it_is_too_long_or_more_than_a_rank_s_share():
    lengths = grouped_lengths([5] * 8)
    work = Work(lengths, ROLES, COSTS, lengths.image_groups())
    ids = np.arange(8)
    (whole,) = work.units(ids, max_tokens=10_000, num_shares=1)
    assert whole.places == tuple(range(8))
    assert whole.tokens == int(work.tokens.sum()) - 7 * (PER_IMAGE + 1)
    prefix = PER_IMAGE + 1
    saved = 7 * (prefix + 2.0 * PER_IMAGE + 0.01 * prefix * (prefix + 1) / 2)
    assert whole.cost == pytest.approx(float(work.costs.sum()) - saved)
    parts = work.units(ids, max_tokens=whole.tokens - 1, num_shares=1)
    assert [unit.places for unit in parts] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert len(work.units(ids, max_tokens=10_000, num_shares=4)) >= 4
    assert len(work.units(ids, max_tokens=1, num_shares=1)) == 8


def test_a_mixture_keeps_its_shares_and_its_images_meet_in_the_step():
    """Two sets in equal parts: positions stay mixed, but a step's units are whole images."""
    sources = [MixtureSource("a", (40,), weight=1.0), MixtureSource("b", (40,), weight=1.0)]
    groups = np.concatenate([np.arange(40) // 4, 100 + np.arange(40) // 4])
    order = MixtureOrder(sources, np.ones(80, dtype=bool), 0, groups=groups)
    rows = order.rows(0, 80)
    assert sorted(rows) == list(range(80))
    lengths = grouped_lengths((groups + 1).tolist())
    units = Work(lengths, ROLES, COSTS, groups).units(rows[:40], max_tokens=10_000, num_shares=1)
    assert len(units) < 14  # 40 pairs of 4 an image: ten whole ones, and some cut at the step's ends
