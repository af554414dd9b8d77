"""AOT over a step: against sorting in float64, against TRL, and the same however the step is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pivot.config import DPOConfig
from pivot.objectives import PreferenceObjective
from pivot.objectives.losses import NumTokens
from pivot.objectives.matching import match_step
from pivot.objectives.step_losses import MATCHES, STEP_LOSSES
from pivot.system.distributed import World
from tests.kit.pairs import Pair, batch_of, random_pairs, step_counts, step_loss, step_metrics
from tests.kit.trl_losses import trl_loss

NUM_PAIRS = 50
ONES = NumTokens(torch.ones(NUM_PAIRS, dtype=torch.int64), torch.ones(NUM_PAIRS, dtype=torch.int64))
ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr("pivot.system.distributed.gather", lambda value: [value])


def random_scores(seed: int) -> list[torch.Tensor]:
    rng = np.random.default_rng(seed)
    policy = -rng.exponential(40.0, (2, NUM_PAIRS))
    reference = policy + rng.normal(0, 20, (2, NUM_PAIRS))
    return [torch.tensor(values, dtype=torch.float32) for values in (*policy, *reference)]


def oracle(name: str, scores: list[torch.Tensor], beta: float, smoothing: float) -> float:
    """The step's mean in float64 by sorted quantiles."""
    pw, pl, rw, rl = (score.double().numpy() for score in scores)
    upper, lower = (pw - pl, rw - rl) if name == "aot" else (pw - rw, pl - rl)
    margin = beta * (np.sort(upper) - np.sort(lower))
    return float(((1 - smoothing) * np.logaddexp(0, -margin) + smoothing * np.logaddexp(0, margin)).mean())


@pytest.mark.parametrize("name", STEP_LOSSES)
def test_equals_sorted_quantiles_to_ten_digits_in_float64(name):
    scores = random_scores(1)
    found = STEP_LOSSES[name](*(s.double() for s in scores), ONES, beta=0.3, label_smoothing=0.15)
    assert found.shape == (NUM_PAIRS,)
    assert found.mean().item() == pytest.approx(oracle(name, scores, 0.3, 0.15), rel=1e-10)


@pytest.mark.parametrize("name", STEP_LOSSES)
def test_gradient_equals_a_central_difference(name):
    """Of the policy's scores; a step of 1e-4 changes no place in the order here."""
    scores = random_scores(2)
    leaves = [score.double().requires_grad_() for score in scores]
    STEP_LOSSES[name](*leaves, ONES, beta=0.3, label_smoothing=0.15).mean().backward()
    for i in (0, 1):
        for j in range(0, NUM_PAIRS, 7):
            ends = []
            for sign in (1, -1):
                moved = [score.double() for score in scores]
                moved[i][j] += sign * 1e-4
                ends.append(oracle(name, moved, 0.3, 0.15))
            assert leaves[i].grad[j].item() == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("name", STEP_LOSSES)
def test_equals_trl_where_the_step_is_one_micro_batch(name):
    scores = random_scores(3)
    ours = STEP_LOSSES[name](*scores, ONES, beta=0.1, label_smoothing=0.15).mean()
    theirs, _ = trl_loss({name: 1.0}, scores, ONES, beta=0.1, smoothing=0.15)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


def run(loss, parts: list[list[Pair]], counts) -> tuple[float, dict, torch.Tensor]:
    """(loss, metrics, gradient of each target's log-prob) of a step that is cut into `parts`."""
    objective = PreferenceObjective(DPOConfig(loss=loss))
    batches = [batch_of(part) for part in parts]
    match_step(objective.matching, [batch for _, batch in batches], [logps.detach() for logps, _ in batches], ALONE)
    outcomes = [objective(token_logps, batch) for token_logps, batch in batches]
    losses = [step_loss(outcome, counts) for outcome in outcomes]
    sum(losses).backward()
    metrics = [step_metrics(outcome, counts) for outcome in outcomes]
    summed = {name: sum(part[name] for part in metrics) for name in metrics[0]}
    return sum(losses).item(), summed, torch.cat([token_logps.grad for token_logps, _ in batches])


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired", {"aot": 0.5, "aot_unpaired": 0.3, "sft": 1.0}], ids=str)
@pytest.mark.parametrize("cuts", [[1] * 7, [3, 4], [6, 1]], ids=str)
def test_any_split_into_micro_batches_gives_the_same_step(loss, cuts):
    """Sorting within each part would not: see the next test."""
    pairs = random_pairs(7)
    counts = step_counts(pairs)
    ends = np.cumsum(cuts)
    parts = [pairs[end - size : end] for end, size in zip(ends, cuts, strict=True)]
    whole, cut = run(loss, [pairs], counts), run(loss, parts, counts)
    assert cut[0] == pytest.approx(whole[0], rel=1e-5)
    torch.testing.assert_close(cut[2], whole[2], rtol=1e-5, atol=1e-6)
    for name, value in whole[1].items():
        assert cut[1][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_sorting_the_parts_alone_gives_another_gradient():
    pairs = random_pairs(7)
    whole = run("aot_unpaired", [pairs], step_counts(pairs))
    apart = [run("aot_unpaired", [part], step_counts(part)) for part in (pairs[:3], pairs[3:])]
    gradient = torch.cat([part[2] * size / 7 for part, size in zip(apart, (3, 4), strict=True)])
    assert (gradient - whole[2]).abs().max() > 0.01 * whole[2].abs().max()


@pytest.mark.parametrize("name", STEP_LOSSES)
def test_a_masked_pair_is_compared_with_nothing(name):
    """The sums of seven pairs are bit for bit the same beside a masked one of NaN."""
    good = random_pairs(7)
    broken = Pair(torch.full((4,), torch.nan), torch.full((2,), torch.nan), (torch.nan, torch.nan), weight=0.0)
    counts = step_counts([*good, broken])
    wanted, found = run(name, [good], counts), run(name, [good[:3], [*good[3:], broken]], counts)
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    torch.testing.assert_close(found[2][:-6], wanted[2], rtol=1e-5, atol=1e-7)
    assert found[2][-6:].equal(torch.zeros(6))


def test_ties_get_places_of_their_own():
    """Log ratios of 0 everywhere, as at the start of a run: each is compared with 0, and none is left without."""
    zeros = torch.zeros(5)
    for match in MATCHES.values():
        partners = match(zeros, zeros, zeros, zeros)
        assert partners.chosen.equal(zeros) and partners.rejected.equal(zeros)
