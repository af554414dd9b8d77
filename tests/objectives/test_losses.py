"""The losses against the papers' equations in float64, against TRL's own code, and against their derivatives."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pivot.objectives.losses import LOSSES, REFERENCE_FREE, NumTokens, options_of
from tests.kit.trl_losses import trl_loss

NUM_PAIRS = 64
DEFAULTS = {"beta": 0.1, "label_smoothing": 0.0, "simpo_gamma": 0.5, "bco_shift": 0.0, "discopop_tau": 0.05}
OPTIONS = {"beta": 0.3, "label_smoothing": 0.15, "simpo_gamma": 0.7, "bco_shift": 0.4, "discopop_tau": 0.2}
EXO_DEFAULTS = DEFAULTS | {"label_smoothing": 0.001}  # the paper's: with 0 the loss is infinite, and is refused
PUSHES_OTHERWISE = {"apo_down", "discopop"}  # at the reference; tested below


def evaluate(name: str, scores: list[torch.Tensor], num_tokens: NumTokens, **options: float) -> torch.Tensor:
    """A loss with those of the options that it takes, the others at their defaults."""
    loss, known = LOSSES[name], DEFAULTS | options
    return loss(*scores, num_tokens, **{option: known[option] for option in options_of(loss)})


def random_scores(seed: int = 0) -> tuple[list[torch.Tensor], NumTokens]:
    """Summed log-probs of 1 to 300 tokens, the reference up to a few tens of nats away: both tails of a sigmoid."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 301, (2, NUM_PAIRS))
    policy = -lengths * rng.exponential(1.0, (2, NUM_PAIRS))
    reference = policy + rng.normal(0, 20, (2, NUM_PAIRS))
    scores = [torch.tensor(values, dtype=torch.float32) for values in (*policy, *reference)]
    return scores, NumTokens(*torch.from_numpy(lengths))


def oracle(name: str, scores: list[torch.Tensor], num_tokens: NumTokens, **options: float) -> np.ndarray:
    """Each loss in float64 by the probability that its paper writes down, not by logsigmoid."""
    pw, pl, rw, rl = (score.numpy().astype(np.float64) for score in scores)
    nw, nl = (n.numpy().astype(np.float64) for n in num_tokens)

    def nll(logit: np.ndarray) -> np.ndarray:  # -log(1 / (1 + exp(-logit)))
        return np.logaddexp(0.0, -logit)

    o = SimpleNamespace(**(DEFAULTS | options))
    e = o.label_smoothing
    h = pw - pl - (rw - rl)
    return {
        "sigmoid": lambda: nll(o.beta * h) * (1 - e) + nll(-o.beta * h) * e,
        "robust": lambda: (nll(o.beta * h) * (1 - e) - nll(-o.beta * h) * e) / (1 - 2 * e),
        "ipo": lambda: (h - 0.5 / o.beta) ** 2,
        "hinge": lambda: np.maximum(0.0, 1.0 - o.beta * h),
        "bco_pair": lambda: nll(o.beta * (pw - rw) - o.bco_shift) + nll(-(o.beta * (pl - rl) - o.bco_shift)),
        "simpo": lambda: nll(o.beta / nw * pw - o.beta / nl * pl - o.simpo_gamma),
        "exo_pair": lambda: two_sided_kl(o.beta * h, e),
        "discopop": lambda: (
            nll(o.beta * h) * (1 - logistic(o.beta * h / o.discopop_tau))
            + np.exp(-o.beta * h - nll(o.beta * h / o.discopop_tau))
        ),
        "sigmoid_norm": lambda: nll(o.beta * ((pw - rw) / nw - (pl - rl) / nl)),
        "nca_pair": lambda: nll(o.beta * (pw - rw)) + 0.5 * nll(-o.beta * (pw - rw)) + 0.5 * nll(-o.beta * (pl - rl)),
        "sppo_hard": lambda: (pw - rw - 1 / (2 * o.beta)) ** 2 + (pl - rl + 1 / (2 * o.beta)) ** 2,
        "apo_zero": lambda: 1 - logistic(o.beta * (pw - rw)) + logistic(o.beta * (pl - rl)),
        "apo_down": lambda: logistic(o.beta * (pw - rw)) + 1 - logistic(o.beta * h),
        "orpo": lambda: -pw / nw + o.beta * nll(np.log(odds(pw / nw) / odds(pl / nl))),
    }[name]()


