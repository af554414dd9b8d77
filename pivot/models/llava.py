"""To and from HF LLaVA folders: strictly in, checked after writing.

Our names are `vision_tower.*`, `projector.*`, `language_model.*`. `write_llava` takes a consolidated state dict (so a
ZeRO-3 run or a checkpoint can be exported alike), writes with `save_pretrained(state_dict=...)`, which knows the names
on disk, then loads the folder again with stock code and compares every tensor bit for bit. Call it on one rank.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

from pivot.config import COMPONENTS, ModelConfig, VisionTowerConfig
from pivot.encoders.export import PREFIX
from pivot.encoders.facts import Encoder
from pivot.encoders.library import resolve_encoder
from pivot.encoders.positions import resize_positions
from pivot.encoders.tower import VisionTower, wrap_encoder
from pivot.encoders.transformers import count_registers, has_cls_token, read_hf_config, reason_against_llava
from pivot.models.language import check_text_config, make_generation_config
from pivot.models.projector import Projector
from pivot.pretrained import Gather, build_shell, load_strictly, read_config, save_and_compare
from pivot.processor import Processor

# our prefix -> the prefix in a LlavaForConditionalGeneration; the first that matches counts
_LLAVA_PREFIXES = (
    (PREFIX, "model.vision_tower."),
    ("projector.", "model.multi_modal_projector."),
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
)


@dataclass
class LlavaParts:
    """What an HF LLaVA folder holds."""

    vision_tower: VisionTower
    projector: Projector
    language_model: PreTrainedModel
    config: LlavaConfig


def is_llava(path: str) -> bool:
    return read_config(path, "init_from").model_type == "llava"


def load_llava(
    path: str,
    model: ModelConfig,
    *,
    dtype: torch.dtype,
    gather: Gather = nullcontext,
    parts: Collection[str] = COMPONENTS,
    encoder: Encoder | None = None,
) -> LlavaParts:
    """The parts of an HF LlavaForConditionalGeneration folder; ValueError where it and `model` disagree.

    `parts` names those that will be used. Another feature layer, for example, suits a new projector, so it is refused
    only where the folder's projector is to be used. `encoder`: that of the folder, where it was resolved before.
    Under a live HfDeepSpeedConfig (ZeRO-3) the weights come partitioned; `gather` must then be given.
    """
    config = read_config(path, "init_from")
    if not isinstance(config, LlavaConfig):
        raise ValueError(
            f"init_from: '{path}' is a {config.model_type}; expected a LlavaForConditionalGeneration folder"
        )
    encoder = encoder or resolve_encoder(replace(model.vision_tower, path=path))
    if "projector" in parts:
        require_same_features(path, model)
    if "language_model" in parts:
        text_config: Any = config.text_config
        check_text_config(text_config, path)
    whole = load_strictly(LlavaForConditionalGeneration, path, f"init_from: {path}", config=config, dtype=dtype)
    resize_positions(whole.model.vision_tower, encoder.facts, gather)
    return LlavaParts(
        vision_tower=wrap_encoder(whole.model.vision_tower, encoder, gather=gather),
        projector=_take_projector(whole.model.multi_modal_projector, config),
        language_model=_take_language_model(whole),
        config=whole.config,
    )


def recorded_model(path: str) -> ModelConfig:
    """The features and the projector that an HF LLaVA was made with, as a run's settings say them.

    Raises ValueError for what no settings of a run can say.
    """
    return _recorded_model(read_config(path, "init_from"), path)


def _recorded_model(config: Any, path: str) -> ModelConfig:
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(
            f"init_from: '{path}' has vision_feature_layer={list(config.vision_feature_layer)}, features of several "
            "layers side by side; expected one layer, as a number (or take init_parts without the projector)"
        )
    drops_first = config.vision_feature_select_strategy == "default"
    has_cls = has_cls_token(config.vision_config, path)
    if drops_first and not has_cls:
        raise ValueError(
            f"init_from: '{path}' says vision_feature_select_strategy=default, which drops the first token of an "
            "encoder that has no CLS token; expected full"
        )
    if config.projector_hidden_act != "gelu" or not config.multimodal_projector_bias:
        raise ValueError(
            f"init_from: '{path}' has a projector with {config.projector_hidden_act} and "
            f"bias={config.multimodal_projector_bias}; expected gelu and a bias"
        )
    cls = "keep" if has_cls and not drops_first else "drop"
    registers = "keep" if count_registers(config.vision_config) else "drop"
    tower = VisionTowerConfig(layer=config.vision_feature_layer, cls=cls, registers=registers)
    return ModelConfig(tower, projector="mlp2x_gelu")


def recorded_dtype(path: str) -> torch.dtype:
    """The precision that an HF LLaVA was written in; float32 where it does not say."""
    dtype: Any = read_config(path, "init_from").dtype
    return dtype or torch.float32


def require_same_features(path: str, model: ModelConfig) -> None:
    """ValueError where the projector of the HF LLaVA at `path` was made for other features than `model` asks for."""
    config: Any = read_config(path, "init_from")
    recorded = _recorded_model(config, path)
    if not has_cls_token(config.vision_config, path):
        recorded.vision_tower.cls = model.vision_tower.cls  # there was none to keep or to drop
    if not count_registers(config.vision_config):
        recorded.vision_tower.registers = model.vision_tower.registers
    require_agreement(path, recorded, model)


def require_agreement(path: str, recorded: ModelConfig, model: ModelConfig) -> None:
    """ValueError where `model` asks for other features or another projector than `path` was made with."""
    made, asked = recorded.vision_tower, model.vision_tower
    for key, made_with, wanted in (
        ("model.vision_tower.layer", made.layer, asked.layer),
        ("model.vision_tower.cls", made.cls, asked.cls),
        ("model.vision_tower.registers", made.registers, asked.registers),
        ("model.vision_tower.post_norm", made.post_norm, asked.post_norm),
        ("model.projector", recorded.projector, model.projector),
    ):
        if made_with != wanted:
            raise ValueError(f"{key}: {wanted}, but '{path}' was made with {made_with}; set {key}={made_with}")


def _take_projector(source: Any, config: Any) -> Projector:
    with torch.device("meta"):
        projector = Projector("mlp2x_gelu", config.vision_config.hidden_size, config.text_config.hidden_size)
    projector.linear_1, projector.linear_2 = source.linear_1, source.linear_2
    return projector


def _take_language_model(whole: Any) -> PreTrainedModel:
    """The *ForCausalLM that the LLaVA was made of: an empty one, given the loaded decoder and head (still tied)."""
    text_config = whole.config.text_config
    text_config.tie_word_embeddings = whole.config.tie_word_embeddings
    causal_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(text_config)]
    with torch.device("meta"):
        language_model: Any = causal_class(text_config)
    language_model.model, language_model.lm_head = whole.model.language_model, whole.lm_head
    language_model.generation_config = whole.generation_config
    return language_model


def to_llava_config(
    vision_tower: VisionTower, projector: Projector, language_model: PreTrainedModel, processor: Processor
) -> LlavaConfig:
    """The configuration of the HF LLaVA that computes what these parts compute; ValueError where there is none."""
    section, vision_config = vision_tower.section, read_hf_config(vision_tower.model)
    reason = reason_against_llava(vision_tower.model, vision_tower.encoder)
    if reason is None and projector.kind != "mlp2x_gelu":
        reason = f"model.projector is {projector.kind}"
    if reason is not None:
        raise ValueError(f"{reason}, which HF LLaVA cannot express; export the encoder alone")
    text_config: Any = copy.deepcopy(language_model.config)
    keeps_all = section.cls == "keep" or not vision_tower.facts.has_cls
    return LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=processor.image_token_id,
        image_seq_length=processor.geometry.num_tokens,
        vision_feature_layer=section.layer,
        vision_feature_select_strategy="full" if keeps_all else "default",
        tie_word_embeddings=text_config.tie_word_embeddings,
    )


def to_llava_state_dict(
    state_dict: Mapping[str, Tensor], set_aside: Mapping[str, Tensor], *, tied: bool
) -> dict[str, Tensor]:
    """Our names -> those of a LlavaForConditionalGeneration, with what was set aside back in its place.

    With tied embeddings the head is the embedding and has no entry of its own.
    """
    values = dict(state_dict) | {PREFIX + name: value for name, value in set_aside.items()}
    if tied and (head := values.pop("language_model.lm_head.weight", None)) is not None:
        embedding = values["language_model.model.embed_tokens.weight"]
        if not torch.equal(head, embedding):
            raise RuntimeError("the language model's head and embeddings are tied, but their values differ")
    return {_to_llava_name(name): value for name, value in values.items()}


def _to_llava_name(name: str) -> str:
    for prefix, llava_prefix in _LLAVA_PREFIXES:
        if name.startswith(prefix):
            return llava_prefix + name.removeprefix(prefix)
    raise RuntimeError(f"parameter '{name}' belongs to none of {', '.join(prefix for prefix, _ in _LLAVA_PREFIXES)}")


def write_llava(folder: str | Path, model: Any, state_dict: Mapping[str, Tensor], processor: Processor) -> None:
    """Write an HF LLaVA folder with its processor, and prove that stock transformers reads back what was written.

    `model` (an MLLM or LlavaParts) says what the parts are, `state_dict` (our names, consolidated) holds the values.
    """
    config = to_llava_config(model.vision_tower, model.projector, model.language_model, processor)
    values = to_llava_state_dict(state_dict, model.vision_tower.set_aside, tied=config.tie_word_embeddings)
    shell = build_shell(LlavaForConditionalGeneration, config, values)
    shell.generation_config = make_generation_config(model.language_model.generation_config, processor)
    save_and_compare(folder, shell, values)
    processor.save_pretrained(folder)
