"""A library of encoders that pivot does not know, in one file: `third:FOLDER`, or `third:CONFIG.json` drawn at random.

The test double of the next real one. `LIBRARIES["third"] = third_library` is all that it needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pivot import pretrained
from pivot.config import VisionTowerConfig
from pivot.encoders.facts import Encoder, EncoderFacts, ImageFit, ImageGeometry, as_triple
from pivot.pretrained import Gather, require_equal_values

SETTINGS = {"size": 32, "patch": 8, "width": 24, "depth": 3, "mean": [0.4] * 3, "std": [0.3] * 3}


class Mixer(nn.Module):
    """Patches, residual blocks that mix tokens by their mean, a norm, and a pooling head. No CLS token."""

    def __init__(self, patch: int, width: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(depth))
        self.norm: nn.Module = nn.LayerNorm(width)
        self.head: nn.Module = nn.Linear(width, 7)
        self.recomputes = False

    def states(self, pixels: Tensor) -> list[Tensor]:
        """[I, tokens, width] behind the patches and behind each block."""
        states = [self.patches(pixels).flatten(2).transpose(1, 2)]
        for block in self.blocks:
            mixed = states[-1] + states[-1].mean(1, keepdim=True)
            out = checkpoint(block, mixed, use_reentrant=False) if self.recomputes else block(mixed)
            states.append(states[-1] + out)
        return states

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.norm(self.states(pixels)[-1]).mean(1))


def write_config(path: Path) -> str:
    path.write_text(json.dumps(SETTINGS))
    return f"third:{path}"


def _place(path: str) -> Path:
    return Path(path.partition(":")[2])


def _settings(path: str) -> dict[str, Any]:
    place = _place(path)
    return json.loads((place / "config.json" if place.is_dir() else place).read_text())


def _build(path: str) -> Mixer:
    settings = _settings(path)
    return Mixer(settings["patch"], settings["width"], settings["depth"])


def describe(section: VisionTowerConfig) -> EncoderFacts:
    settings = _settings(str(section.path))
    size = section.image_size or settings["size"]
    mean, std = as_triple(settings["mean"]), as_triple(settings["std"])
    return EncoderFacts(size, settings["patch"], has_cls=False, num_blocks=settings["depth"], mean=mean, std=std)


def describe_network(path: str) -> Mapping[str, Any]:
    return {name: _settings(path)[name] for name in ("patch", "width", "depth")}


def read_image_fit(encoder: Encoder) -> ImageFit | None:
    fit = _settings(encoder.path).get("fit")
    return ImageFit(fit, "bicubic", f"the settings at {encoder.path}") if fit else None


def build_shapes(encoder: Encoder) -> nn.Module:
    return _build(encoder.path)


def draws_weights(path: str) -> bool:
    return _place(path).is_file()


def digest_weights(path: str) -> str:
    return pretrained.digest_weights(str(_place(path)))


def load(encoder: Encoder, *, dtype: torch.dtype, gather: Gather) -> nn.Module:
    model = _build(encoder.path)
    if not draws_weights(encoder.path):
        model.load_state_dict(load_file(_place(encoder.path) / "weights.safetensors"), strict=True)
    return model.to(dtype)


def cut(model: Any, num_blocks: int, *, post_norm: bool) -> int:
    model.blocks = model.blocks[:num_blocks]
    if not post_norm:
        model.norm = nn.Identity()
    model.head = nn.Identity()
    return model.patches.out_channels


def run(model: Any, pixels: Tensor) -> Tensor:
    return model.norm(model.states(pixels)[-1])


def list_blocks(model: Any) -> nn.ModuleList:
    return model.blocks


def recompute_blocks(model: Any) -> None:
    model.recomputes = True


def write(folder: Path, encoder: Encoder, model: Any, values: Mapping[str, Tensor], geometry: ImageGeometry) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    settings = _settings(encoder.path) | {"size": geometry.size, "fit": geometry.fit}
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(dict(values), folder / "weights.safetensors")
    require_equal_values(load_file(folder / "weights.safetensors"), values, folder)


def name_folder(folder: str) -> str:
    return f"third:{folder}"


def run_stock(encoder: Encoder, pixels: Tensor) -> Tensor:
    model: Any = load(encoder, dtype=torch.float32, gather=lambda _: torch.no_grad())
    hidden = model.states(pixels)[encoder.num_blocks]
    return model.norm(hidden) if encoder.section.post_norm else hidden
