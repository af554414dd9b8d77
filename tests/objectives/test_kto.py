"""KTO: against its equation in float64 and TRL's trainer; splits add up, masks add zero, the KL comes a step late."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from pivot.batch import ANSWER, CHOSEN, MISMATCHED, REFERENCE, REJECTED
from pivot.config import KTOConfig
from pivot.objectives import KTOObjective
from pivot.objectives.kto import desirable_loss, undesirable_loss
from tests.kit.pairs import batch_of as batch_of_pairs
from tests.kit.pairs import random_pairs, step_loss, step_metrics
from tests.kit.single_answers import Answer, batch_of, random_answers, step_counts
from tests.kit.trl_losses import trl_kto_loss


def build(kl: float = 0.0, **options) -> KTOObjective:
    objective = KTOObjective(KTOConfig(**options))
    objective.kl = kl
    return objective


def run(objective, answers, counts):
    """(loss, metrics, gradient of each target's log-prob) of one micro-batch within a step of `counts`."""
    token_logps, batch = batch_of(answers, borrowed=MISMATCHED in objective.roles)
    outcome = objective(token_logps, batch)
    loss = step_loss(outcome, counts)
    loss.backward()
    return loss.detach(), step_metrics(outcome, counts), token_logps.grad


def value(reward: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -reward))


