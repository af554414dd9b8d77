"""What lies between a decoder's matrix products: few passes over the states, and little kept for backward.

Letters: T tokens, H heads, D a head's width, W hidden width, I the MLP's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """States [1, H, T, D] turned by angles [1, 1, T, D / 2]: halves (a, b) become (a cos - b sin, b cos + a sin).

    Rotary embeddings (RoFormer, arXiv:2104.09864, section 3.2) in two passes, not five.
    """
    return _Rotate.apply(states, cos, sin)


def rms_norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., W] over its root mean square (arXiv:1910.07467, eq. 4), in fp32, times weight [W]. Keeps `states` alone."""
    return _RMSNorm.apply(states, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up (arXiv:2002.05202, eq. 6), both [..., I]. Keeps the two."""
    return _SwiGLU.apply(gate, up)


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the rotation back, so nothing of the states is kept for it."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(states, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grads[0], cos, -sin), None, None


def _turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = torch.empty_like(states)
    (a, b), (out_a, out_b) = states.chunk(2, dim=-1), turned.chunk(2, dim=-1)
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin)
    return turned


class _RMSNorm(torch.autograd.Function):
    """With n = x / rms(x) and g the gradient times weight: dx = (g - n mean(g n)) / rms(x)."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = states.float()
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)  # float32[..., 1]
        ctx.save_for_backward(states, weight, inverse)
        return weight * (wide * inverse).to(states.dtype)  # rounded before the weight, as transformers does

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        states, weight, inverse = ctx.saved_tensors
        normed, grad = states.float() * inverse, grads[0].float()
        grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad = grad * weight.float()
        mean = torch.linalg.vecdot(grad, normed)[..., None] / states.shape[-1]
        grad_states = grad.addcmul_(normed, mean, value=-1).mul_(inverse)
        return grad_states.to(states.dtype), grad_weight, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        (grad,) = grads
        grad_gate = grad * up
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_gate, F.silu(gate).mul_(grad)
