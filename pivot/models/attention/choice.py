"""Which back end runs: the fastest that is there and proves equal to SDPA on a tree, or the one that was asked for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pivot.models.attention.tree import BACKENDS, Backend
from pivot.trees import Segments

PREFERENCE = ("torch_varlen", "flash_attn", "sdpa")
HALF = (torch.bfloat16, torch.float16)  # what FlashAttention computes in
# A tree of depth three whose chains have unequal numbers of queries and keys: a back end that aligns its causal mask
# at the top left, or that ignores the gather, is off by whole values there.
_LENGTHS, _PARENTS = (37, 18, 9, 14, 5, 23, 40, 8), (-1, 0, 1, 1, 0, 4, -1, 6)
# Times the error that SDPA itself makes in the same precision. Another order of the same sums gave up to 1.6 times in
# bfloat16 between SDPA's own kernels on the CPU.
TOLERANCE = 4.0


@dataclass(frozen=True)
class Choice:
    """A back end, and why those that were preferred to it do not run: {name: reason}."""

    name: str
    refused: dict[str, str]

    def __str__(self) -> str:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.refused.items())
        return f"{self.name} ({reasons})" if reasons else self.name


def choose_attention(
    wanted: str, *, device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, head_size: int
) -> Choice:
    """`wanted`: auto, or the name of a back end, which must then work. Raises ValueError where it does not."""
    if wanted not in ("auto", *BACKENDS):
        raise ValueError(f"train.attention: found '{wanted}', expected one of auto, {', '.join(BACKENDS)}")
    refused: dict[str, str] = {}
    for name in PREFERENCE if wanted == "auto" else (wanted,):
        problem = _find_problem(name, device, dtype, heads, key_heads, head_size)
        if problem is None:
            return Choice(name, refused)
        refused[name] = problem
    if wanted == "auto":
        raise RuntimeError(f"no attention back end works on {device}: {refused}")
    raise ValueError(f"train.attention: {wanted} does not work here ({refused[wanted]}); take auto, or sdpa")


def _find_problem(
    name: str, device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, head_size: int
) -> str | None:
    if name == "sdpa":
        return None  # what the others are measured by; the tests hold it against a float64 oracle
    if device.type != "cuda":
        return "needs a GPU"
    if dtype not in HALF:
        return f"needs bf16, the run is in {str(dtype).removeprefix('torch.')}"
    try:
        return compare_with_sdpa(BACKENDS[name], device, dtype, heads, key_heads, head_size)
    except ImportError:
        return "not installed"
    except Exception as error:  # whatever a kernel refuses an architecture or a width with
        return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"


def compare_with_sdpa(
    backend: Backend, device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, head_size: int
) -> str | None:
    """None where values and gradients of `backend` are as near to SDPA's in float32 as SDPA's own in `dtype` are."""
    rows = _probe_rows(device)
    generator, tokens = torch.Generator().manual_seed(0), rows[0].num_tokens
    shapes = [(1, count, tokens, head_size) for count in (heads, key_heads, key_heads)]
    states = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    weight = torch.randn(1, tokens, heads, head_size, generator=generator).to(device, dtype)
    for asking in rows:
        exact = _run(BACKENDS["sdpa"], [x.float() for x in states], weight.float(), asking)
        usual = _run(BACKENDS["sdpa"], states, weight, asking)
        own = _run(backend, states, weight, asking)
        for name, expected, near, value in zip(("output", "dq", "dk", "dv"), exact, usual, own, strict=True):
            error = (value.float() - expected).abs().max().item()
            allowed = TOLERANCE * max((near.float() - expected).abs().max().item(), 1e-5)
            if not error <= allowed:  # a NaN is refused, too
                return f"{name} differs from SDPA's by {error:.2g} on a tree, at most {allowed:.2g} is rounding"
    return None


def _probe_rows(device: torch.device) -> list[Segments]:
    """The tree on `device`, where all of its tokens ask, and where only the chains' last do, as in the last block."""
    ends = np.cumsum(_LENGTHS)
    segments = Segments(ends - _LENGTHS, ends, np.asarray(_PARENTS))
    ends_alone = np.array([chain.end - 1 for chain in segments.chains])
    return [row.move(lambda tensor: tensor.to(device)) for row in (segments, segments.asking_from(ends_alone))]


def _run(backend: Backend, states: list[Tensor], weight: Tensor, segments: Segments) -> list[Tensor]:
    """Output, and the gradients of query, key and value; as many queries and weights as the segments ask for."""
    states, weight = [states[0][:, :, : segments.num_queries], *states[1:]], weight[:, : segments.num_queries]
    query, key, value = leaves = [state.clone().requires_grad_() for state in states]
    output = backend(query, key, value, segments, query.shape[-1] ** -0.5)
    (output * weight).sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