@pytest.mark.parametrize("kl", [0.0, 3.7])
def test_equals_the_papers_equation_to_ten_digits_in_float64(kl):
    """Eq. 8: lambda - v, v = lambda s(beta (r - z0)) for good answers and lambda s(beta (z0 - r)) for bad ones."""
    ratio = np.random.default_rng(0).normal(0, 30, 100)
    good = desirable_loss(torch.tensor(ratio), kl, beta=0.3).numpy()
    bad = undesirable_loss(torch.tensor(ratio), kl, beta=0.3).numpy()
    np.testing.assert_allclose(good, value(-0.3 * (ratio - kl)), rtol=1e-10)
    np.testing.assert_allclose(bad, value(-0.3 * (kl - ratio)), rtol=1e-10)
    np.testing.assert_allclose(good, 1 - value(0.3 * (ratio - kl)), rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(bad, 1 - value(0.3 * (kl - ratio)), rtol=1e-10, atol=1e-14)


def test_equals_trl_given_its_kl():
    """TRL's KL is that of the same micro-batch: a first call gives it here, and the second stands on it."""
    answers, weights = random_answers(20, seed=1), (1.0, 1.4)
    theirs, their_metrics = trl_kto_loss(answers, 0.2, weights)
    assert their_metrics["kl"] > 0.1
    counts = step_counts(answers)
    objective = build(beta=0.2, desirable_weight=weights[0], undesirable_weight=weights[1])
    objective.after_step(run(objective, answers, counts)[1])
    ours, metrics, _ = run(objective, answers, counts)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    for name, found in metrics.items():
        assert found == pytest.approx(their_metrics[name], rel=1e-5, abs=1e-6), name
    assert set(metrics) == {"kl", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"}


def test_without_a_baseline_it_is_trls_apo_zero_unpaired():
    answers = random_answers(20, seed=2)
    theirs, _ = trl_kto_loss(answers, 0.2, (1.0, 1.4), loss_type="apo_zero_unpaired")
    objective = build(beta=0.2, undesirable_weight=1.4, baseline="none")
    assert objective.roles == (CHOSEN, REJECTED) and not objective.metrics_every_step
    ours, metrics, _ = run(objective, answers, step_counts(answers))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    assert "kl" not in metrics and objective.state_dict() == {}


@pytest.mark.parametrize("cuts", [[1] * 7, [3, 4], [6, 1]], ids=str)
def test_any_split_into_micro_batches_gives_the_same_step(cuts):
    """Also where a micro-batch holds good answers alone. 1e-5 relative: float32 sums in another order."""
    answers, objective = random_answers(7), build(kl=0.8)
    counts = step_counts(answers)
    whole = run(objective, answers, counts)
    ends = np.cumsum(cuts)
    parts = [run(objective, answers[end - size : end], counts) for end, size in zip(ends, cuts, strict=True)]
    torch.testing.assert_close(sum(part[0] for part in parts), whole[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat([part[2] for part in parts]), whole[2], rtol=1e-5, atol=1e-6)
    for name, wanted in whole[1].items():
        assert sum(part[1][name] for part in parts) == pytest.approx(wanted, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_masked_answer_adds_exactly_zero(bad):
    good = random_answers(4)
    broken = Answer(torch.full((4,), bad), bad, True, torch.full((2,), bad), bad, weight=0.0)
    counts, objective = step_counts([*good, broken]), build(kl=0.5)
    wanted, found = run(objective, good, counts), run(objective, [*good, broken], counts)
    assert found[0].equal(wanted[0]) and found[1] == wanted[1]
    assert found[2][:-6].equal(wanted[2]) and found[2][-6:].equal(torch.zeros(6))


def test_borrowed_answers_are_learned_from_by_nobody():
    answers = random_answers(3)
    gradient = run(build(kl=0.5), answers, step_counts(answers))[2]
    place = 0
    for answer in answers:
        place += len(answer.logps)
        assert gradient[place - len(answer.logps) : place].abs().min() > 0
        assert not gradient[place : place + len(answer.other_logps)].any()
        place += len(answer.other_logps)


def test_numbers_of_hand_made_answers():
    """beta 0.5, KL 1. Good: -3 to -5, ratio 2, loss s(-0.5 (2 - 1)) = 0.377541. Bad, weight 2: ratio -1, loss
    s(-0.5 (1 + 1)) = 0.268941 twice. Mean of two answers (0.377541 + 0.537883) / 2 = 0.457712. Borrowed: 1 and 3."""
    good = Answer(torch.tensor([-1.0, -2.0]), -5.0, True, torch.tensor([-1.0]), -2.0)
    bad = Answer(torch.tensor([-4.0]), -3.0, False, torch.tensor([-2.0, -2.0]), -7.0)
    objective = build(kl=1.0, beta=0.5, undesirable_weight=2.0)
    loss, metrics, _ = run(objective, [good, bad], step_counts([good, bad]))
    assert loss.item() == pytest.approx(0.457712, abs=1e-6)
    assert metrics == {
        "rewards/chosen": 1.0,
        "rewards/rejected": -0.5,
        "logps/chosen": -3.0,
        "logps/rejected": -4.0,
        "kl": 2.0,
    }


def test_at_the_reference_every_loss_is_a_half():
    answers = random_answers(6)
    token_logps, batch = batch_of(answers)
    batch.completion_values[REFERENCE] = batch.completion_logps(token_logps.detach())
    outcome = build()(token_logps, batch)
    assert step_loss(outcome, step_counts(answers)).item() == pytest.approx(0.5, abs=1e-7)
    assert step_metrics(outcome, step_counts(answers))["kl"] == 0


def test_the_kl_of_a_step_serves_the_next_and_survives_a_restart():
    """0 at first; 2.5 from a step of 2.5; 0 from one of -1, since no KL is negative; kept where it is not finite."""
    objective = build()
    assert objective.metrics_every_step and objective.kl == 0
    for kl, kept in ((2.5, 2.5), (-1.0, 0.0), (0.3, 0.3), (math.nan, 0.3)):
        objective.after_step({"kl": kl})
        assert objective.kl == kept
    resumed = build()
    resumed.load_state_dict(objective.state_dict())
    assert resumed.kl == 0.3
    with pytest.raises(ValueError, match="resume with the objective.kto settings"):
        build(baseline="none").load_state_dict(objective.state_dict())


def test_a_pair_is_read_as_two_answers():
    """Of three pairs six answers: their mean is that of the same answers one by one, and so are both rewards."""
    pairs = random_pairs(3)
    token_logps, batch = batch_of_pairs(pairs)
    counts = batch.counts((CHOSEN, REJECTED))
    assert counts[ANSWER] == 6
    objective = build(baseline="none")
    found = objective(token_logps, batch)
    none = torch.zeros(1)
    single = [Answer(p.chosen, p.reference[0], True, none, 0.0) for p in pairs]
    single += [Answer(p.rejected, p.reference[1], False, none, 0.0) for p in pairs]
    wanted = run(objective, single, step_counts(single))
    torch.testing.assert_close(step_loss(found, counts).detach(), wanted[0])
    assert step_metrics(found, counts) == pytest.approx(wanted[1], rel=1e-6)


def test_a_step_without_bad_answers_has_a_mean():
    answers = [dataclasses.replace(answer, desirable=True) for answer in random_answers(3)]
    loss, metrics, _ = run(build(), answers, step_counts(answers))
    assert torch.isfinite(loss) and metrics["rewards/rejected"] == 0


def test_two_weights_of_nothing_are_refused():
    with pytest.raises(ValueError, match="desirable_weight and undesirable_weight are both 0"):
        build(desirable_weight=0.0, undesirable_weight=0.0)
