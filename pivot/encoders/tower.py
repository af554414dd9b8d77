"""The vision tower: uint8 images -> patch features of an exact layer, of an encoder of any library.

What lies behind the feature layer (later blocks, an unused final norm, pooling heads) is taken off the module when it
is built and kept aside, so that it is never run and never optimised, and can be written back unchanged.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pivot.encoders.facts import Encoder
from pivot.encoders.library import LIBRARIES, EncoderLibrary
from pivot.pretrained import Gather


class VisionTower(nn.Module):
    """An encoder cut behind its feature layer.

    `model` is the encoder itself, its parameters named as its library names them; `set_aside` maps the names of the
    parameters that were taken off to their values (on the host). Built by `build_vision_tower` or `wrap_encoder`.
    """

    def __init__(self, model: nn.Module, encoder: Encoder, *, width: int, set_aside: dict[str, Tensor]) -> None:
        super().__init__()
        self.model: Any = model
        self.encoder = encoder
        self.section = encoder.section
        self.facts = encoder.facts
        self.num_features = encoder.num_features
        self.num_blocks = encoder.num_blocks  # blocks that are run
        self.width = width
        self.set_aside = set_aside
        self._normalisation: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def library(self) -> EncoderLibrary:
        return LIBRARIES[self.encoder.library]  # not kept: a Python module cannot be copied or pickled

    def __repr__(self) -> str:
        return (
            f"VisionTower({self.section.path}: block {self.num_blocks} of {self.facts.num_blocks}, "
            f"post_norm={self.section.post_norm}, {self.facts.size} px, {self.num_features} features of {self.width}, "
            f"{len(self.set_aside)} parameters set aside)"
        )

    def describe_features(self) -> str:
        """In a line for people: which features are taken, of how large a network, and what its pixels are."""
        facts, section = self.facts, self.section
        kept = [f"{facts.num_patches} patches"]
        kept += ["the CLS token"] if section.cls == "keep" else []
        kept += [f"{facts.num_registers} registers"] if section.registers == "keep" else []
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (facts.mean, facts.std))
        return (
            f"{self.encoder.library}, block {self.num_blocks} of {facts.num_blocks}, "
            f"{'with' if section.post_norm else 'without'} the final norm: {self.num_features} tokens an image "
            f"({', '.join(kept)}) of {facts.size} px, {self.width} wide, by "
            f"{sum(p.numel() for p in self.parameters()) / 1e6:.1f} million parameters; mean {mean}, std {std}"
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[I, num_features, width] of uint8[I, 3, H, W]; the encoder is called exactly once."""
        return self.choose_tokens(self.library.run(self.model, self.normalise(pixel_values)))

    def choose_tokens(self, features: Tensor) -> Tensor:
        """Those of the CLS token, the registers and the patches (in this order) that the run takes, of dimension 1."""
        first = int(self.facts.has_cls)
        behind = first + self.facts.num_registers
        keeps_cls, keeps_registers = (one == "keep" for one in (self.section.cls, self.section.registers))
        if keeps_cls and not keeps_registers and self.facts.num_registers:
            return torch.cat([features[:, :first], features[:, behind:]], dim=1)
        return features[:, 0 if keeps_cls else first if keeps_registers else behind :]

    def normalise(self, pixel_values: Tensor) -> Tensor:
        """In float32 whatever the weights are, then cast. Constants are cached: a copy to a GPU would wait for it."""
        device = pixel_values.device
        if device not in self._normalisation:
            mean, std = (torch.tensor(x, device=device) for x in (self.facts.mean, self.facts.std))
            self._normalisation[device] = (255 * mean[:, None, None], 255 * std[:, None, None])
        mean, std = self._normalisation[device]
        return ((pixel_values.float() - mean) / std).to(next(self.model.parameters()).dtype)

    def blocks(self) -> nn.ModuleList | nn.Sequential:
        """The blocks that are run."""
        return self.library.list_blocks(self.model)

    def enable_activation_checkpointing(self) -> None:
        """Recompute each block in backward."""
        self.library.recompute_blocks(self.model)


def build_vision_tower(encoder: Encoder, *, dtype: torch.dtype, gather: Gather = nullcontext) -> VisionTower:
    """The tower of `encoder`, with its weights.

    Under a live HfDeepSpeedConfig (ZeRO-3) they may come partitioned; `gather` must then be given.
    """
    return wrap_encoder(LIBRARIES[encoder.library].load(encoder, dtype=dtype, gather=gather), encoder, gather=gather)


def build_tower_shapes(encoder: Encoder) -> VisionTower:
    """The tower of `encoder` on the meta device, without weights."""
    with torch.device("meta"):
        return wrap_encoder(LIBRARIES[encoder.library].build_shapes(encoder), encoder)


def wrap_encoder(model: nn.Module, encoder: Encoder, *, gather: Gather = nullcontext) -> VisionTower:
    """Cut `model`, the whole encoder at its image size, behind the feature layer."""
    whole = dict(model.named_parameters())
    width = LIBRARIES[encoder.library].cut(model, encoder.num_blocks, post_norm=encoder.section.post_norm)
    kept = dict(model.named_parameters())
    gone = {name: parameter for name, parameter in whole.items() if name not in kept}
    with gather(list(gone.values())):
        set_aside = {name: p.detach() if p.is_meta else p.detach().to("cpu", copy=True) for name, p in gone.items()}
    return VisionTower(model, encoder, width=width, set_aside=set_aside)
