"""The families of vision encoders of transformers whose patch features pivot takes, and what tells them apart."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Aimv2VisionModel,
    CLIPVisionModel,
    ConvNextModel,
    ConvNextV2Model,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ConvNextModel,
    DINOv3ViTModel,
    PretrainedConfig,
    PreTrainedModel,
    SiglipVisionModel,
    ViTMAEModel,
    ViTModel,
)
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

_IMAGENET = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
_HALVES = (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD)
_CLIP = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
# The other half of a whole CLIP or SigLIP checkpoint.
_TEXT_SIDE = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")


@dataclass(frozen=True)
class Family:
    """What pivot has to know of a model_type."""

    model_class: type[PreTrainedModel]
    normalisation: tuple[list[float], list[float]]  # mean and std, where no image processor says them
    norm: str | None  # the attribute with the final norm of patch features; None: its norm comes behind a pooling
    has_cls: bool = False
    left_out: tuple[str, ...] = ()  # how names in a checkpoint may begin that are no part of the encoder
    # Where the model does something by chance in training, and the settings of its config under which it does not.
    chance: tuple[str, dict[str, Any]] | None = None
    antialias: bool = False  # whether transformers smooths the positions of a larger grid that it resamples
    not_llava: str | None = None  # why HF LLaVA would not take these features

    def stages(self, config: PretrainedConfig) -> list[int] | None:
        """The widths of a network of stages, None for one whose blocks are all alike."""
        return getattr(config, "hidden_sizes", None)

    def num_blocks(self, config: Any) -> int:
        return len(self.stages(config) or range(config.num_hidden_layers))

    def patch_size(self, config: Any, num_blocks: int) -> int:
        """Pixels a side for which a feature behind block `num_blocks` stands: of stages, each but the first halves."""
        stem = int(getattr(config, "patch_size", 4))  # DINOv3's ConvNeXt has 4 and does not say so
        return stem * 2 ** (num_blocks - 1) if self.stages(config) else stem

    def width(self, config: Any, num_blocks: int) -> int:
        stages = self.stages(config)
        return int(stages[num_blocks - 1] if stages else config.hidden_size)


_FEATURE_MAP = "its features are a map, and HF LLaVA takes tokens"
FAMILIES: dict[str, Family] = {
    # Also SigLIP 2 of fixed resolution.
    "siglip_vision_model": Family(SiglipVisionModel, _HALVES, "post_layernorm", left_out=_TEXT_SIDE),
    "clip_vision_model": Family(CLIPVisionModel, _CLIP, "post_layernorm", True, _TEXT_SIDE),
    "dinov2": Family(Dinov2Model, _IMAGENET, "layernorm", True, ("classifier.",)),
    "dinov2_with_registers": Family(
        Dinov2WithRegistersModel, _IMAGENET, "layernorm", True, ("classifier.",), antialias=True
    ),
    "dinov3_vit": Family(
        DINOv3ViTModel,
        _IMAGENET,
        "norm",
        True,
        # In training it moves, stretches and scales the coordinates of all patches at random.
        chance=(
            "rope_embeddings",
            {"pos_embed_shift": None, "pos_embed_jitter": None, "pos_embed_rescale": None},
        ),
    ),
    "vit": Family(
        ViTModel,
        _HALVES,
        "layernorm",
        True,
        ("classifier.", "decoder.", "vit.embeddings.mask_token", "embeddings.mask_token"),
        not_llava="HF LLaVA always builds a pooler for a ViT, which this one may not have",
    ),
    "vit_mae": Family(
        ViTMAEModel,
        _IMAGENET,
        "layernorm",
        True,
        ("decoder.",),
        # It hides most patches and shuffles the rest; `in_order` keeps the order.
        chance=("embeddings", {"mask_ratio": 0.0}),
        not_llava="HF LLaVA would hide patches of a ViTMAE at random",
    ),
    "aimv2_vision_model": Family(Aimv2VisionModel, _CLIP, "rms_norm"),
    "convnext": Family(ConvNextModel, _IMAGENET, None, left_out=("classifier.",), not_llava=_FEATURE_MAP),
    "convnextv2": Family(ConvNextV2Model, _IMAGENET, None, left_out=("classifier.",), not_llava=_FEATURE_MAP),
    "dinov3_convnext": Family(DINOv3ConvNextModel, _IMAGENET, "layer_norm", not_llava=_FEATURE_MAP),
}


def require_known(config: PretrainedConfig, path: str) -> Family:
    """The family of a vision configuration that was read at `path`; ValueError for one that is none of these."""
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model.vision_tower.path: '{path}' is a {config.model_type}; expected one of {', '.join(FAMILIES)} "
            "(SigLIP 2 in its fixed-resolution form), or LIBRARY:MODEL for an encoder of another library"
        )
    return FAMILIES[config.model_type]


def find_family(model: PreTrainedModel) -> Family:
    return FAMILIES[model.config.model_type]


def switch_off_chance(model: Any) -> None:
    """Let the model do in training what it does in evaluation. What is written as its configuration stays as it was."""
    chance = find_family(model).chance
    if chance is not None:
        module = model.get_submodule(chance[0])
        module.config = copy.deepcopy(model.config)
        module.config.update(chance[1])


def in_order(model: Any, pixels: Tensor) -> dict[str, Any]:
    """The arguments beside `pixels` by which the model takes the patches in their order: ViTMAE sorts them by these."""
    if not isinstance(model, ViTMAEModel):
        return {}
    patch_size: Any = model.config.patch_size
    num_patches = (pixels.shape[-1] // patch_size) ** 2
    return {"noise": torch.arange(num_patches, device=pixels.device, dtype=torch.float32).expand(len(pixels), -1)}
