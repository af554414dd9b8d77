"""What the vision encoder makes of an image: its size in pixels, its tokens, its normalisation; read without weights.

`describe_vision_tower` is the one place that reads an encoder's configuration, so that data (which decodes images to
this size) and model (which turns them into this many features) cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from pivot.config import VisionTowerConfig
from pivot.pretrained import read_config, read_json

OPEN_CLIP = "open_clip:"
# HF model_type -> (has a CLS token, default mean, default std)
FAMILIES: dict[str, tuple[bool, list[float], list[float]]] = {
    "siglip_vision_model": (False, IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),  # also SigLIP 2 of fixed resolution
    "clip_vision_model": (True, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
}

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class ImageGeometry:
    """What one image becomes."""

    size: int  # pixels a side, square
    num_tokens: int  # image tokens per image
    mean: Triple  # of pixel values in [0, 1]
    std: Triple
    fit: str  # squash | pad | crop: how an image becomes the square
    resample: str = "bicubic"  # | bilinear


@dataclass(frozen=True)
class EncoderFacts:
    """What an encoder's configuration says about its input and output."""

    size: int  # pixels a side
    patch_size: int
    has_cls: bool
    num_blocks: int
    mean: Triple
    std: Triple

    def num_features(self, cls: str) -> int:
        """Features per image: one a patch, and the CLS token's where it is kept."""
        return (self.size // self.patch_size) ** 2 + int(cls == "keep")

    def geometry(self, cls: str, fit: str, resample: str = "bicubic") -> ImageGeometry:
        return ImageGeometry(self.size, self.num_features(cls), self.mean, self.std, fit, resample)


def num_blocks_run(layer: int, num_blocks: int) -> int:
    """How many blocks lie before hidden state `layer`, which counts as in HF LLaVA: 0 the embeddings, -1 the last."""
    count = layer if layer >= 0 else num_blocks + 1 + layer
    if not 1 <= count <= num_blocks:
        raise ValueError(
            f"model.vision_tower.layer: found {layer}, but the encoder has {num_blocks} blocks; "
            f"expected 1 to {num_blocks}, or -{num_blocks} to -1"
        )
    return count


def describe_vision_tower(section: VisionTowerConfig) -> EncoderFacts:
    """The facts of the encoder (or of the one inside an HF LLaVA folder) that `section` names, at its image size."""
    if section.path is None:
        raise ValueError("model.vision_tower.path: absent; give a folder, a hub id, a CONFIG.json or open_clip:MODEL")
    if section.path.startswith(OPEN_CLIP):
        facts = _describe_open_clip(section)
    else:
        config = read_vision_config(section.path)
        has_cls, mean, std = FAMILIES[config.model_type]
        saved = read_image_settings(section.path)
        facts = EncoderFacts(
            size=section.image_size or int(config.image_size),
            patch_size=int(config.patch_size),
            has_cls=has_cls,
            num_blocks=config.num_hidden_layers,
            mean=_triple(saved.get("image_mean", mean)),
            std=_triple(saved.get("image_std", std)),
        )
    if facts.size < facts.patch_size:
        raise ValueError(
            f"model.vision_tower.image_size: {facts.size} pixels, smaller than a patch of {facts.patch_size}"
        )
    if section.cls == "keep" and not facts.has_cls:
        raise ValueError(f"model.vision_tower.cls: keep, but {section.path} has no CLS token; use drop")
    num_blocks_run(section.layer, facts.num_blocks)
    return facts


def _triple(values: Any) -> Triple:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def read_vision_config(path: str) -> PretrainedConfig:
    """The vision configuration of an encoder, of a whole CLIP or SigLIP, or of an HF LLaVA."""
    config = read_config(path, "model.vision_tower.path")
    config = getattr(config, "vision_config", config)
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model.vision_tower.path: '{path}' is a {config.model_type}; expected one of {', '.join(FAMILIES)} "
            "(SigLIP 2 in its fixed-resolution form), or open_clip:MODEL"
        )
    return config


