"""Encoders of transformers: alone, in a whole CLIP, in an HF LLaVA, or a bare CONFIG.json. Which: `families.py`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoImageProcessor,
    CLIPImageProcessor,
    CLIPVisionModel,
    DINOv3ConvNextModel,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    PretrainedConfig,
    PreTrainedModel,
    SiglipVisionModel,
)

from pivot import pretrained, renamed
from pivot.config import VisionTowerConfig
from pivot.encoders.facts import Encoder, EncoderFacts, ImageFit, ImageGeometry, as_triple, num_blocks_run
from pivot.encoders.families import Family, find_family, in_order, require_known, switch_off_chance
from pivot.encoders.positions import resize_positions
from pivot.encoders.square import recognise_fit
from pivot.pretrained import Gather, build_random, build_shell, load_strictly, read_config, read_json

# Two configurations describe the same network when these agree.
_NETWORK = ("model_type", "hidden_size", "hidden_sizes", "num_hidden_layers", "intermediate_size", "patch_size")


# -- without weights -----------------------------------------------------------------------------------------------


def describe(section: VisionTowerConfig) -> EncoderFacts:
    assert section.path is not None
    config = _read_vision_config(section.path)
    if any(Path(section.path).glob("*.safetensors*")):  # a folder of settings alone can be described, too
        pretrained.require_weights(Path(section.path), f"model.vision_tower.path: {section.path}")
    family = require_known(config, section.path)
    saved, (mean, std) = read_image_settings(section.path), family.normalisation
    num_blocks = family.num_blocks(config)
    return EncoderFacts(
        size=section.image_size or int(config.image_size),
        patch_size=family.patch_size(config, num_blocks_run(section.layer, num_blocks)),
        has_cls=family.has_cls,
        num_blocks=num_blocks,
        mean=as_triple(saved.get("image_mean", mean)),
        std=as_triple(saved.get("image_std", std)),
        num_registers=count_registers(config),
    )


def _read_vision_config(path: str) -> Any:
    """The vision configuration of an encoder, of a whole CLIP or SigLIP, or of an HF LLaVA."""
    config = read_config(path, "model.vision_tower.path")
    config = getattr(config, "vision_config", config)
    config._attn_implementation = pretrained.attention_of(require_known(config, path).model_class)
    return config


def has_cls_token(vision_config: PretrainedConfig, path: str) -> bool:
    """Whether the encoder of this configuration, read at `path`, has a CLS token. Raises ValueError for other kinds."""
    return require_known(vision_config, path).has_cls


def count_registers(vision_config: PretrainedConfig) -> int:
    return int(getattr(vision_config, "num_register_tokens", 0))


def read_image_settings(path: str) -> dict[str, Any]:
    """The image processor's settings beside the weights, {} where there are none."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        settings = read_json(path, name)
        settings = settings.get("image_processor", settings)
        if "image_mean" in settings or "image_processor_type" in settings:
            return settings
    return {}


def describe_network(path: str) -> Mapping[str, Any]:
    config = _read_vision_config(path)
    return {field: getattr(config, field, None) for field in _NETWORK}


def read_image_fit(encoder: Encoder) -> ImageFit | None:
    """As the image processor in the encoder's folder does it: its pixels of sample images are compared to ours."""
    path = encoder.path
    if not read_image_settings(path):
        return None
    image_processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=False)
    size = encoder.facts.size if encoder.section.image_size is None else None
    fit, resample = recognise_fit(image_processor, encoder.facts, size)
    return ImageFit(fit, resample, f"the image processor at {path}")


def build_shapes(encoder: Encoder) -> nn.Module:
    config = copy.deepcopy(_read_vision_config(encoder.path))
    config.image_size = encoder.facts.size  # where it is another, the positions are resampled
    return require_known(config, encoder.path).model_class(config, **_constructor_settings(config, encoder.path))


# -- with weights --------------------------------------------------------------------------------------------------


def draws_weights(path: str) -> bool:
    return pretrained.draws_weights(path)


def digest_weights(path: str) -> str:
    return pretrained.digest_weights(path)


def load(encoder: Encoder, *, dtype: torch.dtype, gather: Gather) -> nn.Module:
    model = _load_as_saved(encoder.path, dtype)
    resize_positions(model, encoder.facts, gather)
    return model


def _load_as_saved(path: str, dtype: torch.dtype) -> PreTrainedModel:
    config = _read_vision_config(path)
    model_class = require_known(config, path).model_class
    if draws_weights(path):
        return build_random(model_class, config, dtype)
    where = f"model.vision_tower.path: {path}"
    whole = read_config(path, "model.vision_tower.path")
    if whole.model_type == "llava":
        return load_strictly(LlavaForConditionalGeneration, path, where, config=whole, dtype=dtype).model.vision_tower
    settings = _constructor_settings(config, path)
    left_out = require_known(config, path).left_out
    return load_strictly(model_class, path, where, accepted=left_out, config=config, dtype=dtype, **settings)


def _constructor_settings(config: PretrainedConfig, path: str) -> dict[str, Any]:
    """A ViT has a pooler or has none, and its configuration does not say which."""
    if config.model_type != "vit" or draws_weights(path):
        return {}
    return {"add_pooling_layer": pretrained.holds_tensor(path, "pooler.dense.weight")}


