"""The guard over a run's steps: which samples it names, when it ends the run, and what it takes for a spike."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pivot.batch import CHOSEN, SAMPLE, PackedBatch
from pivot.config import DPOConfig, SFTConfig
from pivot.data.exclude import read_excluded
from pivot.data.shards import ShardSet
from pivot.objectives import Outcome, PreferenceObjective, SFTObjective, Term
from pivot.run import guard as guard_module
from pivot.run.guard import FEWEST, WINDOW, Recent, StepGuard, copy_for_scoring, own_losses, spike_limit
from pivot.run.log import SKIPPED, RunLog
from pivot.system.distributed import World
from tests.kit.pairs import batch_of, random_pairs, step_loss
from tests.kit.sets import make_set

DPO = PreferenceObjective(DPOConfig())
NAN, INF = math.nan, math.inf


# -- which samples ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [DPO, PreferenceObjective(DPOConfig(loss={"sigmoid": 0.8, "sft": 1.0}))], ids=str)
def test_a_samples_own_loss_is_that_of_a_step_of_its_own(objective: PreferenceObjective) -> None:
    pairs = random_pairs(4)
    pairs[2].weight = 0.0
    logps, batch = batch_of(pairs)
    found = own_losses(objective, copy_for_scoring(batch), logps.detach())
    assert [row for row, _, _ in found] == [0, 1, 3] and all(finite for _, _, finite in found)
    for row, loss, _ in found:
        alone_logps, alone = batch_of([pairs[row]])
        expected = step_loss(objective(alone_logps, alone), pairs[row].counts).item()
        assert loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("objective", [DPO, SFTObjective(SFTConfig())], ids=str)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_one_log_prob_that_is_not_finite_names_its_sample_alone(objective: Any, value: float) -> None:
    """Of the chosen completion, which both objectives read; a masked sample's are anything and are not named."""
    pairs = random_pairs(4)
    pairs[1].chosen[-1] = value
    pairs[3].chosen[:], pairs[3].weight = NAN, 0.0
    logps, batch = batch_of(pairs)
    found = own_losses(objective, batch, logps.detach())
    assert [row for row, _, finite in found if not finite] == [1]
    assert [row for row, _, _ in found] == [0, 1, 2]


def test_a_loss_that_is_finite_with_a_gradient_that_is_not_is_found() -> None:
    """(-x) ** 0.5 at 0: the loss is 0, its slope infinite."""

    class Root:
        roles = (CHOSEN,)

        def __call__(self, token_logps: torch.Tensor, batch: PackedBatch) -> Any:
            own = torch.where(batch.completion_weight > 0, -batch.completion_logps(token_logps), 1.0)
            return Outcome({"root": (1.0, Term(own.sqrt().sum(), SAMPLE))}, {})

    pairs = random_pairs(3)
    pairs[1].chosen[:] = 0.0
    logps, batch = batch_of(pairs, roles=(CHOSEN,))
    found = own_losses(Root(), batch, logps.detach())  # type: ignore[arg-type]  # all that is asked of it
    assert [row for row, loss, finite in found if not finite and math.isfinite(loss)] == [1]


# -- a run's guard ---------------------------------------------------------------------------------------------------