def read_image_settings(path: str) -> dict[str, Any]:
    """The image processor's settings beside the weights, {} where there are none."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        settings = read_json(path, name)
        settings = settings.get("image_processor", settings)
        if "image_mean" in settings or "image_processor_type" in settings:
            return settings
    return {}


def split_open_clip(path: str) -> tuple[str, str | None]:
    """`open_clip:MODEL[@TAG_OR_FILE]` as (model, tag or file); MODEL may be open_clip's local-dir:... or hf-hub:..."""
    model, _, weights = path.removeprefix(OPEN_CLIP).partition("@")
    return model, weights or None


def _describe_open_clip(section: VisionTowerConfig) -> EncoderFacts:
    import open_clip  # seconds to import; only those who use it wait for it

    assert section.path is not None
    model, _ = split_open_clip(section.path)
    try:
        config = open_clip.get_model_config(model)
    except OSError as error:
        raise ValueError(f"model.vision_tower.path: no open_clip_config.json at '{model}': {error}") from error
    if config is None:
        raise ValueError(f"model.vision_tower.path: open_clip knows no model '{model}'; see open_clip.list_models()")
    vision = config["vision_cfg"]
    size = section.image_size or vision["image_size"]
    if "timm_model_name" in vision:
        if size != vision["image_size"]:
            raise ValueError(
                f"model.vision_tower.image_size: {size}, but open_clip cannot save its timm encoder '{model}' at "
                f"another size than {vision['image_size']}; use the variant of the model that was made for that size"
            )
        patch_size, num_prefix_tokens, num_blocks = _describe_timm(vision["timm_model_name"])
        if num_prefix_tokens not in (0, 1):
            raise ValueError(
                f"model.vision_tower.path: '{model}' has {num_prefix_tokens} prefix tokens; expected a CLS or none"
            )
        has_cls = num_prefix_tokens == 1
    elif isinstance(vision["layers"], int) and isinstance(vision.get("patch_size"), int):
        patch_size, has_cls, num_blocks = vision["patch_size"], True, vision["layers"]
    else:
        raise ValueError(f"model.vision_tower.path: the image tower of open_clip's '{model}' is not a ViT")
    mean, std = _open_clip_normalisation(section.path)
    if not isinstance(size, int):
        raise ValueError(f"model.vision_tower.path: '{model}' takes images of {size} pixels; expected square ones")
    return EncoderFacts(size, patch_size, has_cls, num_blocks, mean, std)


@cache
def _describe_timm(name: str) -> tuple[int, int, int]:
    """Patch size, number of prefix tokens and blocks of a timm ViT, from a build without memory."""
    import timm
    from timm.models import VisionTransformer

    with torch.device("meta"):
        trunk = timm.create_model(name, pretrained=False)
    if not isinstance(trunk, VisionTransformer):
        raise ValueError(f"model.vision_tower.path: timm's '{name}' is a {type(trunk).__name__}; expected a ViT")
    return int(trunk.patch_embed.patch_size[0]), trunk.num_prefix_tokens, len(trunk.blocks)


def _open_clip_normalisation(path: str) -> tuple[Triple, Triple]:
    settings = read_open_clip_preprocessing(path)
    return _triple(settings.get("mean") or OPENAI_CLIP_MEAN), _triple(settings.get("std") or OPENAI_CLIP_STD)


def read_open_clip_preprocessing(path: str) -> dict[str, Any]:
    """mean, std, interpolation and resize_mode, as far as the model's own folder or tag says them.

    For a file or random weights, what all tags of the model say alike.
    """
    import open_clip

    model, weights = split_open_clip(path)
    _, _, place = model.partition(":")
    if place:  # local-dir:FOLDER or hf-hub:ID
        return read_json(place, "open_clip_config.json").get("preprocess_cfg", {})
    known = {tag: open_clip.get_pretrained_cfg(model, tag) for tag in open_clip.list_pretrained_tags_by_model(model)}
    chosen = [known[weights]] if weights in known else list(known.values())
    said = {key: {_frozen(one.get(key)) for one in chosen} for key in ("mean", "std", "interpolation", "resize_mode")}
    return {key: values.pop() for key, values in said.items() if len(values) == 1}


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value
