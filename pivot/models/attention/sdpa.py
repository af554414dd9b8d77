"""Attention over prefix trees, behind transformers' attention interface.

A row of T tokens holds trees of segments (`pivot.batch.Segments`). Each chain of the row is one problem: its queries
see the chain's ancestors in full and the chain itself causally. Because a first child lies right behind its parent,
a prompt and its first completion are one plain causal problem, and no T x T mask is ever built.

    language_model.set_attn_implementation(TREE_ATTENTION)
    language_model(inputs_embeds=..., position_ids=..., segments=batch.segments)

Letters: B = 1 batch, H query heads, K key-value heads, T tokens, Q and L queries and keys of one chain, D head width.
"""

from __future__ import annotations

from bisect import bisect_right

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from pivot.batch import Chain, Segments

TREE_ATTENTION = "pivot_tree"


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention of transformers' signature: query [1, H, T, D], key and value [1, K, T, D] -> ([1, T, H, D], None).

    Raises ValueError without `segments` (a caller that forgot them would get plain causal attention across trees),
    and for what no back end here honours: a sliding window, soft-capping, attention sinks, dropout, a mask.
    """
    if segments is None:
        raise ValueError("tree attention was called without segments; pass segments=batch.segments to the model")
    refused = {
        "sliding_window": sliding_window,
        "softcap": kwargs.get("softcap"),
        "s_aux": kwargs.get("s_aux"),
        "dropout": dropout or None,
        "attention_mask": attention_mask,
    }
    for name, given in refused.items():
        if given is not None:
            raise ValueError(f"tree attention does not honour {name} ({type(module).__name__}); use another model")
    if segments.num_tokens != query.shape[2]:
        raise ValueError(f"segments cover {segments.num_tokens} tokens, the row holds {query.shape[2]}")
    groups = query.shape[1] // key.shape[1]
    outputs = []
    # Split, not sliced chain by chain: the gradient of a slice is a zero-filled row, so that backward would take the
    # row's length times the number of chains. The chains tile the row.
    chains = segments.chains
    sizes = [chain.num_queries for chain in chains]
    queries, keys, values = (states.split(sizes, dim=2) for states in (query, key, value))
    for number, chain in enumerate(chains):
        chain_key, chain_value = (_gather(pieces, chains, number, groups) for pieces in (keys, values))
        outputs.append(
            F.scaled_dot_product_attention(
                queries[number],
                chain_key,
                chain_value,
                attn_mask=_bottom_right_mask(segments, chain, query.device) if chain.prefix else None,
                is_causal=not chain.prefix,
                scale=scaling,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _gather(pieces: tuple[Tensor, ...], chains: tuple[Chain, ...], number: int, groups: int) -> Tensor:
    """One [1, K, Q, D] per chain -> [1, H, L, D]: the ancestors' spans of chain `number`, root first, then its own."""
    parts = []
    for start, end in chains[number].prefix:
        owner = bisect_right(chains, start, key=lambda chain: chain.start) - 1
        parts.append(pieces[owner][:, :, start - chains[owner].start : end - chains[owner].start])
    states = torch.cat([*parts, pieces[number]], dim=2) if parts else pieces[number]
    return states.repeat_interleave(groups, dim=1) if groups > 1 else states


def _bottom_right_mask(segments: Segments, chain: Chain, device: torch.device) -> Tensor:
    """bool[Q, L] of one later child: Q is a completion, so this stays far below T x T. Shared by all layers."""
    cache_key = ("bottom_right", chain.num_queries, chain.num_keys, device)
    mask = segments.cache.get(cache_key)
    if mask is None:
        ones = torch.ones(chain.num_queries, chain.num_keys, dtype=torch.bool, device=device)
        mask = segments.cache[cache_key] = ones.tril_(chain.num_keys - chain.num_queries)
    return mask


# Registered for attention only: with no mask function of that name transformers builds no mask at all, and spares
# itself the search for packed sequences in position_ids, which would synchronise with the device.
AttentionInterface.register(TREE_ATTENTION, tree_attention)
