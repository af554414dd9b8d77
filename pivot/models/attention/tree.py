"""The function that transformers calls, and the back ends that it may stand for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from transformers import AttentionInterface

from pivot.models.attention.sdpa import sdpa
from pivot.models.attention.varlen import flash_attn, torch_varlen
from pivot.trees import Segments

# query [1, H, M, D], key and value [1, K, T, D], segments, scaling -> [1, M, H, D]; M = T where every token asks
Backend = Callable[[Tensor, Tensor, Tensor, Segments, float | None], Tensor]
BACKENDS: dict[str, Backend] = {"sdpa": sdpa, "torch_varlen": torch_varlen, "flash_attn": flash_attn}


def registered_name(backend: str) -> str:
    """What transformers knows a back end by: a name with `flash` in it, it would look for in a package of its own."""
    return f"pivot_tree_{backend.replace('flash', 'fast')}"


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    backend: Backend = sdpa,
    segments: Segments | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention of transformers' signature: query [1, H, M, D], key and value [1, K, T, D] -> ([1, M, H, D], None).

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
    held, expected = (query.shape[2], key.shape[2]), (segments.num_queries, segments.num_tokens)
    if held != expected:
        raise ValueError(f"the row holds {held} queries and keys, its segments {expected}")
    return backend(query, key, value, segments, scaling), None


# Registered for attention only: with no mask function of that name transformers builds no mask at all, and spares
# itself the search for packed sequences in position_ids, which would synchronise with the device.
for _name, _backend in BACKENDS.items():
    AttentionInterface.register(registered_name(_name), partial(tree_attention, backend=_backend))
