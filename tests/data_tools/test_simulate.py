"""What `simulate` prints is what training would see: ids by step and rank, from the plan and from real loaders."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_tools.__main__ import main
from data_tools.letters import LetterProcessor, letter_lengths
from pivot.data.lengths import LENGTH_RECORD, Lengths, build_lengths, load_lengths
from pivot.data.shards import ShardSet
from pivot.data.units import Costs
from tests.kit.sets import make_set, plan_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("simulate"), count=60)


def simulate(capsys, folder, *arguments):
    command = ["simulate", str(folder), "--global-batch-size", "12", "--seed", "3", "--json", *map(str, arguments)]
    assert main(command) == 0
    return json.loads(capsys.readouterr().out)


def batches(document):
    return [sorted(id for rank in step["ranks"] for id in rank) for step in document["steps"]]


def test_the_document(packed, capsys):
    found = simulate(capsys, packed.folder, "--world-size", 3, "--steps", 4)
    assert set(found) == {"balance", "steps_per_epoch", "steps"}
    assert found["steps_per_epoch"] == 5.0 and 1.0 <= found["balance"] < 1.3
    assert [step["step"] for step in found["steps"]] == [0, 1, 2, 3]
    assert [[len(rank) for rank in step["ranks"]] for step in found["steps"]] == [[4, 4, 4]] * 4 or all(
        sum(len(rank) for rank in step["ranks"]) == 12 for step in found["steps"]
    )
    assert all(id.startswith("source/r") for step in found["steps"] for rank in step["ranks"] for id in rank)
    assert sorted(id for batch in batches(simulate(capsys, packed.folder, "--steps", 5)) for id in batch) == sorted(
        packed.read_text(row)["id"] for row in range(60)
    )


def check_grid(capsys, folder, grid, steps):
    expected = batches(simulate(capsys, folder, "--steps", steps))
    for world_size, workers in grid:
        options = ("--world-size", world_size, "--steps", steps)
        planned = simulate(capsys, folder, *options)
        read = simulate(capsys, folder, *options, "--real", "--workers", workers)
        assert batches(planned) == expected, (world_size, workers)
        assert read == planned, (world_size, workers)


def test_ranks_and_real_workers_change_no_global_batch(packed, capsys):
    check_grid(capsys, packed.folder, [(1, 0), (2, 1), (3, 2), (6, 0)], steps=3)


@pytest.mark.slow
def test_ranks_and_real_workers_change_no_global_batch_in_the_whole_grid(packed, capsys):
    check_grid(capsys, packed.folder, [(w, k) for w in (1, 2, 3, 4, 6) for k in (0, 1, 2, 4)], steps=7)


def test_the_stand_in_counts_what_the_index_says(packed, tmp_path):
    build_lengths(packed, LetterProcessor(), tmp_path)
    counted, told = load_lengths(packed, LetterProcessor(), tmp_path), letter_lengths(packed)
    for column in ("prompt", "chosen", "rejected", "image"):
        np.testing.assert_array_equal(getattr(counted, column), getattr(told, column))


def test_a_later_start_is_a_jump(packed, capsys):
    whole = simulate(capsys, packed.folder, "--world-size", 2, "--steps", 9)
    rest = simulate(capsys, packed.folder, "--world-size", 2, "--steps", 3, "--first-step", 6)
    assert rest["steps"] == whole["steps"][6:]


def mmpr_like(seed, count=4096):
    """Log-normal completions with a long tail, images of 576 tokens in nine pairs of ten."""
    random = np.random.default_rng(seed)
    records = np.zeros(count, dtype=LENGTH_RECORD)
    records["image"] = np.where(random.random(count) < 0.9, 576, 0)
    records["prompt"] = records["image"] + np.clip(random.lognormal(3.7, 0.9, count), 5, 1000)
    for role in ("chosen", "rejected"):
        records[role] = np.clip(random.lognormal(4.6, 1.0, count), 2, 1200)
    return Lengths.from_records(records)


@pytest.mark.parametrize("pairs_a_rank", [8, 9, 12, 32])
def test_ranks_are_even_at_every_step_with_lengths_like_mmprs(pairs_a_rank):
    """Costliest over mean rank at most 1.05; measured 1.010 at most, and 1.070 by the greedy deal alone."""
    costs = Costs(per_token=2e9, per_image_token=1e9, per_attention=2e5)
    for seed in range(3):
        lengths = mmpr_like(seed)
        for world_size in (2, 3, 4, 8, 16, 32):
            plan = plan_of(
                lengths,
                global_batch_size=pairs_a_rank * world_size,
                world_size=world_size,
                max_tokens=4096,
                max_tokens_per_micro_batch=8192,
                costs=costs,
            )
            worst = max(1 / plan.step(step).balance for step in range(int(plan.steps_per_epoch)))
            assert worst <= 1.05, (seed, world_size)


def test_wrong_requests(packed, tmp_path, capsys):
    assert main(["simulate", "--world-size", "2"]) == 2
    assert "name a packed set" in capsys.readouterr().err
    assert main(["simulate", str(tmp_path)]) == 2


# -- kill -9 and resume ------------------------------------------------------------------------------------------------

RUN = """
import json, sys, time
from pathlib import Path
from data_tools.letters import LetterProcessor, letter_lengths
from pivot.data.loader import Loader
from pivot.data.shards import ShardSet
from tests.kit.sets import plan_of

