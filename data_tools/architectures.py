"""Models before they have weights: configurations that transformers knows, and a tokenizer with one token a byte.

`launch/random_model.py` writes them for a trial, `data_tools/demo/architecture.py` for the demo; a run that names them
draws the weights from its seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

END_OF_TEXT, TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # ChatML's


def siglip(width: int, mlp: int, layers: int, heads: int, patch: int, size: int) -> dict[str, Any]:
    """A SigLIP vision tower for images of `size` pixels a side in patches of `patch`."""
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_channels": 3,
        "image_size": size,
        "patch_size": patch,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "attention_dropout": 0.0,
    }


def qwen2(width: int, mlp: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> dict[str, Any]:
    """A Qwen2 decoder; `tied`: the head is the embedding."""
    return {
        "model_type": "qwen2",
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": tied,
    }


def byte_tokenizer(special_tokens: Sequence[str]) -> Tokenizer:
    """A token for each of the 256 bytes, then the special ones; no token of several bytes, and nothing unknown."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special_tokens))
    return tokenizer
