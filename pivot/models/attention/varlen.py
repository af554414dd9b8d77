"""FlashAttention over trees: every chain of the row in one variable-length call, causal from the bottom right.

Keys and values are gathered once per layer, the ancestors' before the chain's own; the gradient of the gather adds up
what all chains want of a shared prefix. No mask exists, and the lengths travelled to the device with the batch, so
nothing waits for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pivot.models.recompute import cheap
from pivot.trees import Segments


def torch_varlen(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None) -> Tensor:
    """PyTorch's own variable-length FlashAttention. ImportError where torch is too old to have it."""
    function, known = _torch_function()
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "scale" in known:
        options["scale"] = scaling
    elif scaling is not None:
        query = query * (scaling * query.shape[-1] ** 0.5)  # it divides by the root of the width
    if "enable_gqa" in known:
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    else:
        key, value = (_repeat_heads(states, query.shape[1]) for states in (key, value))

    def call(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
        return function(q, k, v, cu_q, cu_k, max_q, max_k, **options)

    return over_chains(call, query, key, value, segments)


@cache
def _torch_function() -> tuple[Callable[..., Any], frozenset[str]]:
    """The function and its parameters: is_causal in torch 2.10, window_size later, then scale and enable_gqa."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


def flash_attn(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None) -> Tensor:
    """The flash-attn package, version 3 where it is installed, else 2. ImportError where neither is."""
    function = _flash_function()

    def call(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
        result = function(
            q,
            k,
            v,
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            max_seqlen_q=max_q,
            max_seqlen_k=max_k,
            softmax_scale=scaling,
            causal=True,
        )
        return result[0] if isinstance(result, tuple) else result  # version 3 gave the normaliser, too, for a while

    return over_chains(call, query, key, value, segments)


@cache
def _flash_function() -> Callable[..., Any]:
    try:
        from flash_attn_interface import flash_attn_varlen_func  # version 3
    except ImportError:
        from flash_attn import flash_attn_varlen_func
    return flash_attn_varlen_func


def over_chains(call: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """[1, M, H, D]: `call(q [M, H, D], k and v [sum L, K, D], cu_q and cu_k int32[C + 1], max_q, max_k)` on the row."""
    layout = segments.layout
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))  # [M or T, heads, D]
    if layout.key_index is not None:
        k, v = (cheap(torch.index_select, states, 0, layout.key_index) for states in (k, v))
    return call(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        layout.cu_queries,
        layout.cu_keys,
        layout.max_queries,
        layout.max_keys,
    )[None]


def _repeat_heads(states: Tensor, heads: int) -> Tensor:
    groups = heads // states.shape[1]
    return states.repeat_interleave(groups, dim=1) if groups > 1 else states
