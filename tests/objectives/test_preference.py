"""The preference objective's laws: splits add up, masks add zero, the reference gives ln 2, a mix is its parts' sum."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from pivot.batch import CHOSEN, COMPLETION, REFERENCE, REJECTED, ROLES, SAMPLE
from pivot.config import DPOConfig, ObjectiveConfig, SFTConfig
from pivot.objectives import OBJECTIVES, PreferenceObjective, SFTObjective, build_objective
from pivot.objectives.losses import LOSSES, NumTokens
from tests.kit.pairs import Pair, batch_of, random_pairs, step_counts, step_loss, step_metrics
from tests.kit.trl_losses import trl_loss

MPO = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}
MIXES = [*LOSSES, "sft", MPO, {"simpo": 1.0, "sft": 0.1}]


def build(loss, **options) -> PreferenceObjective:
    if loss == "exo_pair":
        options = {"label_smoothing": 0.001, **options}  # the paper's; it has no value with 0
    return PreferenceObjective(DPOConfig(loss=loss, **options))


def run(objective, pairs, counts):
    """(loss, metrics, gradient of each completion's log-probs) of one micro-batch within a step of `counts`."""
    token_logps, batch = batch_of(pairs)
    outcome = objective(token_logps, batch)
    loss = step_loss(outcome, counts)
    loss.backward()
    return loss.detach(), step_metrics(outcome, counts), token_logps.grad


@pytest.mark.parametrize("loss", MIXES, ids=str)
@pytest.mark.parametrize("cuts", [[1] * 7, [3, 4], [2, 2, 3], [6, 1]], ids=str)
def test_any_split_into_micro_batches_gives_the_same_step(loss, cuts):
    """1e-6 relative: seven float32 sums in another order."""
    pairs = random_pairs(7)
    counts = step_counts(pairs)
    objective = build(loss)
    whole_loss, whole_metrics, whole_gradient = run(objective, pairs, counts)
    parts, start = [], 0
    for size in cuts:
        parts.append(run(objective, pairs[start : start + size], counts))
        start += size
    torch.testing.assert_close(sum(part[0] for part in parts), whole_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat([part[2] for part in parts]), whole_gradient, rtol=1e-5, atol=1e-6)
    for name, value in whole_metrics.items():
        assert sum(part[1][name] for part in parts) == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("loss", MIXES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_masked_pair_adds_exactly_zero(loss, bad):
    """The sums of three pairs and a masked one, whatever its log-probs, are bit for bit those of the three."""
    good = random_pairs(3)
    broken = Pair(torch.full((4,), bad), torch.full((2,), bad), (bad, bad), weight=0.0)
    counts = step_counts([*good, broken])  # the planned ones, the same with and without
    objective = build(loss)
    wanted_loss, wanted_metrics, wanted_gradient = run(objective, good, counts)
    found_loss, found_metrics, gradient = run(objective, [*good, broken], counts)
    assert found_loss.equal(wanted_loss)
    assert found_metrics == wanted_metrics
    assert gradient[:-6].equal(wanted_gradient)
    assert gradient[-6:].equal(torch.zeros(6))


def test_a_batch_of_a_dummy_alone_gives_zero_and_a_gradient():
    """A rank with nothing to do still runs backward: its loss is zero and hangs on the graph."""
    dummy = Pair(torch.tensor([-1.0]), torch.tensor([-2.0]), (0.0, 0.0), weight=0.0)
    loss, metrics, gradient = run(build(MPO), [dummy], step_counts(random_pairs(4)))
    assert loss == 0 and set(metrics.values()) == {0.0} and gradient.equal(torch.zeros(2))


def test_at_the_reference_the_loss_is_ln_2_and_the_margins_are_zero():
    """Exactly, when both add up the same log-probs in the same order."""
    pairs = random_pairs(5)
    token_logps, batch = batch_of(pairs)
    batch.completion_values[REFERENCE] = batch.completion_logps(token_logps.detach())
    outcome = build("sigmoid")(token_logps, batch)
    metrics = step_metrics(outcome, step_counts(pairs))
    assert step_loss(outcome, step_counts(pairs)).item() == pytest.approx(math.log(2), abs=1e-6)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert metrics[name] == 0


def test_numbers_of_a_hand_made_pair():
    """beta 0.5. chosen -1 -2 = -3, reference -4: reward 0.5. rejected -5, reference -3: reward -1. Margin 1.5.

    Loss log(1 + e^-1.5) = 0.201413. The second pair is masked and counted: every mean halves.
    """
    pair = Pair(torch.tensor([-1.0, -2.0]), torch.tensor([-5.0]), (-4.0, -3.0))
    masked = dataclasses.replace(pair, weight=0.0)
    loss, metrics, _ = run(build("sigmoid", beta=0.5), [pair, masked], step_counts([pair, masked]))
    assert loss.item() == pytest.approx(0.201413 / 2, abs=1e-6)
    assert metrics == {
        "rewards/chosen": 0.25,
        "rewards/rejected": -0.5,
        "rewards/accuracies": 0.5,
        "rewards/margins": 0.75,
        "logps/chosen": -1.5,
        "logps/rejected": -2.5,
    }


def test_a_mix_is_the_weighted_sum_of_its_losses():
    pairs = random_pairs(6)
    counts = step_counts(pairs)
    loss, metrics, gradient = run(build(MPO), pairs, counts)
    parts = {name: run(build(name), pairs, counts) for name in MPO}
    torch.testing.assert_close(loss, sum(MPO[name] * part[0] for name, part in parts.items()))
    torch.testing.assert_close(gradient, sum(MPO[name] * part[2] for name, part in parts.items()))
    for name, part in parts.items():
        assert metrics[f"loss/{name}"] == pytest.approx(part[0].item(), rel=1e-6)


def test_mpo_equals_trl_up_to_the_sft_terms_mean():
    """TRL's `sft` is a mean per micro-batch: with one micro-batch in the step it is ours, per chosen token."""
    pairs = random_pairs(9, seed=3)
    lengths = NumTokens(*(torch.tensor([len(getattr(p, role)) for p in pairs]) for role in ("chosen", "rejected")))
    scores = [torch.stack([getattr(p, role).sum() for p in pairs]) for role in ("chosen", "rejected")]
    scores += [torch.tensor([p.reference[i] for p in pairs]).float() for i in (0, 1)]
    theirs, their_metrics = trl_loss(MPO, scores, lengths, beta=0.1)
    ours, metrics, _ = run(build(MPO), pairs, step_counts(pairs))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    for name in metrics.keys() - {f"loss/{name}" for name in MPO}:
        assert metrics[name] == pytest.approx(their_metrics[name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("loss", ["simpo", "sft", {"simpo": 1.0, "sft": 0.1}], ids=str)
def test_reference_free_losses_need_no_reference_and_show_mean_log_probs(loss):
    """beta 2: chosen -3 over 2 tokens gives reward -3, rejected -5 over 1 token gives -10."""
    pair = Pair(torch.tensor([-1.0, -2.0]), torch.tensor([-5.0]), (math.nan, math.nan))
    objective = build(loss, beta=2.0)
    assert not objective.needs_reference
    _, metrics, _ = run(objective, [pair], step_counts([pair]))
    assert (metrics["rewards/chosen"], metrics["rewards/rejected"]) == (-3, -10)


def test_bco_running_mean_is_the_mean_reward_of_all_steps_and_survives_a_restart():
    """Rewards 1 and 3, then 0 and 2: step means 2 and 1, so the shift is 0, then 2, then 1.5."""
    objective = build(MPO, bco_shift="running_mean")
    assert objective.metrics_every_step and objective.bco_shift == 0
    objective.after_step({"rewards/chosen": 1.0, "rewards/rejected": 3.0})
    assert objective.bco_shift == 2
    resumed = build(MPO, bco_shift="running_mean")
    resumed.load_state_dict(objective.state_dict())
    resumed.after_step({"rewards/chosen": 0.0, "rewards/rejected": 2.0})
    assert resumed.bco_shift == 1.5

    pairs = random_pairs(3)
    _, metrics, _ = run(resumed, pairs, step_counts(pairs))
    _, batch = batch_of(pairs)
    reference = batch.completion_values[REFERENCE]
    policy = batch.completion_logps(torch.cat([logps for p in pairs for logps in (p.chosen, p.rejected)]))
    scores = policy[0::2], policy[1::2], reference[0::2], reference[1::2]
    wanted = LOSSES["bco_pair"](*scores, None, beta=0.1, bco_shift=1.5)
    assert metrics["loss/bco_pair"] == pytest.approx(wanted.mean().item(), rel=1e-6)


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_the_running_shift_takes_nothing_that_is_not_finite(reward):
    """Step means 2, nothing, 1: the shift is 2, 2, 1.5."""
    objective = build(MPO, bco_shift="running_mean")
    for chosen, rejected in ((1.0, 3.0), (reward, 3.0), (0.0, 2.0)):
        objective.after_step({"rewards/chosen": chosen, "rewards/rejected": rejected})
    assert objective.state_dict() == {"bco_shift": 1.5, "num_steps": 2}


def test_a_shift_that_was_saved_as_nan_is_refused():
    with pytest.raises(ValueError, match="bco_shift is nan, so every loss would be; remove the newest checkpoint"):
        build(MPO, bco_shift="running_mean").load_state_dict({"bco_shift": float("nan"), "num_steps": 3})


def test_state_of_another_setting_is_refused():
    with pytest.raises(ValueError, match="bco_shift.*resume with the objective.dpo settings"):
        build("sigmoid").load_state_dict({"bco_shift": 0.1, "num_steps": 3})


@pytest.mark.parametrize(
    ("section", "text"),
    [
        (DPOConfig(loss="sigmoyd"), "objective.dpo.loss: found 'sigmoyd'.*did you mean 'sigmoid'"),
        (DPOConfig(loss={"sigmoid": 0.0}), "at least one weight above 0"),
        (DPOConfig(loss="hinge", label_smoothing=0.1), "label_smoothing: found 0.1.*loss that does: aot.*robust"),
        (DPOConfig(loss="exo_pair"), "label_smoothing: found 0, with which exo_pair is infinite"),
        (DPOConfig(loss="sigmoid", discopop_tau=0.1), "discopop_tau: found 0.1.*choose a loss that does: discopop"),
        (DPOConfig(loss="sigmoid", bco_shift="running_mean"), "bco_shift: found running_mean.*bco_pair"),
        (DPOConfig(loss="sigmoid", simpo_gamma=1.0), "simpo_gamma: found 1.0.*simpo"),
        (DPOConfig(loss="simpo", reference="runs/a/export"), "objective.dpo.reference: given"),
    ],
    ids=str,
)
def test_settings_that_would_do_nothing_are_refused(section, text):
    with pytest.raises(ValueError, match=text):
        PreferenceObjective(section)


def test_build_objective_follows_the_section():
    dpo = build_objective(ObjectiveConfig(dpo=DPOConfig(loss=MPO)))
    assert isinstance(dpo, PreferenceObjective) and dpo.mix == MPO
    assert isinstance(build_objective(ObjectiveConfig(sft=SFTConfig())), SFTObjective)
    with pytest.raises(ValueError, match="objective: none is given"):
        build_objective(ObjectiveConfig())


def test_every_section_has_an_objective_that_bears_its_name():
    """The config cannot import the objectives, so this holds the two lists together."""
    sections = {spec.name for spec in dataclasses.fields(ObjectiveConfig)}
    assert {name: objective.name for name, objective in OBJECTIVES.items()} == {name: name for name in sections}


@pytest.mark.parametrize(
    ("section", "scale", "folder"),
    [
        (DPOConfig(beta=0.3), 0.3, None),
        (DPOConfig(loss=MPO, reference="runs/sft/export"), 0.1, "runs/sft/export"),
        (DPOConfig(loss="simpo"), None, None),
    ],
    ids=str,
)
def test_what_a_start_asks_of_an_objective(section, scale, folder):
    """Whose reference, and how large its margins are: nobody else reads the section for it."""
    objective = build_objective(ObjectiveConfig(dpo=section))
    assert (objective.needs_reference, objective.margin_scale) == (scale is not None, scale)
    assert objective.reference_folder == folder and objective.roles == (CHOSEN, REJECTED)


@pytest.mark.parametrize("loss", MIXES, ids=str)
def test_completions_without_a_partner_are_no_pairs(loss):
    """A chosen and a rejected completion of two samples, and two of one prompt, lie in the batch and change nothing."""
    pairs = random_pairs(4)
    counts, objective = step_counts(pairs), build(loss)
    token_logps, batch = batch_of(pairs)
    wanted = objective(token_logps, batch)
    roles = (CHOSEN, REJECTED, COMPLETION, COMPLETION)
    extended = dataclasses.replace(
        batch,
        role=torch.cat([batch.role, torch.tensor([ROLES.index(role) for role in roles])]),
        group=torch.cat([batch.group, torch.tensor([4, 5, 6, 6])]),
        completion_tokens=torch.cat([batch.completion_tokens, torch.ones(4, dtype=torch.int64)]),
        completion_weight=torch.cat([batch.completion_weight, torch.ones(4)]),
        sample_index=torch.arange(7),
        target_completion=torch.cat([batch.target_completion, torch.arange(8, 12)]),
        completion_values={REFERENCE: torch.cat([batch.completion_values[REFERENCE], torch.full((4,), math.nan)])},
    )
    found = objective(torch.cat([token_logps, torch.full((4,), math.nan)]), extended)
    assert step_loss(found, counts).equal(step_loss(wanted, counts))
    assert step_metrics(found, counts) == step_metrics(wanted, counts)
    assert extended.counts()[SAMPLE] == 7 and len(extended.pairs.chosen) == 4
