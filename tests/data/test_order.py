"""Laws of the mixture: exact in every block, each set in its own order, an epoch holds what was asked for."""

import hashlib
from fractions import Fraction

import numpy as np
import pytest

from pivot.data.order import BLOCK, EpochOrder, MixtureOrder, MixtureSource, _apportion
from tests.kit.sets import plan_of, random_lengths


def sources(*sizes, **amounts):
    """WeightSources of these sizes in shards of at most 100; `weight=[3, 1]` gives each its amount."""
    made = []
    for i, size in enumerate(sizes):
        shards = tuple([100] * (size // 100) + ([size % 100] if size % 100 else []))
        made.append(MixtureSource(f"set{i}", shards, **{name: values[i] for name, values in amounts.items()}))
    return made


def mix(made, seed=0, kept=None):
    total = sum(source.samples for source in made)
    return MixtureOrder(made, np.ones(total, dtype=bool) if kept is None else kept, seed)


def counts(order, first, count, made):
    starts = np.cumsum([source.samples for source in made])
    return np.bincount(np.searchsorted(starts, order.rows(first, count), side="right"), minlength=len(made)).tolist()


def test_weights_are_exact_in_every_thousand():
    made = sources(3000, 2500, weight=[3, 1])
    order = mix(made)
    assert order.num_rows == 5500
    for block in range(5):
        assert counts(order, block * BLOCK, BLOCK, made) == [750, 250]
    assert counts(order, 5000, 500, made) == [375, 125]
    assert counts(order, 5500, BLOCK, made) == [750, 250]  # the next epoch starts a block


def test_without_amounts_each_row_comes_once_per_epoch():
    made = sources(1700, 333, 42)
    order = mix(made)
    for epoch in range(3):
        assert sorted(order.rows(epoch * 2075, 2075)) == list(range(2075))
    for block in range(2):
        for found, size in zip(counts(order, block * BLOCK, BLOCK, made), (1700, 333, 42), strict=True):
            assert abs(found - BLOCK * size / 2075) < 1


def test_repeat_and_choose():
    """`repeat: 2.5` shows every row of an epoch 2 or 3 times, `choose: 30` 30 others each time."""
    repeated = mix(sources(200, 400, repeat=[2.5, 1]))
    assert repeated.num_rows == 900
    seen = np.bincount(repeated.rows(0, 1800), minlength=600)
    assert set(seen[:200]) == {5} and set(seen[200:]) == {2}
    assert set(np.bincount(repeated.rows(0, 900), minlength=600)[:200]) == {2, 3}
    chosen = mix(sources(90, 100, choose=[30, None]))
    assert chosen.num_rows == 130
    assert set(np.bincount(chosen.rows(0, 390), minlength=190)[:90]) == {1}


def test_each_set_keeps_the_order_that_it_has_alone():
    made = sources(500, 300, weight=[1, 2])
    stream = mix(made, seed=4).rows(0, 800)
    for first, source, own in ((0, made[0], stream[stream < 500]), (500, made[1], stream[stream >= 500])):
        alone = EpochOrder(source.fingerprint, source.shard_sizes, np.ones(source.samples, dtype=bool), 4)
        np.testing.assert_array_equal(own - first, alone.rows(0, len(own)))


def test_any_position_can_be_jumped_to():
    order, again = mix(sources(700, 650)), mix(sources(700, 650))
    stream = order.rows(0, 5000)
    for first in (0, 999, 1000, 1349, 1350, 1351, 3333):
        np.testing.assert_array_equal(again.rows(first, 77), stream[first : first + 77])


def test_seed_and_weights_change_the_order():
    made = sources(700, 650)
    assert mix(made, 0).rows(0, 50).tolist() != mix(made, 1).rows(0, 50).tolist()
    assert mix(made).rows(0, 50).tolist() != mix(sources(700, 650, weight=[1, 2])).rows(0, 50).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_no_prefix_is_off_by_one(seed):
    """Random shares, some tiny: every count at a block's end is next to share * positions, and the total is exact."""
    parts = np.random.default_rng(seed).integers(1, 10 ** np.random.default_rng(seed).integers(1, 6, 30))
    shares = [Fraction(int(part), int(parts.sum())) for part in parts]
    given = _apportion(shares, 40_321)
    ends = [min(block * BLOCK, 40_321) for block in range(len(given))]
    assert given[:, :].sum(axis=1).tolist() == ends and (np.diff(given, axis=0) >= 0).all()
    for end, row in zip(ends, given.tolist(), strict=True):
        assert all(abs(found - share * end) < 1 for found, share in zip(row, shares, strict=True))


def test_golden_mixture():
    """As for one set: the order must never change by itself. Raise ORDER_VERSION first."""
    digest = hashlib.sha256(mix(sources(2000, 3000, weight=[1, 4]), 3).rows(0, 10_000).astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == "fe11deb1cfe53575"


def test_a_plan_over_a_mixture():
    lengths = random_lengths(150)
    made = [MixtureSource("a", (100,), weight=1), MixtureSource("b", (50,), weight=3)]
    plan = plan_of(lengths, mixture=made, shard_sizes=[100, 50])
    assert plan.num_pairs == 150
    assert plan.fingerprint != plan_of(lengths, shard_sizes=[100, 50]).fingerprint
    for changes in ({"world_size": 5}, {"max_tokens_per_micro_batch": 1000}, {"roles": ("chosen",)}):
        other = plan_of(lengths, mixture=made, shard_sizes=[100, 50], **changes)
        assert all(plan.step_ids(step).tolist() == other.step_ids(step).tolist() for step in range(30))
    heavier = [MixtureSource("a", (100,), weight=1), MixtureSource("b", (50,), weight=4)]
    with pytest.raises(ValueError, match="mixture was"):
        plan_of(lengths, mixture=heavier, shard_sizes=[100, 50]).check_state(plan.state(3, 0))
    kept = np.ones(150, dtype=bool)
    kept[:100] = False
    with pytest.raises(ValueError, match="no sample is left of entry 0"):
        mix(made, kept=kept)


def test_an_exclude_list_takes_rows_out_of_the_order_and_enters_the_fingerprint():
    lengths = random_lengths(40)
    excluded = np.zeros(40, dtype=bool)
    excluded[[3, 17]] = True
    plan, other = plan_of(lengths, limit=40), plan_of(lengths, limit=38, excluded=excluded)
    ids = [np.concatenate([p.step_ids(step) for step in range(5)]).tolist() for p in (plan, other)]
    assert [row for row in ids[0] if row not in (3, 17)] == ids[1]
    assert other.exclusions == {"named in data.exclude": 2}
    assert plan_of(lengths, excluded=np.zeros(40, dtype=bool)).fingerprint == plan.fingerprint != other.fingerprint
    with pytest.raises(ValueError, match="data.exclude was .*, is None"):
        plan.check_state(other.state(1, 0))
