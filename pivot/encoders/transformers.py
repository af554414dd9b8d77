"""SigLIP and CLIP encoders of transformers: alone, in a whole CLIP, in an HF LLaVA, or a bare CONFIG.json."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    CLIPImageProcessor,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    PretrainedConfig,
    PreTrainedModel,
    SiglipVisionModel,
)
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from pivot import pretrained, renamed
from pivot.config import VisionTowerConfig
from pivot.encoders.facts import Encoder, EncoderFacts, ImageFit, ImageGeometry, as_triple
from pivot.encoders.square import recognise_fit
from pivot.pretrained import Gather, build_random, build_shell, load_strictly, read_config, read_json

# HF model_type -> (has a CLS token, default mean, default std)
FAMILIES: dict[str, tuple[bool, list[float], list[float]]] = {
    "siglip_vision_model": (False, IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),  # also SigLIP 2 of fixed resolution
    "clip_vision_model": (True, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
}
MODEL_CLASSES: dict[str, type[PreTrainedModel]] = {
    "siglip_vision_model": SiglipVisionModel,
    "clip_vision_model": CLIPVisionModel,
}
# Two configurations describe the same network when these agree.
_NETWORK = ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "patch_size")
# The other half of a whole CLIP or SigLIP checkpoint.
_TEXT_SIDE = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")


# -- without weights -----------------------------------------------------------------------------------------------


def describe(section: VisionTowerConfig) -> EncoderFacts:
    assert section.path is not None
    config = _read_vision_config(section.path)
    has_cls, mean, std = FAMILIES[config.model_type]
    saved = read_image_settings(section.path)
    return EncoderFacts(
        size=section.image_size or int(config.image_size),
        patch_size=int(config.patch_size),
        has_cls=has_cls,
        num_blocks=config.num_hidden_layers,
        mean=as_triple(saved.get("image_mean", mean)),
        std=as_triple(saved.get("image_std", std)),
    )


def _read_vision_config(path: str) -> Any:
    """The vision configuration of an encoder, of a whole CLIP or SigLIP, or of an HF LLaVA."""
    config = read_config(path, "model.vision_tower.path")
    config = getattr(config, "vision_config", config)
    _require_known(config, path)
    return config


def _require_known(config: PretrainedConfig, path: str) -> None:
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model.vision_tower.path: '{path}' is a {config.model_type}; expected one of {', '.join(FAMILIES)} "
            "(SigLIP 2 in its fixed-resolution form), or LIBRARY:MODEL for an encoder of another library"
        )


def has_cls_token(vision_config: PretrainedConfig, path: str) -> bool:
    """Whether the encoder of this configuration, read at `path`, has a CLS token. Raises ValueError for other kinds."""
    _require_known(vision_config, path)
    return FAMILIES[vision_config.model_type][0]


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
    return MODEL_CLASSES[config.model_type](config)


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
    model_class = MODEL_CLASSES[config.model_type]
    if draws_weights(path):
        return build_random(model_class, config, dtype)
    where = f"model.vision_tower.path: {path}"
    whole = read_config(path, "model.vision_tower.path")
    if whole.model_type == "llava":
        return load_strictly(LlavaForConditionalGeneration, path, where, config=whole, dtype=dtype).model.vision_tower
    return load_strictly(model_class, path, where, accepted=_TEXT_SIDE, config=config, dtype=dtype)


def resize_positions(model: Any, facts: EncoderFacts, gather: Gather) -> None:
    """Resample the position embeddings once for another image size, so that an export is a plain model of that size.

    Bicubic and in float32, as transformers does in every forward with interpolate_pos_encoding=True.
    """
    embeddings, config = model.embeddings, model.config
    if config.image_size == facts.size:
        return
    old, new = config.image_size // facts.patch_size, facts.size // facts.patch_size
    table = embeddings.position_embedding.weight
    with gather([table]):
        values = table.detach().to("cpu", torch.float32, copy=True)
    prefix, grid = values[: int(facts.has_cls)], values[int(facts.has_cls) :]
    if grid.shape[0] != old * old:
        raise RuntimeError(f"{grid.shape[0]} positions, expected {old}x{old} from the encoder's configuration")
    grid = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)  # [1, D, old, old]
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    resized = torch.cat([prefix, grid.permute(0, 2, 3, 1).flatten(0, 2)]).to(table.dtype)
    # Not partitioned even under ZeRO-3: DeepSpeed does that for plain parameters when the engine is built.
    embeddings.position_embedding = nn.Embedding.from_pretrained(resized.to(table.device), freeze=False)
    embeddings.position_ids = torch.arange(len(resized), device=table.device)[None]
    embeddings.num_positions, embeddings.num_patches = len(resized), new * new
    embeddings.image_size = config.image_size = facts.size


# -- the module ----------------------------------------------------------------------------------------------------


def cut(model: Any, num_blocks: int, *, post_norm: bool) -> int:
    model.encoder.layers = model.encoder.layers[:num_blocks]
    if not post_norm:
        model.post_layernorm = nn.Identity()
    if hasattr(model, "head"):  # SigLIP's attention pool
        model.head = nn.Identity()
    return int(model.config.hidden_size)


def run(model: Any, pixels: Tensor) -> Tensor:
    # The encoder's own forward would pool, and CLIP's would normalise the CLS token alone.
    hidden = model.embeddings(pixels)
    if isinstance(model, CLIPVisionModel):
        hidden = model.pre_layrnorm(hidden)
    hidden = model.encoder(inputs_embeds=hidden).last_hidden_state
    return model.post_layernorm(hidden)  # an identity unless post_norm


def list_blocks(model: Any) -> nn.ModuleList:
    return model.encoder.layers


def recompute_blocks(model: Any) -> None:
    renamed.recompute_blocks(model)


# -- back to disk --------------------------------------------------------------------------------------------------


def write(folder: Path, encoder: Encoder, model: Any, values: Mapping[str, Tensor], geometry: ImageGeometry) -> None:
    """A folder for `from_pretrained`, with its image processor. What it is stands in the configuration of `model`."""
    config = copy.deepcopy(model.config)
    pretrained.save_and_compare(folder, build_shell(MODEL_CLASSES[config.model_type], config, values), values)
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
    path = encoder.path
    model_class = MODEL_CLASSES[_read_vision_config(path).model_type]
    model = load_strictly(model_class, path, path, dtype=torch.float32).eval()
    hidden = model(pixels, output_hidden_states=True).hidden_states[encoder.num_blocks]
    return model.post_layernorm(hidden) if encoder.section.post_norm else hidden
