"""The portable back end: torch's scaled_dot_product_attention, chain by chain, on any device and in any precision."""

from __future__ import annotations

from bisect import bisect_right

import torch
from torch import Tensor
from torch.nn import functional as F

from pivot.models.recompute import cheap
from pivot.trees import Chain, Segments


def sdpa(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None) -> Tensor:
    """[1, M, H, D] of query [1, H, M, D], key and value [1, K, T, D]."""
    outputs, groups = [], query.shape[1] // key.shape[1]
    if groups > 1 and query.is_cuda:  # there only kernels without a mask take fewer heads of keys than of queries
        key, value, groups = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), 1
    # Split, not sliced chain by chain: the gradient of a slice is a zero-filled row, so that backward would take the
    # row's length times the number of chains. The chains tile the row.
    chains = segments.chains
    queries = query.split([chain.num_queries for chain in chains], dim=2)
    keys, values = (states.split([chain.num_tokens for chain in chains], dim=2) for states in (key, value))
    for number, chain in enumerate(chains):
        chain_key, chain_value = (_gather(pieces, chains, number) for pieces in (keys, values))
        square = chain.num_queries == chain.num_keys
        outputs.append(
            F.scaled_dot_product_attention(
                queries[number],
                chain_key,
                chain_value,
                attn_mask=None if square else _bottom_right_mask(segments, chain, query.device),
                is_causal=square,
                scale=scaling,
                enable_gqa=groups > 1,
            ).transpose(1, 2)  # as it lies in memory, so that the row is put together without another copy
        )
    return torch.cat(outputs, dim=1)


def _gather(pieces: tuple[Tensor, ...], chains: tuple[Chain, ...], number: int) -> Tensor:
    """One [1, K, Q, D] per chain -> [1, K, L, D]: the ancestors' spans of chain `number`, root first, then its own."""
    parts = []
    for start, end in chains[number].prefix:
        owner = bisect_right(chains, start, key=lambda chain: chain.start) - 1
        parts.append(pieces[owner][:, :, start - chains[owner].start : end - chains[owner].start])
    return cheap(_join, *parts, pieces[number]) if parts else pieces[number]


def _join(*parts: Tensor) -> Tensor:
    return torch.cat(parts, dim=2)


def _bottom_right_mask(segments: Segments, chain: Chain, device: torch.device) -> Tensor:
    """bool[Q, L] of a chain with fewer queries than keys: a completion's, so far below T x T. Shared by all layers."""
    cache_key = ("bottom_right", chain.num_queries, chain.num_keys, device)
    mask = segments.cache.get(cache_key)
    if mask is None:
        ones = torch.ones(chain.num_queries, chain.num_keys, dtype=torch.bool, device=device)
        mask = segments.cache[cache_key] = ones.tril_(chain.num_keys - chain.num_queries)
    return mask