def logistic(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -x))


def odds(logp: np.ndarray) -> np.ndarray:
    return np.exp(logp) / -np.expm1(logp)


def two_sided_kl(margin: np.ndarray, e: float) -> np.ndarray:
    """sum over the two answers of p log(p / label), p the softmax of (margin, 0), its log by logaddexp."""
    log_p = np.stack([-np.logaddexp(0.0, -margin), -np.logaddexp(0.0, margin)])
    return (np.exp(log_p) * (log_p - np.log([[1 - e], [e]]))).sum(0)


@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_papers_equation(name):
    """2e-6: ten times the 2e-7 measured here, which is float32's own rounding."""
    for options in (EXO_DEFAULTS if name == "exo_pair" else DEFAULTS, OPTIONS):
        scores, num_tokens = random_scores()
        found = evaluate(name, scores, num_tokens, **options)
        assert found.shape == (NUM_PAIRS,) and found.dtype == torch.float32
        np.testing.assert_allclose(found, oracle(name, scores, num_tokens, **options), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_papers_equation_to_ten_digits_in_float64(name):
    """1e-10 relative; 1e-14 where a loss is zero but for rounding."""
    for options in (EXO_DEFAULTS if name == "exo_pair" else DEFAULTS, OPTIONS):
        scores, num_tokens = random_scores(seed=6)
        found = evaluate(name, [score.double() for score in scores], num_tokens, **options)
        np.testing.assert_allclose(found, oracle(name, scores, num_tokens, **options), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_equals_a_central_difference_of_the_oracle(name):
    scores, num_tokens = random_scores(seed=1)
    wanted = [score.double().requires_grad_() for score in scores]
    evaluate(name, wanted, num_tokens, **OPTIONS).sum().backward()
    step = 1e-4
    for i, score in enumerate(wanted):
        up, down = ([s.double() + sign * step * (i == j) for j, s in enumerate(scores)] for sign in (1, -1))
        slope = (oracle(name, up, num_tokens, **OPTIONS) - oracle(name, down, num_tokens, **OPTIONS)) / (2 * step)
        gradient = torch.zeros(NUM_PAIRS) if score.grad is None else score.grad
        near_kink = np.abs(oracle("hinge", scores, num_tokens, **OPTIONS)) < 1e-3 if name == "hinge" else False
        np.testing.assert_allclose(np.where(near_kink, slope, gradient), slope, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - PUSHES_OTHERWISE))
def test_descent_raises_chosen_and_lowers_rejected(name):
    """At the reference every loss pushes the pair apart; a loss without a reference has no gradient to it."""
    scores = [torch.tensor([-7.0, -3.0], requires_grad=True) for _ in range(4)]
    num_tokens = NumTokens(torch.tensor([3, 2]), torch.tensor([3, 2]))
    evaluate(name, scores, num_tokens, label_smoothing=0.1).sum().backward()
    policy_chosen, policy_rejected, ref_chosen, _ = (score.grad for score in scores)
    assert (policy_chosen < 0).all() and (policy_rejected > 0).all()
    assert (ref_chosen is None) == (name in REFERENCE_FREE)


def test_apo_down_lowers_the_rejected_answer_alone_at_the_reference():
    """Slopes with beta 0.1: of chosen 0.1 (s'(0) - s'(0)) = 0, of rejected 0.1 s'(0) = 0.1 / 4."""
    scores = [torch.tensor([-7.0], requires_grad=True) for _ in range(4)]
    evaluate("apo_down", scores, NumTokens(torch.tensor([3]), torch.tensor([3]))).sum().backward()
    assert scores[0].grad.item() == 0 and scores[1].grad.item() == pytest.approx(0.025)


def test_discopop_rises_around_the_reference_with_the_papers_tau():
    """At margin 0 the slope is s'(0) / tau (1 - ln 2) - (1 / 2) (1 / 2) - 1 / 2.

    That is 0.784 for tau 0.05, and -0.673 for tau 1.
    """
    for tau, slope in ((0.05, 5 * (1 - math.log(2)) - 0.75), (1.0, 0.25 * (1 - math.log(2)) - 0.75)):
        margin = torch.tensor([0.0], dtype=torch.float64, requires_grad=True)
        zero, one = torch.zeros(1), torch.ones(1, dtype=torch.int64)
        loss = evaluate("discopop", [margin, zero, zero, zero], NumTokens(one, one), beta=1.0, discopop_tau=tau)
        loss.sum().backward()
        assert margin.grad.item() == pytest.approx(slope, rel=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_value_at_the_reference(name):
    """sigmoid, robust: ln 2. ipo: (0 - 1 / 0.2)^2 = 25. hinge: 1 - 0 = 1. bco: 2 ln 2.

    simpo, completions of equal log-prob and length: -log sigmoid(-0.5) = log(1 + e^0.5) = 0.974077.

    exo: (log 0.5 - log 0.8 + log 0.5 - log 0.2) / 2 = 0.223144. discopop: ln 2 / 2 + 1 / 2. sigmoid_norm: ln 2.
    nca: (1 + 1 / 2 + 1 / 2) ln 2. sppo: 2 (1 / 0.2)^2 = 50. apo_zero, apo_down: 1 / 2 + 1 / 2.
    orpo: 11 / 5 + 0.1 ln 2, since the odds are equal.
    """
    scores = [torch.full((3,), -11.0)] * 4
    num_tokens = NumTokens(torch.full((3,), 5), torch.full((3,), 5))
    expected = {
        "sigmoid": math.log(2),
        "robust": math.log(2),
        "ipo": 25.0,
        "hinge": 1.0,
        "bco_pair": 2 * math.log(2),
        "simpo": 0.974077,
        "exo_pair": 0.223144,
        "discopop": math.log(2) / 2 + 0.5,
        "sigmoid_norm": math.log(2),
        "nca_pair": 2 * math.log(2),
        "sppo_hard": 50.0,
        "apo_zero": 1.0,
        "apo_down": 1.0,
        "orpo": 2.2 + 0.1 * math.log(2),
    }[name]
    torch.testing.assert_close(evaluate(name, scores, num_tokens, label_smoothing=0.2), torch.full((3,), expected))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("distance", [1e4, -1e4])
def test_stays_finite_far_away(name, distance):
    """A margin of 2e4 nats: exp(2000) overflows where a loss is not written with care."""
    chosen, rejected = (torch.tensor([sign * distance], requires_grad=True) for sign in (1, -1))
    zero, one = torch.zeros(1), torch.ones(1, dtype=torch.int64)
    loss = evaluate(name, [chosen, rejected, zero, zero], NumTokens(one, one), **OPTIONS)
    loss.sum().backward()
    assert all(torch.isfinite(x).all() for x in (loss, chosen.grad, rejected.grad))


def test_conservative_dpo_is_lowest_at_the_log_odds_of_the_labels():
    """e = 0.2: d/dm of -(0.8 log s(m) + 0.2 log s(-m)) is s(m) - 0.8, zero at m = log(0.8 / 0.2)."""
    margin = torch.tensor([math.log(4.0)], dtype=torch.float64, requires_grad=True)
    zero, one = torch.zeros(1), torch.ones(1, dtype=torch.int64)
    scores = [margin, zero, zero, zero]
    evaluate("sigmoid", scores, NumTokens(one, one), beta=1.0, label_smoothing=0.2).sum().backward()
    assert abs(margin.grad.item()) < 1e-12


def test_robust_loss_is_unbiased_under_flipped_labels():
    """(1 - e) robust(w, l) + e robust(l, w) = clean loss of (w, l)."""
    (pw, pl, rw, rl), num_tokens = random_scores(seed=2)
    e = 0.2
    observed = (1 - e) * evaluate("robust", [pw, pl, rw, rl], num_tokens, label_smoothing=e)
    observed += e * evaluate("robust", [pl, pw, rl, rw], NumTokens(*num_tokens[::-1]), label_smoothing=e)
    torch.testing.assert_close(observed, evaluate("sigmoid", [pw, pl, rw, rl], num_tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "robust", "bco_pair"])
def test_equals_trl(name):
    """TRL's `sigmoid` knows no label smoothing, and its `bco_pair` no shift: compared without.

    Measured 2.4e-7 relative: TRL sums the same log-probs token by token.
    """
    scores, lengths = random_scores(seed=3)
    smoothing = 0.15 if name == "robust" else 0.0
    ours = evaluate(name, scores, lengths, beta=0.1, label_smoothing=smoothing).mean()
    theirs, _ = trl_loss({name: 1.0}, scores, lengths, beta=0.1, smoothing=smoothing)
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", ["exo_pair", "discopop", "nca_pair", "sppo_hard", "apo_zero", "apo_down"])
def test_further_losses_equal_trl(name):
    """Measured 3e-7 relative. TRL's margins of random_scores reach 10, where its discopop is finite."""
    scores, lengths = random_scores(seed=3)
    options = EXO_DEFAULTS | {"discopop_tau": 0.2}
    ours = evaluate(name, scores, lengths, **options).mean()
    theirs, _ = trl_loss({name: 1.0}, scores, lengths, beta=0.1, smoothing=0.001, tau=0.2)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


def test_sigmoid_norm_equals_trl():
    scores, lengths = random_scores(seed=3)
    ours = evaluate("sigmoid_norm", scores, lengths, beta=5.0).mean()
    torch.testing.assert_close(ours, trl_loss({"sigmoid_norm": 1.0}, scores, lengths, beta=5.0)[0], rtol=1e-5, atol=0)


def test_orpo_equals_trls_trainer_but_for_the_nll():
    """TRL's trainer adds the NLL apart, as a mean over the tokens of the micro-batch and its prompts; ours is each
    pair's own mean, as in the paper's eq. 1 and 2."""
    trainer_module = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    scores, lengths = random_scores(seed=5)
    stub = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    chosen, rejected = scores[0] / lengths.chosen, scores[1] / lengths.rejected
    theirs, *_ = trainer_module.ORPOTrainer.odds_ratio_loss(stub, chosen, rejected)
    ours = evaluate("orpo", scores, lengths, beta=0.3)
    torch.testing.assert_close(ours, -chosen - theirs, rtol=1e-5, atol=1e-6)


def test_orpo_stays_finite_where_an_answer_is_certain():
    """log p = 0: the odds are infinite; TRL's loss and gradient are NaN there."""
    certain, likely = torch.zeros(2, requires_grad=True), torch.tensor([0.0, -1.0], requires_grad=True)
    one = torch.ones(2, dtype=torch.int64)
    loss = evaluate("orpo", [certain, likely, torch.zeros(2), torch.zeros(2)], NumTokens(one, one))
    loss.sum().backward()
    assert all(torch.isfinite(x).all() for x in (loss, certain.grad, likely.grad))


def test_ipo_is_the_papers_and_equals_trls_for_single_tokens():
    """We differ on purpose: TRL divides log ratios by the completion's length, the paper's eq. 17 does not."""
    scores, lengths = random_scores(seed=4)
    single = NumTokens(torch.ones(NUM_PAIRS, dtype=torch.int64), torch.ones(NUM_PAIRS, dtype=torch.int64))
    ours = evaluate("ipo", scores, single, beta=0.1).mean()
    torch.testing.assert_close(ours, trl_loss({"ipo": 1.0}, scores, single, beta=0.1)[0], rtol=1e-5, atol=0)
    assert not torch.isclose(ours, trl_loss({"ipo": 1.0}, scores, lengths, beta=0.1)[0], rtol=0.1)


def test_simpo_equals_trls_cpo_trainer():
    """TRL has SimPO in its CPO trainer, an experimental one, which is handed mean log-probs."""
    trainer_module = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    scores, lengths = random_scores(seed=5)
    stub = SimpleNamespace(
        alpha=0.0,
        beta=2.0,
        simpo_gamma=0.7,
        label_smoothing=0.0,
        loss_type="simpo",
        accelerator=SimpleNamespace(device="cpu"),
    )
    theirs, _, _ = trainer_module.CPOTrainer.cpo_loss(stub, scores[0] / lengths.chosen, scores[1] / lengths.rejected)
    ours = evaluate("simpo", scores, lengths, beta=2.0, simpo_gamma=0.7)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