class Run:
    """A guard over a set of 24 pairs, on one rank."""

    def __init__(self, folder: Path, shards: ShardSet, *, max_skipped: int = 3, first_step: int = 0) -> None:
        self.folder, self.shards, self.recent = folder, shards, Recent()
        world = World(0, 1, torch.device("cpu"))
        log = RunLog(folder, first_step=first_step, total_steps=99, is_main=True, tensorboard=False)
        self.guard = StepGuard(folder, shards, DPO, log, world, max_skipped, 10.0)

    def step(
        self, step: int, loss: float, *, skipped: int = 0, bad: tuple[int, ...] = (), spoilt: int | None = None
    ) -> None:
        """A step of rows 0 to 3 and 4 to 7, two micro-batches; of `bad` the log-probs are not finite, of micro-batch
        `spoilt` the loss is not, whatever its log-probs are."""
        for number, rows in enumerate((range(4), range(4, 8))):
            pairs = random_pairs(4, seed=step)
            for place, row in enumerate(rows):
                if row in bad:
                    pairs[place].rejected[0] = NAN
            logps, batch = batch_of(pairs)
            batch.sample_index = torch.tensor(list(rows))
            own = torch.tensor(NAN if number == spoilt or set(rows) & set(bad) else 0.7)
            self.guard.keep(batch, logps.detach(), own)
        self.guard.check(step, {"loss": loss, "skipped_steps": skipped}, self.recent)

    def events(self, kind: str) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]
        return [row for row in rows if row.get("event") == kind]

    def skipped(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / SKIPPED).read_text().splitlines()]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return make_set(tmp_path_factory.mktemp("guarded"))


