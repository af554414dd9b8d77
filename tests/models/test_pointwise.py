"""Law: rotations, norms and SwiGLU give what transformers' do, values and gradients, and keep less for backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from pivot.models.pointwise import rms_norm, rotate, swiglu

DTYPES = (torch.float32, torch.bfloat16)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()


def kept_by(function: Callable[..., Tensor], *inputs: object) -> tuple[Tensor, list[torch.Size]]:
    """Its result, and the shapes of what autograd keeps for backward."""
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda x: x):
        return function(*inputs), kept


def assert_gradients_close(found: Tensor, expected: Tensor, inputs: list[Tensor], tolerance: float) -> None:
    weight = random(*found.shape, seed=9).detach()
    ours = torch.autograd.grad((found.double() * weight).sum(), inputs)
    theirs = torch.autograd.grad((expected.double() * weight).sum(), inputs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype
        assert float((mine - other).norm()) <= tolerance * float(other.norm())


def test_rotary_embeddings() -> None:
    """Nothing kept but the angles."""
    states = random(1, 7, 4, 8, seed=0).transpose(1, 2)
    angles = random(1, 7, 4, seed=1).detach()
    cos, sin = (torch.cat([f(angles)] * 2, dim=-1) for f in (torch.cos, torch.sin))
    expected, _ = apply_rotary_pos_emb(states, states, cos, sin)
    found, kept = kept_by(rotate, states, cos[:, None, :, :4], sin[:, None, :, :4])
    assert kept == [(1, 1, 7, 4)] * 2
    torch.testing.assert_close(found, expected)
    assert_gradients_close(found, expected, [states], 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm(dtype: torch.dtype) -> None:
    """The input and one number a row kept; bf16's gradients are those of fp32, rounded once."""
    states, weight = random(2, 5, 96, seed=0, dtype=dtype), random(96, seed=1, dtype=dtype)
    norm = Qwen2RMSNorm(96, eps=1e-6)
    found, kept = kept_by(rms_norm, states, weight, 1e-6)
    assert sorted(kept) == [(2, 5, 1), (2, 5, 96), (96,)]
    norm.weight = torch.nn.Parameter(weight.detach())
    assert torch.equal(found, norm(states))
    wide, scale = states.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * scale
    grad = random(2, 5, 96, seed=9, dtype=dtype).detach()
    ours = torch.autograd.grad(found, [states, weight], grad)
    theirs = torch.autograd.grad(exact, [wide, scale], grad.double())
    for mine, other in zip(ours, theirs, strict=True):
        tolerance = 1e-6 if dtype == torch.float32 else 2e-3  # half a unit in bf16's eighth bit
        assert mine.dtype == dtype
        assert float((mine - other).norm()) <= tolerance * float(other.norm())


def test_rms_norm_with_a_frozen_weight() -> None:
    states, weight = random(5, 8, seed=0), random(8, seed=1).detach()
    (rms_norm(states, weight, 1e-6) * 3.0).sum().backward()
    assert states.grad is not None and states.grad.abs().sum() > 0
    assert weight.grad is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu(dtype: torch.dtype) -> None:
    """The two inputs kept, and neither their SiLU nor the product."""
    gate, up = random(5, 24, seed=0, dtype=dtype), random(5, 24, seed=1, dtype=dtype)
    found, kept = kept_by(swiglu, gate, up)
    assert kept == [(5, 24), (5, 24)]
    expected = F.silu(gate) * up
    assert torch.equal(found, expected)
    assert_gradients_close(found, expected, [gate, up], 1e-6 if dtype == torch.float32 else 4e-3)
