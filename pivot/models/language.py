"""The language model: a stock *ForCausalLM of transformers, read strictly, refused where we would run it wrongly."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from pivot.pretrained import build_random, build_shell, draws_weights, load_strictly, read_config, save_and_compare
from pivot.processor import Processor

KEY = "model.language_model.path"
# Dense decoders with rotary positions whose packed rows were held against stock transformers, sequence by sequence.
DECODERS = (
    "apertus", "arcee", "ernie4_5", "gemma", "glm", "glm4", "granite", "helium", "hunyuan_v1_dense", "llama",
    "mistral", "olmo", "olmo2", "persimmon", "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "starcoder2",
)  # fmt: skip
# Ways to scale rotary positions that depend on how long the row is.
_ROW_ROPES = ("dynamic", "longrope")


def build_language_model(path: str, *, dtype: torch.dtype) -> PreTrainedModel:
    """The *ForCausalLM of a folder or hub id, or one with random weights from a CONFIG.json."""
    config = read_config(path, KEY)
    check_text_config(config, path)
    if draws_weights(path):
        return build_random(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config, dtype=dtype)
    return load_strictly(AutoModelForCausalLM, path, f"{KEY}: {path}", config=config, dtype=dtype)


def check_text_config(config: PretrainedConfig, path: str) -> None:
    """Refuse what the prefix-tree attention or the scoring head does not compute, rather than train it wrongly."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{KEY}: '{path}' is a {config.model_type}; expected a causal language model (Qwen2, Llama)")
    if getattr(config, "is_heterogeneous", False):
        raise ValueError(
            f"{KEY}: '{path}' has layers with settings of their own (per_layer_config); expected equal ones"
        )
    for trait, present in _unsupported_traits(config).items():
        if present:
            raise ValueError(
                f"{KEY}: '{path}' ({config.model_type}) has {trait}, which the prefix-tree attention does not compute; "
                "use a plain causal decoder such as Qwen2, Qwen2.5 or Llama"
            )
    if config.model_type not in DECODERS:
        raise ValueError(
            f"{KEY}: '{path}' is a {config.model_type}, and its packed rows are not known to be what stock "
            f"transformers computes; use one of {', '.join(DECODERS)}"
        )


def _unsupported_traits(config: PretrainedConfig) -> dict[str, bool]:
    def value(name: str) -> Any:
        return getattr(config, name, None)

    layer_types = set(value("layer_types") or ())
    # Qwen2 carries a window that is off; Mistral's is on where it is not None and has no switch.
    window = value("sliding_window") is not None and value("use_sliding_window") in (None, True)
    rotary = value("rope_parameters") is not None or value("rotary_dim") is not None
    return {
        "positions other than rotary ones": not rotary,
        "attention to what follows (is_causal: false)": value("is_causal") is False,
        "sliding-window attention": "sliding_attention" in layer_types or (window and not layer_types),
        f"layers of the kinds {sorted(layer_types)}": bool(layer_types - {"full_attention", "sliding_attention"}),
        "attention soft-capping": value("attn_logit_softcapping") is not None,
        "logit soft-capping": value("final_logit_softcapping") is not None,
        "attention sinks": config.model_type.startswith("gpt_oss"),
        "scaled logits": any(value(name) not in (None, 1, 1.0) for name in ("logit_scale", "logits_scaling")),
    }


def check_positions(config: Any, num_tokens: int) -> str | None:
    """What to say of a pair of `num_tokens` to a model that was trained on shorter texts; None where it was not.

    Raises ValueError where the rotation would then follow the longest pair of a row, so that a token's value
    depended on what it is packed with. Up to the trained length it is the same in every row: positions start again
    with each pair.
    """
    limit = int(config.max_position_embeddings)
    for rope in _rope_settings(config):
        # transformers scales `dynamic` from max_position_embeddings on, whatever else the mapping says.
        original = rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None
        trained = int(original or limit)
        if rope.get("rope_type") in _ROW_ROPES and num_tokens > trained:
            raise ValueError(
                f"data.max_tokens: {num_tokens} tokens, but the positions of this {config.model_type} are scaled by "
                f"{rope['rope_type']}, which turns a row otherwise once it is longer than {trained}; set "
                f"data.max_tokens to at most {trained} (with data.eval, less evaluate.max_new_tokens)"
            )
    if num_tokens <= limit:
        return None
    return f"{num_tokens} tokens are more than the {limit} that the language model was made for"


def _rope_settings(config: Any) -> list[dict[str, Any]]:
    """One mapping, or one for each kind of layer."""
    settings = getattr(config, "rope_parameters", None) or {}
    return [settings] if "rope_type" in settings else [part for part in settings.values() if isinstance(part, dict)]


def fit_vocabulary(language_model: PreTrainedModel, num_tokens: int) -> bool:
    """Give the embeddings a row for each of the tokenizer's tokens; whether any had to be added.

    Rows are padded to a multiple of 64. New ones are drawn afresh rather than from the others' mean and covariance,
    which under ZeRO-3 would need the whole matrix on each rank.
    """
    size = padded_vocabulary(language_model.config.vocab_size, num_tokens)
    if size == language_model.config.vocab_size:
        return False
    language_model.resize_token_embeddings(size, mean_resizing=False)
    return True


def padded_vocabulary(vocab_size: int, num_tokens: int) -> int:
    """Rows that the embeddings have once each of the tokenizer's tokens has one."""
    return vocab_size if num_tokens <= vocab_size else -(-num_tokens // 64) * 64


def write_language_model(
    folder: str | Path, language_model: Any, state_dict: Mapping[str, Tensor], processor: Processor
) -> None:
    """Write the language model alone as an HF *ForCausalLM folder with its tokenizer; read back and compared."""
    prefix, config = "language_model.", copy.deepcopy(language_model.config)
    values = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    if config.tie_word_embeddings:
        values.pop("lm_head.weight", None)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    shell = build_shell(model_class, config, values)
    shell.generation_config = make_generation_config(language_model.generation_config, processor)
    save_and_compare(folder, shell, values)
    processor.tokenizer.save_pretrained(folder)


def make_generation_config(source: GenerationConfig | None, processor: Processor) -> GenerationConfig:
    """`source`, made to stop at the end of a turn as the model was trained to."""
    config = copy.deepcopy(source) if source is not None else GenerationConfig()
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    others = [token for token in stops if token is not None and token != processor.end_of_turn_id]
    config.eos_token_id = [processor.end_of_turn_id, *others] if others else processor.end_of_turn_id
    if config.pad_token_id is None:
        config.pad_token_id = processor.tokenizer.pad_token_id
    config._from_model_config = False  # else transformers would derive it again, without the above
    return config
