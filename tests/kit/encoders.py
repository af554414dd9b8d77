"""Vision towers from a path, and what goes into them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pivot.config import VisionTowerConfig
from pivot.encoders.library import resolve_encoder
from pivot.encoders.tower import VisionTower, build_vision_tower
from tests.kit import tiny

IMAGES = tiny.random_images(2)


def build(path: str, dtype: torch.dtype = torch.float32, **settings: Any) -> VisionTower:
    return build_vision_tower(resolve_encoder(VisionTowerConfig(path=path, **settings)), dtype=dtype)


def normalise(images: Tensor, tower: VisionTower) -> Tensor:
    mean, std = (torch.tensor(x)[:, None, None] for x in (tower.facts.mean, tower.facts.std))
    return (images / 255 - mean) / std
