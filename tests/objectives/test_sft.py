"""SFT's laws: a mean over the step's target tokens, whatever the split; a masked sample adds zero."""

from __future__ import annotations

import math

import pytest
import torch

from pivot.batch import CHOSEN, CHOSEN_TOKEN, SAMPLE, TARGET_TOKEN, StepCounts
from pivot.config import SFTConfig
from pivot.objectives import SFTObjective
from tests.kit.pairs import Pair, batch_of, random_pairs, step_loss, step_metrics


def sft_counts(pairs: list[Pair]) -> StepCounts:
    tokens = sum(len(pair.chosen) for pair in pairs)
    return StepCounts({SAMPLE: len(pairs), CHOSEN_TOKEN: tokens, TARGET_TOKEN: tokens})


def run(pairs, counts):
    token_logps, batch = batch_of(pairs, roles=(CHOSEN,))
    outcome = SFTObjective(SFTConfig())(token_logps, batch)
    loss = step_loss(outcome, counts)
    loss.backward()
    return loss.detach(), step_metrics(outcome, counts), token_logps.grad


def test_loss_is_the_mean_over_tokens_and_not_over_samples():
    """-1 -2 -3 and -6: 12 nats over 4 tokens is 3; the mean of the samples' means would be 4."""
    pairs = [Pair(torch.tensor(logps), torch.zeros(1), (0.0, 0.0)) for logps in ([-1.0, -2.0, -3.0], [-6.0])]
    loss, metrics, gradient = run(pairs, sft_counts(pairs))
    assert loss == 3
    assert gradient.equal(torch.full((4,), -0.25))
    assert metrics == {"logps/chosen": -6.0}


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_any_split_gives_the_same_step(cut):
    pairs = random_pairs(5)
    counts = sft_counts(pairs)
    whole = run(pairs, counts)
    parts = [run(pairs[:cut], counts), run(pairs[cut:], counts)]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
    torch.testing.assert_close(torch.cat([part[2] for part in parts]), whole[2])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_masked_sample_adds_exactly_zero(bad):
    good = random_pairs(3)
    broken = Pair(torch.full((4,), bad), torch.zeros(1), (0.0, 0.0), weight=0.0)
    counts = sft_counts([*good, broken])
    wanted, found = run(good, counts), run([*good, broken], counts)
    assert found[0].equal(wanted[0]) and found[1] == wanted[1]
    assert found[2].equal(torch.cat([wanted[2], torch.zeros(4)]))


def test_counts_add_up_and_never_divide_by_zero():
    total = StepCounts({SAMPLE: 1, TARGET_TOKEN: 5}) + StepCounts({SAMPLE: 2, "image": 4})
    assert total == StepCounts({SAMPLE: 3, TARGET_TOKEN: 5, "image": 4})
    assert total.denominator(TARGET_TOKEN) == 5
    assert StepCounts({SAMPLE: 0}).denominator(SAMPLE) == 1
    with pytest.raises(KeyError):
        total.denominator("chosen_tokens")  # a unit that the source does not count is a mistake, not a 1
