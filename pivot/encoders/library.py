"""What an encoder library must do for us, the libraries that do it, and the encoder that a run's settings name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pivot.config import VisionTowerConfig
from pivot.encoders import open_clip, timm, transformers
from pivot.encoders.facts import Encoder, EncoderFacts, ImageFit, ImageGeometry, num_blocks_run
from pivot.pretrained import Gather


class EncoderLibrary(Protocol):
    """The functions of a library's file. `path` is the whole of `model.vision_tower.path`, the library's name included.

    A "whole" encoder has all its blocks and heads; a "cut" one ends at the feature layer. Both are the library's own
    module, with the library's own names of parameters: they are what checkpoints and exports hold.
    """

    # -- without weights -----------------------------------------------------------------------------------------

    def describe(self, section: VisionTowerConfig) -> EncoderFacts:
        """Size, patches, blocks and normalisation.

        Raises ValueError for an encoder without patch features, and where files of weights are missing or cut short.
        """

    def describe_network(self, path: str) -> Mapping[str, Any]:
        """What tells networks apart: equal for two paths whose weights are of one network."""

    def read_image_fit(self, encoder: Encoder) -> ImageFit | None:
        """How the encoder's own folder fits an image into the square, None where it does not say.

        Raises an exception of any kind where it does what none of our ways does.
        """

    def build_shapes(self, encoder: Encoder) -> nn.Module:
        """The whole encoder at its image size, without memory; called inside `torch.device("meta")`."""

    # -- with weights --------------------------------------------------------------------------------------------

    def draws_weights(self, path: str) -> bool:
        """Whether `path` names an architecture alone, whose weights are drawn from torch's global seed."""

    def digest_weights(self, path: str) -> str:
        """A text that differs where the weights behind `path` differ."""

    def load(self, encoder: Encoder, *, dtype: torch.dtype, gather: Gather) -> nn.Module:
        """The whole encoder at its image size: read strictly, no code of the checkpoint is run.

        Under a live HfDeepSpeedConfig (ZeRO-3) its parameters may come partitioned; `gather` gives their values.
        Raises ValueError where the weights do not fit the configuration.
        """

    # -- the module ----------------------------------------------------------------------------------------------

    def cut(self, model: Any, num_blocks: int, *, post_norm: bool) -> int:
        """Take off all that lies behind block `num_blocks`, but for the final norm with `post_norm`; the width."""

    def run(self, model: Any, pixels: Tensor) -> Tensor:
        """float[I, tokens, width] of a cut encoder for normalised pixels float[I, 3, S, S], the same in training and
        evaluation. The CLS token comes first, then the registers; a feature map comes row by row."""

    def list_blocks(self, model: Any) -> nn.ModuleList | nn.Sequential:
        """The blocks of an encoder (the stages of a ConvNeXt), whole or cut."""

    def recompute_blocks(self, model: Any) -> None:
        """Let backward compute each block again, not reentrantly: pixels carry no gradient."""

    # -- back to disk --------------------------------------------------------------------------------------------

    def write(
        self, folder: Path, encoder: Encoder, model: Any, values: Mapping[str, Tensor], geometry: ImageGeometry
    ) -> None:
        """Write the whole encoder as the library keeps one, with how images are prepared; read back and compared.

        A *config.json and *.safetensors must be among the files: by these a whole export is told from one that was cut.
        `model` is the cut module, `values` holds every parameter of the whole one, on the host. Raises RuntimeError
        where what is read back is not what was written.
        """

    def name_folder(self, folder: str) -> str:
        """The `model.vision_tower.path` under which a folder that `write` made is read again."""

    def run_stock(self, encoder: Encoder, pixels: Tensor) -> Tensor:
        """What `run` gives for float[1, 3, S, S], in float32, by the library's own forward of the whole encoder.

        [1, tokens, width]: at the feature layer, with the final norm if the run takes it.
        """


# A path that begins with one of these names and a colon is that library's, any other one is transformers'.
LIBRARIES: dict[str, EncoderLibrary] = {
    "transformers": transformers,
    "open_clip": open_clip,
    "timm": timm,
}
DEFAULT = "transformers"


def name_library(path: str) -> str:
    """The key in `LIBRARIES` of the library that `path` belongs to."""
    name, colon, _ = path.partition(":")
    return name if colon and name in LIBRARIES else DEFAULT


def resolve_encoder(section: VisionTowerConfig) -> Encoder:
    """The encoder (or the one inside an HF LLaVA folder) that `section` names; its configuration is read, no weights.

    Raises ValueError where `section` asks for what the encoder does not have.
    """
    if section.path is None:
        others = " or ".join(f"{name}:MODEL" for name in LIBRARIES if name != DEFAULT)
        raise ValueError(f"model.vision_tower.path: absent; give a folder, a hub id, a CONFIG.json or {others}")
    name = name_library(section.path)
    facts = LIBRARIES[name].describe(section)
    if facts.size < facts.patch_size:
        raise ValueError(
            f"model.vision_tower.image_size: {facts.size} pixels, smaller than a patch of {facts.patch_size}"
        )
    if section.cls == "keep" and not facts.has_cls:
        raise ValueError(f"model.vision_tower.cls: keep, but {section.path} has no CLS token; use drop")
    if section.registers == "keep" and not facts.num_registers:
        raise ValueError(f"model.vision_tower.registers: keep, but {section.path} has no register tokens; use drop")
    num_blocks_run(section.layer, facts.num_blocks)
    return Encoder(section, name, facts)


def require_same_network(path: str, init_from: str) -> None:
    """ValueError where the encoder at `path` is another network than the one at `init_from`."""
    asked, given = _describe_network(path), _describe_network(init_from)
    for field in asked:
        if asked[field] != given.get(field):
            raise ValueError(
                f"model.vision_tower.path: {path} has {field} {asked[field]}, but init_from {init_from} has "
                f"{given.get(field)}; leave the path out, or take other init_parts"
            )


def _describe_network(path: str) -> dict[str, Any]:
    name = name_library(path)
    return {"library": name, **LIBRARIES[name].describe_network(path)}
