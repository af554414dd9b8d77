"""What the trainer sees: the same whatever the workers, the ranks, the budget; damage masked; resume is a jump."""

import json
import multiprocessing
import os
import shutil
import signal
import time

import pytest
import torch

from pivot.batch import SAMPLE, TARGET_TOKEN
from pivot.data import loader as loader_module
from pivot.data.loader import Loader
from pivot.data.shards import ShardSet
from pivot.system import workers as workers_module
from tests.kit.batches import assert_equal_batches, take
from tests.kit.damage import flip_bit
from tests.kit.sets import FakeProcessor, make_plan, make_set


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("loader"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def ids(steps):
    return [sorted(int(i) for batch in step for i in batch.sample_index if i >= 0) for step in steps]


def test_workers_change_nothing(packed, cache):
    plan = make_plan(packed, cache, max_tokens_per_micro_batch=120)
    alone = take(Loader(packed, plan, FakeProcessor(), rank=1), 4)
    assert max(len(step) for step in alone) > 1
    for workers in (1, 2):
        loader = Loader(packed, plan, FakeProcessor(), rank=1, workers=workers)
        helped = take(loader, 4)
        assert loader.data_wait_s > 0
        for step, other in zip(alone, helped, strict=True):
            for left, right in zip(step, other, strict=True):
                assert_equal_batches(left, right)


@pytest.mark.parametrize("world_size", [1, 3])
def test_all_ranks_together_hold_the_step(packed, cache, world_size):
    plan = make_plan(packed, cache, world_size=world_size, max_tokens_per_micro_batch=120)
    ranks = [take(Loader(packed, plan, FakeProcessor(), rank=rank), 4) for rank in range(world_size)]
    for step in range(4):
        assert len({len(rank[step]) for rank in ranks}) == 1
        together = sorted(i for rank in ranks for i in ids([rank[step]])[0])
        assert together == sorted(plan.step_ids(step))
        counts = plan.step(step).counts
        batches = [batch for rank in ranks for batch in rank[step]]
        assert sum(float(batch.completion_weight[batch.pairs.chosen].sum()) for batch in batches) == counts[SAMPLE]
        weighted = sum(int((batch.completion_tokens * batch.completion_weight).sum()) for batch in batches)
        assert weighted == counts[TARGET_TOKEN]


def test_sft_sees_the_same_samples(packed, cache):
    both = make_plan(packed, cache, world_size=1)
    chosen = make_plan(packed, cache, world_size=1, roles=("chosen",), max_tokens_per_micro_batch=90)
    pairs = take(Loader(packed, both, FakeProcessor()), 3)
    samples = take(Loader(packed, chosen, FakeProcessor()), 3)
    assert ids(pairs) == ids(samples)
    batch = samples[0][0]
    assert batch.completions_of["chosen"].tolist() == list(range(batch.num_completions))
    assert batch.num_completions == batch.num_groups and not len(batch.pairs.chosen)


def test_a_resumed_stream_equals_an_unbroken_one(packed, cache):
    plan = make_plan(packed, cache)
    unbroken = take(Loader(packed, plan, FakeProcessor()), 6)
    first_step = plan.check_state(plan.state(steps=4, masked=0))
    resumed = take(Loader(packed, plan, FakeProcessor(), first_step=first_step), 2)
    for step, other in zip(unbroken[4:], resumed, strict=True):
        for left, right in zip(step, other, strict=True):
            assert_equal_batches(left, right)


def test_a_limit_visits_each_pair_once(packed, cache):
    plan = make_plan(packed, cache, limit=24, world_size=1, global_batch_size=7)
    seen = [i for step in ids(take(Loader(packed, plan, FakeProcessor()), 100)) for i in step]
    assert sorted(seen) == list(range(24))


def test_what_the_caller_leaves_unread_belongs_to_its_step(packed, cache):
    plan = make_plan(packed, cache, max_tokens_per_micro_batch=120)
    steps = [int(step_plan.step) for _, (step_plan, _) in zip(range(3), Loader(packed, plan, FakeProcessor()))]  # noqa: B905
    assert steps == [0, 1, 2]


def test_the_trainers_random_state_is_left_alone(packed, cache):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    take(Loader(packed, make_plan(packed, cache), FakeProcessor(), workers=1), 1)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_flipped_bit_masks_one_sample_and_is_written_down(packed, cache, tmp_path, workers):
    whole = make_plan(packed, cache, world_size=1)
    damaged = ShardSet.open(shutil.copytree(packed.folder, tmp_path / "set"))
    row = int(whole.step_ids(0)[2])
    flip_bit(damaged, row)
    loader = Loader(damaged, whole, FakeProcessor(), workers=workers, bad_samples_dir=tmp_path)
    found, expected = take(loader, 2), take(Loader(packed, whole, FakeProcessor()), 2)
    assert ids(found) == ids(expected)
    weights = {
        int(i): float(w)
        for b in found[0]
        for i, w in zip(b.sample_index, b.completion_weight[b.pairs.chosen], strict=True)
    }
    assert weights.pop(row) == 0 and set(weights.values()) == {1}
    assert loader.num_masked == 1
    record = json.loads((tmp_path / "bad-samples-rank0.jsonl").read_text())
    assert record["shard"] == damaged.shards[damaged.locate(row)[0]].name and record["step"] == 0
    assert "crc32 differs" in record["reason"]


def test_an_image_that_cannot_be_decoded_masks_its_sample(packed, cache, monkeypatch):
    def refuse(data, geometry):
        raise loader_module.ImageError("no")

    monkeypatch.setattr(loader_module, "load_image", refuse)
    monkeypatch.setattr(loader_module, "MIN_BAD", 100)
    loader = Loader(packed, make_plan(packed, cache, world_size=1, global_batch_size=24), FakeProcessor())
    take(loader, 1)
    assert loader.num_masked == 18  # three of four rows have an image


def test_too_much_damage_stops(packed, cache, tmp_path):
    plan = make_plan(packed, cache, world_size=1, global_batch_size=24)
    damaged = ShardSet.open(shutil.copytree(packed.folder, tmp_path / "set"))
    for row in range(6):
        flip_bit(damaged, row)
    with pytest.raises(RuntimeError, match=r"6 of \d+ samples read by rank 0 are damaged"):
        take(Loader(damaged, plan, FakeProcessor()), 1)


def test_too_many_in_a_row_stop(packed, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(loader_module, "MIN_BAD", 100)
    monkeypatch.setattr(loader_module, "MAX_BAD_IN_A_ROW", 3)
    damaged = ShardSet.open(shutil.copytree(packed.folder, tmp_path / "set"))
    for row in range(24):
        flip_bit(damaged, row)
    with pytest.raises(RuntimeError, match=r"4 of 4 samples .* \(4 in a row"):
        take(Loader(damaged, make_plan(packed, cache, world_size=1), FakeProcessor()), 1)


def test_a_length_that_differs_from_the_plan_is_an_error(packed, cache):
    plan = make_plan(packed, cache, world_size=1, global_batch_size=24)
    plan.lengths.chosen[9] += 1
    with pytest.raises(ValueError, match=r"tiny-000001.tar sample 4 \(row 9\): .*'chosen': .* the plan counted"):
        take(Loader(packed, plan, FakeProcessor()), 1)
    plan.lengths.chosen[9] -= 1


def stop_one_worker(others):
    """Stop a worker that is none of the processes that were there before."""
    own = [process for process in multiprocessing.active_children() if process not in others]
    os.kill(own[0].pid, signal.SIGSTOP)


def test_a_loader_ends_though_a_worker_is_stuck(packed, cache, monkeypatch, recwarn):
    """It ignores SIGTERM, which clusters send to all; torch's error for a killed worker reaches nobody."""
    monkeypatch.setattr(workers_module, "END_WITHIN_S", 0.5)
    others = multiprocessing.active_children()
    steps = iter(Loader(packed, make_plan(packed, cache), FakeProcessor(), workers=2))
    _, micro_batches = next(steps)
    stop_one_worker(others)
    started = time.monotonic()
    steps.close()
    assert time.monotonic() - started < 60
    assert set(multiprocessing.active_children()) <= set(others)
    assert next(micro_batches, None) is not None  # the batch that was read
    assert not [warning for warning in recwarn if "killed by signal" in str(warning.message)]


class Hanging(FakeProcessor):
    """Its worker never comes back, as from a file system that went away."""

    def encode(self, *args, **kwargs):
        time.sleep(600)


def test_a_batch_that_never_comes_is_said(packed, cache, monkeypatch):
    monkeypatch.setattr(workers_module, "END_WITHIN_S", 0.5)
    loader = Loader(packed, make_plan(packed, cache), Hanging(), workers=1, timeout_s=1)
    with pytest.raises(RuntimeError, match=r"rank 0 got no batch within 1 s .*file system"):
        take(loader, 1)