@pytest.fixture
def run(tmp_path: Path, shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(guard_module.distributed, "gather", lambda own: [own])
    return Run(tmp_path, shards)


def test_a_step_is_put_down_to_the_samples_that_spoilt_it(
    run: Run, shards: ShardSet, capsys: pytest.CaptureFixture[str]
) -> None:
    """Row 6 is the third of the second micro-batch; `data_tools exclude` makes a list of what is named."""
    from data_tools.__main__ import main

    run.step(3, NAN, skipped=1, bad=(6,))
    (line,) = run.skipped()
    assert (line["step"], line["reason"], line["rank"], line["micro_batch"]) == (3, "loss", 0, 1)
    assert line["host"] and {name: line[name] for name in shards.address(6)} == shards.address(6)
    (event,) = run.events("skipped")
    assert (event["step"], event["reason"], event["ranks"], event["num_samples"]) == (3, "loss", [0], 1)
    assert (
        f"step 3: its loss is not finite; {run.folder / SKIPPED} names 1 samples of rank 0" in capsys.readouterr().out
    )
    out = run.folder / "exclude.json"
    assert main(["exclude", str(shards.folder), "--from", str(run.folder / SKIPPED), "--out", str(out)]) == 0
    assert np.flatnonzero(read_excluded(out, shards)).tolist() == [6]


def test_without_a_culprit_all_of_the_step_is_named(run: Run) -> None:
    """As where backward overflowed behind finite log-probs: the loss is finite, the gradient is not."""
    run.step(3, 0.7, skipped=1)
    assert {line["step"] for line in run.skipped()} == {3}
    assert {line["reason"] for line in run.skipped()} == {"gradient"}
    assert [line["ordinal"] + 5 * int(line["shard"][-6:]) for line in run.skipped()] == list(range(8))


def test_a_micro_batch_whose_loss_is_not_finite_without_a_culprit_is_named_whole(run: Run) -> None:
    run.step(3, NAN, skipped=1, spoilt=1)
    assert {(line["micro_batch"], line["reason"]) for line in run.skipped()} == {(1, "loss")}
    assert len(run.skipped()) == 4
    run.step(4, NAN, skipped=1, spoilt=1, bad=(2,))
    assert [line["micro_batch"] for line in run.skipped()[4:]] == [0, 1, 1, 1, 1]


def test_so_many_in_a_row_end_the_run_and_a_good_one_starts_the_count_anew(run: Run) -> None:
    run.step(1, NAN, skipped=1, bad=(0,))
    run.step(2, 0.7, skipped=1)
    run.step(3, 0.7)
    assert run.recent == Recent(losses=[0.7])
    run.step(4, INF, skipped=0, bad=(0,))  # a loss that is infinite can have a finite gradient
    run.step(5, NAN, skipped=1, bad=(1, 2))
    with pytest.raises(RuntimeError, match="3 steps in a row had a loss or gradient that is not finite") as found:
        run.step(6, NAN, skipped=1, bad=(1,))
    said = str(found.value)
    assert f"{run.folder / SKIPPED} names the 4 samples" in said and "train.max_skipped_steps" in said
    assert "data_tools exclude" in said and "lower the learning rates" in said


def test_the_count_lives_on_in_a_checkpoint(run: Run, shards: ShardSet) -> None:
    run.step(1, NAN, skipped=1, bad=(0,))
    run.step(2, NAN, skipped=1, bad=(0,))
    resumed = Run(run.folder, shards, first_step=2)
    resumed.recent.resume_from(json.loads(json.dumps(asdict(run.recent))))
    with pytest.raises(RuntimeError, match="3 steps in a row"):
        resumed.step(3, NAN, skipped=1, bad=(0,))
    assert len(run.skipped()) == 3


def test_what_a_resume_makes_again_is_cut_off(run: Run, shards: ShardSet) -> None:
    for step in (1, 2):
        run.step(step, NAN, skipped=1, bad=(0,))
    Run(run.folder, shards, first_step=1)
    assert [line["step"] for line in run.skipped()] == [1] == [event["step"] for event in run.events("skipped")]
    Run(run.folder, shards, first_step=0)
    assert run.skipped() == [] == run.events("skipped")


# -- spikes ----------------------------------------------------------------------------------------------------------


def noise(count: int, seed: int = 0) -> list[float]:
    return np.random.default_rng(seed).normal(1.0, 0.1, count).tolist()


def test_the_limit_by_hand() -> None:
    """Of 1, 2, .., 21 the median is 11, the median distance from it 5: 11 + 2 * 1.4826 * 5. Older ones do not count."""
    losses = [*[1e9] * 7, *[float(value) for value in range(1, 22)]]
    assert spike_limit(losses[7:], 2.0) == pytest.approx((11.0, 11.0 + 2 * 1.4826 * 5))
    assert spike_limit(losses[8 : 8 + FEWEST - 1], 2.0) is None
    assert spike_limit([1e9] + [1.0, 2.0] * (WINDOW // 2), 2.0) == spike_limit([1.0, 2.0] * (WINDOW // 2), 2.0)


def test_a_spike_is_told_once_with_its_samples(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Three steps that stay up are one spike; a second one, behind a step that came down, is another."""
    losses = [*noise(40), 3.0, 3.5, 2.9, 1.0, 4.0, 1.0]
    for step, loss in enumerate(losses, 1):
        run.step(step, loss)
    assert [event["step"] for event in run.events("spike")] == [41, 45]
    event = run.events("spike")[0]
    assert event["loss"] == 3.0 and event["median"] < event["limit"] < 3.0
    own = [sample["loss"] for sample in event["samples"]]
    assert len(own) == 8 and own == sorted(own, reverse=True)
    assert run.shards.address(0)["dataset"] == event["samples"][0]["dataset"]
    assert capsys.readouterr().out.count("spike      step") == 2


def test_no_switch_no_word(run: Run) -> None:
    run.guard._spike_factor = 0.0
    for step, loss in enumerate([*noise(40), 300.0], 1):
        run.step(step, loss)
    assert (run.folder / "log.jsonl").read_text() == ""


@pytest.mark.parametrize("cut", [5, 30, 41, 42])
def test_a_resumed_run_tells_the_same(run: Run, shards: ShardSet, cut: int) -> None:
    """Killed behind step 60 and gone on from `cut`, also where that lies inside the spike."""
    losses = [*noise(40), 3.0, 3.5, *noise(20, seed=1), 5.0]
    for step, loss in enumerate(losses, 1):
        if step == cut + 1:
            saved = json.dumps(asdict(run.recent))
        run.step(step, loss)
    whole = (run.folder / "log.jsonl").read_text()
    resumed = Run(run.folder, shards, first_step=cut)
    resumed.recent.resume_from(json.loads(saved))
    for step, loss in list(enumerate(losses, 1))[cut:]:
        resumed.step(step, loss)
    assert (run.folder / "log.jsonl").read_text() == whole and len(resumed.events("spike")) == 2
    assert len(resumed.recent.losses) <= WINDOW + 1