folder, out, world_size, workers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
shards = ShardSet.open(folder)
plan = plan_of(letter_lengths(shards), fingerprint=shards.fingerprint, shard_sizes=shards.shard_sizes, seed=3,
    global_batch_size=12, world_size=world_size, max_tokens=10**6, max_tokens_per_micro_batch=10**6)
state = json.loads((out / "state.json").read_text()) if (out / "state.json").exists() else plan.state(0, 0)
first = plan.check_state(state)
loaders = [iter(Loader(shards, plan, LetterProcessor(), rank=r, first_step=first, workers=workers))
           for r in range(world_size)]
for step in range(first, 400):
    seen = []
    for loader in loaders:
        _, micro_batches = next(loader)
        seen += [int(row) for batch in micro_batches for row in batch.sample_index if row >= 0]
    with (out / "log.jsonl").open("a") as log:
        log.write(json.dumps([step, sorted(seen)]) + "\\n")
    part = out / "state.part"
    part.write_text(json.dumps(plan.state(step + 1, 0)))
    part.replace(out / "state.json")
"""


@pytest.mark.slow
def test_killed_at_random_steps_and_resumed_on_other_worlds(packed, tmp_path):
    """kill -9 twenty times: the steps that count (the last writing of each) are those of an unbroken run."""
    rng, log = random.Random(0), tmp_path / "log.jsonl"
    for attempt in range(20):
        world_size, workers = rng.choice([1, 2, 3, 4, 6]), rng.choice([0, 1])
        before = len(log.read_text().splitlines()) if log.exists() else 0
        command = [sys.executable, "-c", RUN, str(packed.folder), str(tmp_path), str(world_size), str(workers)]
        run = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        wanted, deadline = before + rng.randint(1, 8), time.monotonic() + 60
        while time.monotonic() < deadline and run.poll() is None:
            if log.exists() and len(log.read_text().splitlines()) >= wanted:
                break
            time.sleep(0.005)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        assert len(log.read_text().splitlines()) > before, f"attempt {attempt} did nothing"
    shards = ShardSet.open(packed.folder)
    plan = plan_of(letter_lengths(shards), fingerprint=shards.fingerprint, shard_sizes=shards.shard_sizes, seed=3,
        global_batch_size=12, max_tokens=10**6, max_tokens_per_micro_batch=10**6)  # fmt: skip
    steps = {}
    for line in log.read_text().splitlines():
        step, ids = json.loads(line)
        assert steps.setdefault(step, ids) == ids, "a step that was run again held other ids"
    assert sorted(steps) == list(range(len(steps))) and len(steps) >= 20
    assert all(ids == sorted(plan.step_ids(step).tolist()) for step, ids in steps.items())
