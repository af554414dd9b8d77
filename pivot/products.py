"""fp32 matrix products on a CPU: torch's own, or oneDNN's where torch's leave half of the processor unused.

torch multiplies fp32 matrices with MKL, which takes its AVX2 code on an AMD processor that has AVX-512: 104 GFLOP/s a
core of a Zen 4, where oneDNN, which torch carries as well, gives 190 to 230 (docs/notes.md). oneDNN compiles code for
each shape, a millisecond and a MiB a piece, so that it pays for shapes that come again: an encoder's, which follow the
number of images, and rows of tokens whose length is rounded up.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NAMES = ("torch", "onednn")
LENGTHS_PER_OCTAVE = 4  # that oneDNN meets between N and 2 N tokens, N a power of two: some 9 % of padding
SMALLEST_MULTIPLE = 16  # of the padded lengths: a vector of AVX-512


def choose_products(wanted: str, *, device: torch.device, dtype: torch.dtype) -> str:
    """`wanted`: auto, torch or onednn, which must then work. Raises ValueError where it does not.

    A function of the machine and not of a measurement, so that a resumed run takes the same.
    """
    if wanted not in ("auto", *NAMES):
        raise ValueError(f"train.products: found '{wanted}', expected one of auto, {', '.join(NAMES)}")
    if wanted == "torch" or (wanted == "auto" and not _mkl_stays_below_the_processor()):
        return "torch"
    problem = _find_problem(device, dtype)
    if wanted == "onednn" and problem is not None:
        raise ValueError(f"train.products: onednn does not work here ({problem}); take auto, or torch")
    return "torch" if problem else "onednn"


def padded(length: int) -> int:
    """The length that rows of `length` tokens are padded to for oneDNN; such a length is its own."""
    multiple = max(SMALLEST_MULTIPLE, 1 << (length // LENGTHS_PER_OCTAVE).bit_length() >> 1)  # a power of two
    return -(-length // multiple) * multiple


def times(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., O] = left [..., I] @ right [O, I].T + bias [O] by oneDNN; either may be a transposed view. No gradient."""
    return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None, *, any_length: bool = True) -> Tensor:
    """What F.linear gives, all three products of forward and backward by oneDNN.

    Without `any_length` lengths that are not `padded` go to torch. They do so in here: were it another node of the
    graph, ranks of other lengths would meet their gradients in another order, and ZeRO would add up the wrong ones.
    """
    return _Linear.apply(rows, weight, bias, any_length)


class Linear(nn.Linear):
    """An nn.Linear by oneDNN."""

    any_length = True  # see `linear`

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias, any_length=self.any_length)


class LinearOfRows(Linear):
    """An nn.Linear by oneDNN, for rows of tokens."""

    any_length = False


def use_products(model: nn.Module, name: str, *, of_rows: bool) -> None:
    """Let the plain linear layers of `model` run on `name`; names, parameters and hooks stay as they are.

    `of_rows`: they take rows of tokens of all lengths.
    """
    layer = nn.Linear if name == "torch" else LinearOfRows if of_rows else Linear
    for module in model.modules():
        if type(module) in (nn.Linear, Linear, LinearOfRows):
            module.__class__ = layer


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, any_length: bool) -> Tensor:
        ctx.save_for_backward(rows, weight)
        length = rows.shape[:-1].numel()
        ctx.multiply = times if length and (any_length or length == padded(length)) else F.linear
        return ctx.multiply(rows.contiguous(), weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        rows, weight = ctx.saved_tensors
        need_rows, need_weight, need_bias, _ = ctx.needs_input_grad
        grad = grads[0].contiguous()
        flat = grad.flatten(0, -2)
        return (
            ctx.multiply(grad, weight.T, None) if need_rows else None,
            ctx.multiply(flat.T, rows.flatten(0, -2).T, None) if need_weight else None,
            flat.sum(0) if need_bias else None,
            None,
        )


@functools.cache
def _mkl_stays_below_the_processor() -> bool:
    if not torch.backends.mkl.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    processor = Path("/proc/cpuinfo")
    return processor.is_file() and "AuthenticAMD" in processor.read_text()


def _find_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return "it is for CPUs"
    if dtype != torch.float32:
        return f"it is for fp32, the run is in {str(dtype).removeprefix('torch.')}"
    return _compare_with_torch()


@functools.cache
def _compare_with_torch() -> str | None:
    """None where oneDNN's products and gradients equal float64's as nearly as torch's own do; else what is wrong."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(*shape, generator=generator) for shape in ((2, 65, 48), (80, 48), (80,))]
    try:
        found, usual, exact = _run(linear, values), _run(F.linear, values), _run(F.linear, [x.double() for x in values])
    except (AttributeError, NotImplementedError, RuntimeError) as error:  # a torch without oneDNN, or another version's
        return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    for mine, theirs, expected in zip(found, usual, exact, strict=True):
        off, rounding = ((x - expected).abs().max().item() for x in (mine, theirs))
        if not off <= 4 * rounding + 1e-6:
            return f"a product is off by {off:.2g}, torch's own by {rounding:.2g}"
    return None


def _run(function: Callable[..., Tensor], values: list[Tensor]) -> list[Tensor]:
    leaves = [value.clone().requires_grad_() for value in values]
    output = function(*leaves)
    output.sin().sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
