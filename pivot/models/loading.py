"""How models of transformers come into being: read strictly from disk, or drawn at random; never with remote code."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

# Gives a context in which the full values of parameters can be read that ZeRO-3 has partitioned.
Gather = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]


def load_strictly(model_class: Any, path: str, where: str, *, accepted: Iterable[str] = (), **settings: Any) -> Any:
    """`model_class.from_pretrained(path)`; ValueError, starting with `where`, for a checkpoint that does not fit.

    Nothing may be missing or of another shape, and only keys that start with one of `accepted` may be extra. Under a
    live HfDeepSpeedConfig (ZeRO-3) transformers partitions what it loads.
    """
    try:
        model, info = model_class.from_pretrained(
            path,
            attn_implementation="sdpa",
            trust_remote_code=False,
            weights_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, and refused below with the tensor's name
            **settings,
        )
    except OSError as error:
        raise ValueError(f"{where}: no weights that transformers can read: {error}") from error
    check_loading(info, where, accepted)
    return model


def check_loading(info: dict[str, Any], where: str, accepted: Iterable[str] = ()) -> None:
    """Refuse what transformers only warns of: tensors that were missing, unknown or of another shape."""
    other_shape = [key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]]
    for problem, keys in (
        ("lacks", info["missing_keys"]),
        ("has another shape for", other_shape),
        ("holds, beside those,", [key for key in info["unexpected_keys"] if not key.startswith(tuple(accepted))]),
    ):
        if keys:
            shown = ", ".join(sorted(keys)[:3]) + (", ..." if len(keys) > 3 else "")
            raise ValueError(
                f"{where}: compared to what its configuration asks for, the checkpoint {problem} {len(keys)} tensors "
                f"({shown}); it is damaged, or was written for another architecture"
            )


def build_random(model_class: Any, config: Any, dtype: torch.dtype) -> Any:
    """A model with random weights, the same on every rank and ZeRO stage that starts from the same seed.

    Called as a plain constructor, which no HfDeepSpeedConfig turns into a partitioned build: that would draw other
    numbers. DeepSpeed partitions it when the engine is built; what starts from scratch is small.
    """
    config.dtype = dtype
    config._attn_implementation = "sdpa"
    return model_class(config).to(dtype=dtype)
