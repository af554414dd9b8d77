"""Another image size for an encoder of transformers: its table of positions, resampled once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pivot.encoders.facts import EncoderFacts
from pivot.encoders.families import find_family
from pivot.pretrained import Gather

_TABLES = ("position_embedding", "position_embeddings")  # an nn.Embedding, or a parameter [1, positions, width]


def resize_positions(model: Any, facts: EncoderFacts, gather: Gather) -> None:
    """Resample the position embeddings for another image size, so that an export is a plain model of that size.

    Bicubic and in float32, as transformers does in every forward with interpolate_pos_encoding=True (DINOv2 always).
    An encoder that works its positions out from the grid (rotary, sine) has no table; a feature map needs none.
    """
    embeddings, config = getattr(model, "embeddings", None), model.config
    if config.image_size == facts.size:
        return
    name = next((name for name in _TABLES if hasattr(embeddings, name)), None)
    if name is not None:
        table = getattr(embeddings, name)
        parameter: Any = table.weight if isinstance(table, nn.Embedding) else table
        with gather([parameter]):
            values = parameter.detach().to("cpu", torch.float32, copy=True)
        resized = _resample(
            values.flatten(0, -2), config.image_size // facts.patch_size, facts, find_family(model).antialias
        )
        resized = resized.to(parameter.device, parameter.dtype)
        # Not partitioned even under ZeRO-3: DeepSpeed does that for plain parameters when the engine is built.
        if isinstance(table, nn.Embedding):
            setattr(embeddings, name, nn.Embedding.from_pretrained(resized, freeze=False))
        else:
            setattr(embeddings, name, nn.Parameter(resized[None], requires_grad=parameter.requires_grad))
    _tell_size(embeddings, facts)
    config.image_size = facts.size


def _resample(values: Tensor, old: int, facts: EncoderFacts, antialias: bool) -> Tensor:
    """float32[positions, width] for the new grid; what stands before the patches' positions stays."""
    new = facts.size // facts.patch_size
    num_before = len(values) - old * old
    if num_before not in (0, int(facts.has_cls)):
        raise RuntimeError(f"{len(values)} positions, expected {old}x{old} from the encoder's configuration")
    before, grid = values[:num_before], values[num_before:]
    grid = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)  # [1, D, old, old]
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([before, grid.permute(0, 2, 3, 1).flatten(0, 2)])


def _tell_size(embeddings: Any, facts: EncoderFacts) -> None:
    """What the modules keep of the size: they refuse images of another one."""
    num_positions = facts.num_patches + int(facts.has_cls)
    modules: tuple[Any, ...] = (embeddings, getattr(embeddings, "patch_embeddings", None))
    for module in modules:
        sizes = {"num_patches": facts.num_patches, "num_positions": num_positions}
        for name, value in sizes.items():
            if hasattr(module, name):
                setattr(module, name, value)
        if hasattr(module, "image_size"):
            square = isinstance(module.image_size, tuple | list)
            module.image_size = (facts.size, facts.size) if square else facts.size
    if hasattr(embeddings, "position_ids"):
        embeddings.position_ids = torch.arange(num_positions, device=embeddings.position_ids.device)[None]
