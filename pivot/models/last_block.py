"""The language model's last block, run to its end only where a hidden state is read: at the targets.

Behind its attention a position's result depends on no other position, and the head reads a few of them (an image's
hundreds of tokens are none). So its MLP, the larger part of a block, and the final norm run there alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

# Families whose block is: norm, attention, add, norm, MLP, add. Others run in full.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def reads_at_targets(config: PretrainedConfig) -> bool:
    """Whether `read_at_targets` knows this family."""
    return config.model_type in FAMILIES


def read_at_targets(language_model: Any) -> None:
    """Let the decoder take `positions` int64[N]: its last hidden states are then [1, N, D]; without, as before.

    The block stays in its place under its names, so checkpoints and sharding do not notice. It becomes one of a
    subclass, since transformers recomputes activations around the forward of a class, not of an object.
    """
    block = language_model.model.layers[-1]
    block.__class__ = _subclass(type(block))


def _subclass(block_class: Any) -> type[nn.Module]:
    def forward(
        self: Any, hidden_states: Tensor, *args: Any, positions: Tensor | None = None, **kwargs: Any
    ) -> Tensor | tuple[Tensor, ...]:
        if positions is None:
            return block_class.forward(self, hidden_states, *args, **kwargs)
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), *args, **kwargs)
        hidden_states = (hidden_states + attended).index_select(1, positions)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    return type(block_class.__name__, (block_class,), {"forward": forward})


def tail(block: nn.Module) -> list[nn.Parameter]:
    """The matrices that run at the targets alone."""
    return [p for p in block.get_submodule("mlp").parameters() if p.ndim == 2]