# -- the module ----------------------------------------------------------------------------------------------------


def cut(model: Any, num_blocks: int, *, post_norm: bool) -> int:
    family = find_family(model)
    blocks = list_blocks(model)
    whole = len(blocks) == num_blocks
    if post_norm and (family.norm is None or (family.stages(model.config) and not whole)):
        raise ValueError(
            "model.vision_tower.post_norm: true, but this encoder has no norm for patch features of this layer: its "
            "final norm comes after the pooling, or is made for the last stage"
        )
    del blocks[num_blocks:]
    if not post_norm:
        setattr(model, family.norm or "layernorm", nn.Identity())
    for head in ("head", "pooler"):
        if getattr(model, head, None) is not None:
            setattr(model, head, nn.Identity())
    if getattr(getattr(model, "embeddings", None), "mask_token", None) is not None:  # only pre-training puts it in
        model.embeddings.mask_token = None
    switch_off_chance(model)
    return family.width(model.config, num_blocks)


def run(model: Any, pixels: Tensor) -> Tensor:
    if not isinstance(model, SiglipVisionModel | CLIPVisionModel):
        return _as_tokens(model, model(pixels, **in_order(model, pixels)).last_hidden_state)
    # The encoder's own forward would pool, and CLIP's would normalise the CLS token alone.
    hidden = model.embeddings(pixels)
    if isinstance(model, CLIPVisionModel):
        hidden = model.pre_layrnorm(hidden)
    hidden = model.encoder(inputs_embeds=hidden).last_hidden_state
    return model.post_layernorm(hidden)  # an identity unless post_norm


def _as_tokens(model: Any, features: Tensor) -> Tensor:
    """[I, tokens, width] of these, or of a feature map [I, width, rows, columns], row by row."""
    if isinstance(model, DINOv3ConvNextModel) and features.ndim == 3:
        return features[:, 1:]  # the first is their mean
    return features.flatten(2).transpose(1, 2) if features.ndim == 4 else features


def list_blocks(model: Any) -> nn.ModuleList:
    # The outermost list: releases keep it in other places.
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def recompute_blocks(model: Any) -> None:
    if model.supports_gradient_checkpointing:
        renamed.recompute_blocks(model)
        return
    stages: Any = list_blocks(model)
    for layer in (layer for stage in stages for layer in stage.layers):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


# -- back to disk --------------------------------------------------------------------------------------------------


def write(folder: Path, encoder: Encoder, model: Any, values: Mapping[str, Tensor], geometry: ImageGeometry) -> None:
    """A folder for `from_pretrained`, with its image processor. What it is stands in the configuration of `model`."""
    config = copy.deepcopy(model.config)
    is_vit = config.model_type == "vit"
    settings = {"add_pooling_layer": any(name.startswith("pooler.") for name in values)} if is_vit else {}
    shell = build_shell(find_family(model).model_class, config, values, **settings)
    pretrained.save_and_compare(folder, shell, values, **settings)
    build_image_processor(geometry).save_pretrained(folder)


def name_folder(folder: str) -> str:
    return folder


def build_image_processor(geometry: ImageGeometry) -> Any:
    """The HF image processor that prepares an image as training does."""
    square = {"height": geometry.size, "width": geometry.size}
    common: dict[str, Any] = {
        "image_mean": list(geometry.mean),
        "image_std": list(geometry.std),
        "do_convert_rgb": True,
        "crop_size": square,
        "resample": Image.Resampling[geometry.resample.upper()],
    }
    if geometry.fit == "squash":
        return CLIPImageProcessor(size=square, do_center_crop=False, **common)
    if geometry.fit == "crop":
        return CLIPImageProcessor(size={"shortest_edge": geometry.size}, do_center_crop=True, **common)
    return LlavaImageProcessor(size=square, do_pad=True, do_center_crop=False, **common)


def read_hf_config(model: Any) -> PretrainedConfig | None:
    """A copy of the configuration by which transformers knows this encoder, None for one of another library."""
    return copy.deepcopy(model.config) if isinstance(model, PreTrainedModel) else None


def run_stock(encoder: Encoder, pixels: Tensor) -> Tensor:
    model: Any = _load_as_saved(encoder.path, torch.float32).eval()
    switch_off_chance(model)
    states = model(pixels, output_hidden_states=True, **in_order(model, pixels)).hidden_states
    hidden = states[encoder.num_blocks - encoder.facts.num_blocks - 1]
    hidden = hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden
    norm = find_family(model).norm
    return getattr(model, norm)(hidden) if encoder.section.post_norm and norm is not None else hidden


def reason_against_llava(model: Any, encoder: Encoder) -> str | None:
    """Why HF LLaVA cannot take the features that the run takes, None where it can."""
    if not isinstance(model, PreTrainedModel):
        return f"the vision tower is the {encoder.library} encoder of model.vision_tower.path"
    family: Family = find_family(model)
    if family.not_llava is not None:
        return family.not_llava
    if encoder.section.post_norm:
        return "model.vision_tower.post_norm is true"
    if encoder.facts.num_registers and encoder.section.registers == "drop":
        return "model.vision_tower.registers is drop"
    return None
