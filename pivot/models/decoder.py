"""The decoder's blocks as we run them: modules, names and parameters of transformers', fewer operations.

- Behind its keys and values a position of the last block reaches no other position, and the head reads a few (an
  image's hundreds of tokens are none). So its queries, attention and MLP and the final norm run there alone.
- What lies between the matrix products is that of `pivot.models.pointwise`, and the inputs of products that are cheap
  to compute again are marked for `pivot.models.recompute`.

Letters: T tokens, M queries and N targets (`pivot.batch.Reading`), H heads, D a head's width, W hidden width.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pivot.models.pointwise import rms_norm, rotate, swiglu
from pivot.models.recompute import cheap
from pivot.trees import Reading, Segments

# Families whose block is: norm, attention with rotary embeddings, add, norm, MLP, add. Others run as they come.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def reads_at_targets(config: PretrainedConfig) -> bool:
    """Whether `streamline` knows this family."""
    return config.model_type in FAMILIES


def streamline(language_model: Any) -> None:
    """Let the decoder take `reading`: its last hidden states are then [1, N, W]; without, [1, T, W] as before.

    The blocks stay in their places under their names, so checkpoints and sharding do not notice. They become ones of
    subclasses, since transformers recomputes activations around the forward of a class, not of an object.
    """
    blocks = language_model.model.layers
    for module in language_model.model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.__class__ = _norm(module.__class__)
    for block in blocks:
        block.self_attn.__class__ = _attention(block.self_attn.__class__)
        if language_model.config.hidden_act == "silu":
            block.mlp.__class__ = _mlp(block.mlp.__class__)
    blocks[-1].__class__ = _last_block(blocks[-1].__class__)


def query_matrix(block: nn.Module) -> nn.Parameter:
    """The last block's matrix that runs at the queries alone."""
    return block.get_parameter("self_attn.q_proj.weight")


def target_matrices(block: nn.Module) -> list[nn.Parameter]:
    """The last block's matrices that run at the targets alone, in order."""
    mlp = [p for p in block.get_submodule("mlp").parameters() if p.ndim == 2]
    return [block.get_parameter("self_attn.o_proj.weight"), *mlp]


@cache
def _last_block(block_class: Any) -> type[nn.Module]:
    def forward(
        self: Any, hidden_states: Tensor, *args: Any, reading: Reading | None = None, **kwargs: Any
    ) -> Tensor | tuple[Tensor, ...]:
        if reading is None:
            return block_class.forward(self, hidden_states, *args, **kwargs)
        assert not args, "transformers hands a block all but its hidden states by name"
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), asked=reading, **kwargs)
        hidden_states = hidden_states.index_select(1, reading.positions) + attended  # [1, N, W]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    return type(block_class.__name__, (block_class,), {"forward": forward})


@cache
def _norm(norm_class: Any) -> type[nn.Module]:
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:  # of a release that we have not met
            return norm_class.forward(self, hidden_states, *args, **kwargs)
        return cheap(rms_norm, hidden_states, self.weight, self.variance_epsilon)

    return type(norm_class.__name__, (norm_class,), {"forward": forward})


@cache
def _mlp(mlp_class: Any) -> type[nn.Module]:
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:  # of a release that we have not met
            return mlp_class.forward(self, x, *args, **kwargs)
        return self.down_proj(cheap(swiglu, self.gate_proj(x), self.up_proj(x)))

    return type(mlp_class.__name__, (mlp_class,), {"forward": forward})


@cache
def _attention(attention_class: Any) -> type[nn.Module]:
    def forward(
        self: Any,
        hidden_states: Tensor,
        *args: Any,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        segments: Segments | None = None,
        asked: Reading | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if segments is None:  # no trees: an answer is generated, with a cache
            kwargs |= {"position_embeddings": position_embeddings, "attention_mask": attention_mask}
            return attention_class.forward(self, hidden_states, *args, **kwargs)
        cos, sin = (angles[:, None].chunk(2, dim=-1)[0] for angles in position_embeddings)  # [1,1,T,D/2]
        key = rotate(_heads(self, "k", hidden_states), cos, sin)
        value = _heads(self, "v", hidden_states)
        if asked is not None:
            segments, hidden_states = asked.segments, hidden_states.index_select(1, asked.queries)
            cos, sin = cos.index_select(2, asked.queries), sin.index_select(2, asked.queries)
        query = rotate(_heads(self, "q", hidden_states), cos, sin)
        attended, _ = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation](
            self,
            query,
            key,
            value,
            attention_mask,
            segments=segments,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            sliding_window=getattr(self, "sliding_window", None),
            **kwargs,
        )
        attended = attended.flatten(2)  # [1, T or M, H * D]
        if asked is not None:
            attended = attended.index_select(1, asked.targets)
        return self.o_proj(attended), None

    return type(attention_class.__name__, (attention_class,), {"forward": forward})


def _heads(attention: Any, name: str, hidden_states: Tensor) -> Tensor:
    """Project [1, T, W] to the heads' queries, keys or values (`name` q, k or v), [1, H, T, D]."""
    states = getattr(attention, f"{name}_proj")(hidden_states).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{name}_norm", None)  # Qwen3's, of queries and keys
    return (states if norm is None else norm(states)).transpose(1, 2)
