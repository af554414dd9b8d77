"""Laws of the head: exact log-probs and gradients in chunks, and memory that follows the chunk alone."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from pivot.models import head as logprobs
from pivot.models.head import LMHead


def _problem(num_targets: int, width: int = 16, vocabulary: int = 50, bias: bool = False) -> tuple:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_targets, width, generator=generator, requires_grad=True)
    head = LMHead(width, vocabulary, bias=bias)
    with torch.no_grad():
        head.weight.copy_(torch.randn(vocabulary, width, generator=generator))
    targets = torch.randint(0, vocabulary, (num_targets,), generator=generator)
    return hidden, head, targets, torch.randn(num_targets, generator=generator)


@pytest.mark.parametrize("kept", [0, 2**22], ids=["computed again", "kept"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
def test_equals_log_softmax_in_float64(chunk_rows: int, bias: bool, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", chunk_rows * 50)
    monkeypatch.setattr(logprobs, "KEPT_LOGITS", kept)
    assert logprobs.keeps_logits(7, 50) == (kept > 0 and chunk_rows == 100)
    hidden, head, targets, weights = _problem(7, bias=bias)
    logps = head(hidden, targets)
    (logps * weights).sum().backward()
    leaves = [hidden.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()]
    offset = head.bias.detach().double() if bias else None
    expected = F.linear(*leaves, offset).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (expected * weights.double()).sum().backward()
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps.double(), expected, atol=1e-5, rtol=0)
    for found, leaf in zip((hidden.grad, head.weight.grad), leaves, strict=True):
        assert float((found.double() - leaf.grad).norm() / leaf.grad.norm()) < 1e-6


def test_bf16_hidden_states_are_scored_in_fp32() -> None:
    """200 tokens over a vocabulary of 50: summed log-probs stay within 1e-3 nat of float64 on the same bf16 logits."""
    hidden, head, targets, _ = _problem(200)
    half = hidden.detach().bfloat16()
    weight = head.weight.detach().bfloat16()
    found = logprobs.token_logps(half, weight, None, targets).sum()
    expected = (half @ weight.T).double().log_softmax(-1).gather(1, targets[:, None]).sum()
    assert abs(float(found) - float(expected)) < 1e-3


def test_frozen_head_gets_no_gradient() -> None:
    hidden, head, targets, weights = _problem(5)
    head.weight.requires_grad_(False)
    (head(hidden, targets) * weights).sum().backward()
    assert head.weight.grad is None and hidden.grad is not None


def test_head_shares_the_parameter_it_was_made_from() -> None:
    linear = torch.nn.Linear(4, 9, bias=False)
    head = LMHead.from_linear(linear)
    assert head.weight is linear.weight
    hidden = torch.randn(3, 4)
    assert torch.equal(head(hidden), linear(hidden))


@pytest.mark.parametrize("saved_by_hooks", [False, True])
@pytest.mark.parametrize("chunk_rows", [3, 100])
def test_later_micro_batches_add_to_the_gradient_where_it_lies(
    chunk_rows: int, saved_by_hooks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where hooks hand back what was saved: as a tensor of the same values, but without the weight's gradient."""
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", chunk_rows * 50)
    gradients, places = {}, set()
    for in_place in (False, True):
        hidden, head, targets, weights = _problem(7)
        head.adds_in_place = in_place
        for scale in (1.0, -0.3, 2.0):
            hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
            with hooks if saved_by_hooks else contextlib.nullcontext():
                logps = head(hidden * scale, targets)
            (logps * weights).sum().backward()
            if in_place:
                places.add(head.weight.grad.data_ptr())
        gradients[in_place] = head.weight.grad, hidden.grad
    assert len(places) == 1
    for found, expected in zip(gradients[True], gradients[False], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_a_tied_head_adds_in_place_too() -> None:
    """The embedding's gradient comes behind the head's, in the same backward."""
    gradients = []
    for in_place in (False, True):
        hidden, head, targets, weights = _problem(7)
        head.adds_in_place = in_place
        for _ in range(2):
            embedded = F.embedding(targets.flip(0), head.weight)
            (head(hidden + embedded, targets) * weights).sum().backward()
        gradients.append(head.weight.grad)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-6)


_PEAK = """
import resource, torch
from pivot.models import head as logprobs
logprobs.CHUNK_LOGITS = 2**21
torch.manual_seed(0)
weight = torch.randn({vocabulary}, 16, requires_grad=True)
hidden = torch.randn({num_targets}, 16, requires_grad=True)
targets = torch.randint(0, {vocabulary}, ({num_targets},))
logprobs.token_logps(hidden[:8], weight, None, targets[:8]).sum().backward()  # warm-up: libraries, thread pools
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
logprobs.token_logps(hidden, weight, None, targets).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def _peak_mib(num_targets: int, vocabulary: int) -> float:
    code = _PEAK.format(num_targets=num_targets, vocabulary=vocabulary)
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return int(output) / 1024


def test_peak_memory_follows_the_chunk_not_vocabulary_times_targets() -> None:
    """The logits of 4,096 x 32,768 take 512 MiB in fp32; a chunk takes 8. Four of them and the gradients stay under 80.

    Eight times the targets, and four times the vocabulary, may add what scales with one of them alone (a few MiB).
    """
    assert _peak_mib(4096, 32768) < 80
    assert _peak_mib(8 * 4096, 8192) < 80
