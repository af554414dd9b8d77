"""Tiny encoders of every family with random weights, made and run by their own libraries."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from tests.kit.tiny import IMAGE_SIZE, NUM_LAYERS, PATCH_SIZE, WIDTH

_VIT = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}
_STAGES = {"hidden_sizes": [8, 8, 16, 24], "depths": [1, 1, 2, 1], "image_size": IMAGE_SIZE}


class HF(NamedTuple):
    """A family of transformers: its model, its configuration, the final norm's name, and what comes before patches."""

    model: str
    config: str
    norm: str | None
    has_cls: bool = False
    registers: int = 0
    settings: Mapping[str, Any] = MappingProxyType({})

    @property
    def is_map(self) -> bool:
        return "ConvNext" in self.model

    @property
    def prefix(self) -> int:
        return int(self.has_cls) + self.registers


HF_FAMILIES = {
    "siglip": HF("SiglipVisionModel", "SiglipVisionConfig", "post_layernorm"),
    "clip": HF("CLIPVisionModel", "CLIPVisionConfig", "post_layernorm", True),
    "dinov2": HF("Dinov2Model", "Dinov2Config", "layernorm", True),
    "dinov2_registers": HF("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", "layernorm", True, 4),
    "dinov3": HF("DINOv3ViTModel", "DINOv3ViTConfig", "norm", True, 4, {"num_register_tokens": 4}),
    "vit": HF("ViTModel", "ViTConfig", "layernorm", True),
    "mae": HF("ViTMAEModel", "ViTMAEConfig", "layernorm", True),
    "aimv2": HF("Aimv2VisionModel", "Aimv2VisionConfig", "rms_norm"),
    "aimv2_native": HF("Aimv2VisionModel", "Aimv2VisionConfig", "rms_norm", settings={"is_native": True}),
    "convnext": HF("ConvNextModel", "ConvNextConfig", None),
    "convnextv2": HF("ConvNextV2Model", "ConvNextV2Config", None),
    "dinov3_convnext": HF("DINOv3ConvNextModel", "DINOv3ConvNextConfig", "layer_norm"),
}


def stir(model: nn.Module) -> None:
    """Move every parameter: at ones and zeros, a norm or layer scale that is skipped would be hard to see."""
    torch.manual_seed(4)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)


def write_hf(folder: Path, family: HF) -> str:
    torch.manual_seed(2)
    settings = (_STAGES if family.is_map else _VIT) | dict(family.settings)
    model = getattr(transformers, family.model)(getattr(transformers, family.config)(**settings))
    stir(model)
    model.save_pretrained(folder)
    return str(folder)


def hf_states(path: str, family: HF, pixels: Tensor, **settings: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """The stock model, and its hidden states [I, tokens, width]. Of MAE: every patch kept, put back in its order."""
    model: Any = getattr(transformers, family.model).from_pretrained(path)
    if family.model == "ViTMAEModel":
        model.config.mask_ratio = 0.0
        torch.manual_seed(0)
        out = model(pixels, output_hidden_states=True, **settings)
        order = out.ids_restore[..., None].expand(-1, -1, WIDTH)
        states = [torch.cat([s[:, :1], s[:, 1:].gather(1, order)], dim=1) for s in out.hidden_states]
        return model, tuple(states)
    states = model(pixels, output_hidden_states=True, **settings).hidden_states
    return model, tuple(s.flatten(2).transpose(1, 2) if s.ndim == 4 else s for s in states)


# name -> architecture and arguments: without tags, so that nothing is asked of a hub
_TIMM_VIT = {"img_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "embed_dim": WIDTH, "depth": NUM_LAYERS, "num_heads": 4}
TIMM_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "supervised": ("vit_base_patch16_224", _TIMM_VIT | {"num_classes": 5}),
    "mae or moco-v3": ("vit_base_patch16_224", _TIMM_VIT | {"num_classes": 0}),
    "dinov2 registers": ("vit_small_patch14_reg4_dinov2", _TIMM_VIT | {"num_classes": 0}),
    "siglip": ("vit_base_patch16_siglip_224", _TIMM_VIT | {"num_classes": 0}),
    "clip": ("vit_base_patch16_clip_224", _TIMM_VIT | {"num_classes": 7}),
    "average pool": ("vit_base_patch16_224", _TIMM_VIT | {"num_classes": 5, "global_pool": "avg"}),
    "eva02": ("eva02_tiny_patch14_224", _TIMM_VIT | {"num_classes": 0, "global_pool": "token"}),
    "eva02 average pool": ("eva02_tiny_patch14_224", _TIMM_VIT | {"num_classes": 3}),
    "dinov3": ("vit_small_patch16_dinov3", _TIMM_VIT | {"num_classes": 0}),
    "convnext": ("convnext_tiny", {"depths": (1, 1, 2, 1), "dims": (8, 8, 16, 24), "num_classes": 5}),
    "convnextv2": ("convnextv2_tiny", {"depths": (1, 1, 2, 1), "dims": (8, 8, 16, 24), "num_classes": 0}),
}


def write_timm(folder: Path, name: str) -> str:
    """A folder as timm saves it."""
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(2)
    architecture, settings = TIMM_FAMILIES[name]
    model = timm.create_model(architecture, **settings)
    stir(model)
    data = {"input_size": (3, IMAGE_SIZE, IMAGE_SIZE), "crop_pct": 1.0, "crop_mode": "squash"}
    save_for_hf(model, str(folder), data_config=data, safe_serialization=True)
    return f"timm:local-dir:{folder}"
