"""The divergences of f-DPO: against the papers' f', against TRL, and within the losses that take them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pivot.config import DPOConfig
from pivot.objectives import PreferenceObjective
from pivot.objectives.divergences import DIVERGENCES
from pivot.objectives.losses import LOSSES, OF_THE_MARGIN, NumTokens
from tests.kit.pairs import batch_of, random_pairs, step_counts, step_loss
from tests.kit.trl_losses import trl_loss

ALPHA = 0.3


def slope_of_f(kind: str, t: np.ndarray) -> np.ndarray:
    """d/dt of f in float64 by a central difference; f of table 1 of arxiv.org/abs/2309.16240 (alpha: TRL's 1 - alpha).

    forward_kl: -log t. js: t log t - (1 + t) log((1 + t) / 2). alpha a: (t^a - a t) / (a (a - 1)).
    """
    f = {
        "reverse_kl": lambda t: t * np.log(t),
        "forward_kl": lambda t: -np.log(t),
        "js_divergence": lambda t: t * np.log(t) - (1 + t) * np.log((1 + t) / 2),
        "alpha_divergence": lambda t: (t**ALPHA - ALPHA * t) / (ALPHA * (ALPHA - 1)),
    }[kind]
    step = 1e-6 * t
    return (f(t + step) - f(t - step)) / (2 * step)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_is_the_slope_of_f_at_the_ratio_up_to_a_constant(kind):
    ratio = np.linspace(0.05, 20, 50)
    found = DIVERGENCES[kind](torch.tensor(np.log(ratio)), ALPHA).numpy()
    wanted = slope_of_f(kind, ratio) - slope_of_f(kind, np.ones(1))  # 0 at the reference
    np.testing.assert_allclose(found, wanted, rtol=1e-7, atol=1e-8)


def oracle(kind: str, log_ratio: np.ndarray) -> np.ndarray:
    """By the formulas written out, in float64."""
    ratio = np.exp(log_ratio)
    return {
        "reverse_kl": lambda: log_ratio,
        "forward_kl": lambda: 1 - 1 / ratio,
        "js_divergence": lambda: np.log(2 * ratio / (1 + ratio)),
        "alpha_divergence": lambda: (ratio ** (ALPHA - 1) - 1) / (ALPHA - 1),
    }[kind]()


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_equals_the_formula_to_ten_digits_in_float64(kind):
    log_ratio = np.concatenate([np.linspace(-30, -1, 30), np.linspace(1, 30, 30)])  # off 0, where a ratio loses digits
    found = DIVERGENCES[kind](torch.tensor(log_ratio), ALPHA).numpy()
    np.testing.assert_allclose(found, oracle(kind, log_ratio), rtol=1e-10)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("distance", [1e4, -1e4])
def test_stays_finite_far_away(kind, distance):
    log_ratio = torch.tensor([distance], requires_grad=True)
    found = DIVERGENCES[kind](log_ratio, ALPHA)
    found.sum().backward()
    assert torch.isfinite(found).all() and torch.isfinite(log_ratio.grad).all()


def objective_of(loss, **options) -> PreferenceObjective:
    smoothing = {"label_smoothing": 0.1} if loss == "exo_pair" else {}
    return PreferenceObjective(DPOConfig(loss=loss, **smoothing, **options))


def alpha_of(kind: str) -> dict[str, float]:
    return {"f_alpha_divergence_coef": ALPHA} if kind == "alpha_divergence" else {}


def scores_of(pairs) -> tuple[list[torch.Tensor], NumTokens]:
    lengths = NumTokens(*(torch.tensor([len(getattr(p, role)) for p in pairs]) for role in ("chosen", "rejected")))
    scores = [torch.stack([getattr(p, role).sum() for p in pairs]) for role in ("chosen", "rejected")]
    return [*scores, *(torch.tensor([p.reference[i] for p in pairs]).float() for i in (0, 1))], lengths


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("loss", sorted(OF_THE_MARGIN - {"ipo"}))  # TRL's ipo is another: see test_losses.py
def test_composes_with_a_loss_as_in_trl(loss, kind):
    """TRL's sigmoid knows no smoothing, so that all but exo_pair go without."""
    pairs = random_pairs(12, seed=8)
    token_logps, batch = batch_of(pairs)
    objective = objective_of(loss, f_divergence_type=kind, **alpha_of(kind))
    ours = step_loss(objective(token_logps, batch), step_counts(pairs))
    smoothing = 0.1 if loss == "exo_pair" else 0.0
    options = {"beta": 0.1, "smoothing": smoothing, "divergence": kind, "alpha": ALPHA}
    theirs, _ = trl_loss({loss: 1.0}, *scores_of(pairs), **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


def test_ipo_takes_the_divergence_of_summed_log_ratios():
    """(g(u_w) - g(u_l) - 1 / (2 beta))^2 with the paper's sums."""
    pairs = random_pairs(5)
    token_logps, batch = batch_of(pairs)
    ours = step_loss(objective_of("ipo", f_divergence_type="js_divergence")(token_logps, batch), step_counts(pairs))
    (pw, pl, rw, rl), _ = scores_of(pairs)
    chosen, rejected = (oracle("js_divergence", u.double().numpy()) for u in (pw - rw, pl - rl))
    assert ours.item() == pytest.approx(((chosen - rejected - 5) ** 2).mean(), rel=1e-5)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_the_rewards_shown_are_log_ratios_whatever_the_divergence(kind):
    token_logps, batch = batch_of(random_pairs(4))
    plain = objective_of("sigmoid")(token_logps, batch).metrics
    shown = objective_of("sigmoid", f_divergence_type=kind, **alpha_of(kind))(token_logps, batch).metrics
    assert {name: term.total.item() for name, term in shown.items()} == {
        name: term.total.item() for name, term in plain.items()
    }


@pytest.mark.parametrize(
    ("section", "text"),
    [
        (
            DPOConfig(loss="nca_pair", f_divergence_type="forward_kl"),
            "found forward_kl, but nca_pair has no form for it",
        ),
        (DPOConfig(loss="aot", f_divergence_type="forward_kl"), "found forward_kl, but aot has no form for it"),
        (DPOConfig(loss={"sigmoid": 1.0, "orpo": 1.0}, f_divergence_type="js_divergence"), "but orpo has no form"),
        (DPOConfig(loss="sft", f_divergence_type="js_divergence"), "but sft has no form for it"),
        (DPOConfig(f_alpha_divergence_coef=0.7), "found 0.7, but f_divergence_type is reverse_kl, which has none"),
    ],
    ids=str,
)
def test_what_has_no_form_for_a_divergence_is_refused(section, text):
    """As TRL refuses them."""
    with pytest.raises(ValueError, match=text):
        PreferenceObjective(section)


def test_the_losses_of_the_margin_are_losses():
    assert set(LOSSES) >= OF_THE_MARGIN
