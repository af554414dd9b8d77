"""Attention over prefix trees, behind transformers' attention interface.

A row of T tokens holds trees of segments (`pivot.batch.Segments`). Each chain of the row is one problem: its queries
see the chain's ancestors in full and the chain itself causally. Because a first child lies right behind its parent,
a prompt and its first completion are one plain causal problem, and no T x T mask is ever built.

    name = choose_attention("auto", device=..., dtype=..., heads=..., key_heads=..., head_size=...).name
    language_model.set_attn_implementation(registered_name(name))
    language_model(inputs_embeds=..., position_ids=..., segments=batch.segments)

Letters: B = 1 batch, H query heads, K key-value heads, T tokens, Q and L queries and keys of one chain, D head width,
C chains.
"""

from pivot.models.attention.choice import Choice, choose_attention
from pivot.models.attention.tree import BACKENDS, registered_name, tree_attention

__all__ = ["BACKENDS", "Choice", "choose_attention", "registered_name", "tree_attention"]
