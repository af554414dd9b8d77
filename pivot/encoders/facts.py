"""What data (which decodes images to this size) and model (which makes this many features of them) must agree on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from pivot.config import VisionTowerConfig

Triple = tuple[float, float, float]


def as_triple(values: Iterable[float]) -> Triple:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


@dataclass(frozen=True)
class ImageGeometry:
    """What one image becomes."""

    size: int  # pixels a side, square
    num_tokens: int  # image tokens per image
    mean: Triple  # of pixel values in [0, 1]
    std: Triple
    fit: str  # squash | pad | crop: how an image becomes the square
    resample: str = "bicubic"  # | bilinear


class ImageFit(NamedTuple):
    """How an image becomes the encoder's square."""

    fit: str  # squash | pad | crop
    resample: str  # bicubic | bilinear
    source: str  # who says so, for people


@dataclass(frozen=True)
class EncoderFacts:
    """What an encoder's configuration says about its input and output."""

    size: int  # pixels a side
    patch_size: int  # pixels a side of what one feature stands for; of a feature map, its stride at the feature layer
    has_cls: bool
    num_blocks: int
    mean: Triple
    std: Triple
    num_registers: int = 0  # learned tokens behind the CLS token that stand for no patch

    @property
    def num_patches(self) -> int:
        return (self.size // self.patch_size) ** 2

    @property
    def num_positions(self) -> int:
        """Tokens that run through the encoder, an image."""
        return self.num_patches + int(self.has_cls) + self.num_registers

    def num_features(self, cls: str, registers: str = "drop") -> int:
        """Features per image: one a patch, and those of the CLS token and of the registers where they are kept."""
        return self.num_patches + int(cls == "keep") + self.num_registers * int(registers == "keep")

    def geometry(self, cls: str, fit: str, resample: str = "bicubic", registers: str = "drop") -> ImageGeometry:
        return ImageGeometry(self.size, self.num_features(cls, registers), self.mean, self.std, fit, resample)


@dataclass(frozen=True)
class Encoder:
    """An encoder as a run's settings name it, its configuration read. `library.resolve_encoder` makes it."""

    section: VisionTowerConfig
    library: str  # its name in `LIBRARIES`
    facts: EncoderFacts

    @property
    def path(self) -> str:
        assert self.section.path is not None
        return self.section.path

    @property
    def num_blocks(self) -> int:
        """Blocks that are run: those before the feature layer."""
        return num_blocks_run(self.section.layer, self.facts.num_blocks)

    @property
    def num_features(self) -> int:
        """Features per image that the run takes."""
        return self.facts.num_features(self.section.cls, self.section.registers)


def num_blocks_run(layer: int, num_blocks: int) -> int:
    """How many blocks lie before hidden state `layer`, which counts as in HF LLaVA: 0 the embeddings, -1 the last."""
    count = layer if layer >= 0 else num_blocks + 1 + layer
    if not 1 <= count <= num_blocks:
        raise ValueError(
            f"model.vision_tower.layer: found {layer}, but the encoder has {num_blocks} blocks; "
            f"expected 1 to {num_blocks}, or -{num_blocks} to -1"
        )
    return count
