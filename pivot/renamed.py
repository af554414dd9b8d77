"""What transformers renamed between the releases that pivot runs on, each asked of the object at hand."""

from __future__ import annotations

import inspect
from typing import Any


def cache_argument(decoder: Any, cache: Any) -> dict[str, Any]:
    """The keyword argument that hands a key-value cache to `decoder`: `cache`, before 5.24 `past_key_values`."""
    named = "cache" in inspect.signature(decoder.forward).parameters
    return {"cache" if named else "past_key_values": cache}


def recompute_blocks(model: Any) -> None:
    """Let a transformers model recompute each of its blocks in backward.

    Never reentrant: an encoder's pixels carry no gradient, so a reentrant checkpoint would give its blocks none.
    """
    settings = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # since 5.24
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
