"""The vision encoder: uint8 images -> patch features of an exact layer, from transformers or open_clip.

What lies behind the feature layer (later blocks, an unused final norm, pooling heads) is taken off the module when it
is built and kept aside, so that it is never run and never optimised, and can be written back unchanged.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlavaForConditionalGeneration, PreTrainedModel, SiglipVisionModel

from pivot.config import VisionTowerConfig
from pivot.geometry import (
    OPEN_CLIP,
    EncoderFacts,
    describe_vision_tower,
    num_blocks_run,
    read_vision_config,
    split_open_clip,
)
from pivot.models.renamed import recompute_blocks
from pivot.pretrained import Gather, build_random, load_strictly, read_config

__all__ = ["VisionTower", "build_vision_tower", "describe_vision_tower", "wrap_encoder"]

MODEL_CLASSES: dict[str, type[PreTrainedModel]] = {
    "siglip_vision_model": SiglipVisionModel,
    "clip_vision_model": CLIPVisionModel,
}
# The other half of a whole CLIP or SigLIP checkpoint.
_TEXT_SIDE = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")


class VisionTower(nn.Module):
    """An encoder cut behind its feature layer.

    `model` is the encoder itself, its parameters named as its library names them; `set_aside` maps the names of the
    parameters that were taken off to their values (on the host). Built by `build_vision_tower` or `wrap_encoder`.
    """

    def __init__(
        self,
        model: nn.Module,
        section: VisionTowerConfig,
        facts: EncoderFacts,
        *,
        width: int,
        set_aside: dict[str, Tensor],
        num_blocks: int,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.section = section
        self.facts = facts
        self.num_features = facts.num_features(section.cls)
        self.width = width
        self.set_aside = set_aside
        self.num_blocks = num_blocks  # blocks that are run
        self._drops_cls = facts.has_cls and section.cls == "drop"
        self._normalisation: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def is_open_clip(self) -> bool:
        return not isinstance(self.model, PreTrainedModel)

    def __repr__(self) -> str:
        return (
            f"VisionTower({self.section.path}: block {self.num_blocks} of {self.facts.num_blocks}, "
            f"post_norm={self.section.post_norm}, {self.facts.size} px, {self.num_features} features of {self.width}, "
            f"{len(self.set_aside)} parameters set aside)"
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[I, num_features, width] of uint8[I, 3, H, W]; the encoder is called exactly once."""
        pixels = self.normalise(pixel_values)
        if self.is_open_clip:
            features = self.model(pixels)  # its pooling and projection are gone: every token comes out
        else:
            features = self._run_transformers(pixels)
        return features[:, 1:] if self._drops_cls else features

    def _run_transformers(self, pixels: Tensor) -> Tensor:
        # The encoder's own forward would pool, and CLIP's would normalise the CLS token alone.
        hidden = self.model.embeddings(pixels)
        if isinstance(self.model, CLIPVisionModel):
            hidden = self.model.pre_layrnorm(hidden)
        hidden = self.model.encoder(inputs_embeds=hidden).last_hidden_state
        return self.model.post_layernorm(hidden)  # an identity unless section.post_norm

    def normalise(self, pixel_values: Tensor) -> Tensor:
        """In float32 whatever the weights are, then cast. Constants are cached: a copy to a GPU would wait for it."""
        device = pixel_values.device
        if device not in self._normalisation:
            mean, std = (torch.tensor(x, device=device) for x in (self.facts.mean, self.facts.std))
            self._normalisation[device] = (255 * mean[:, None, None], 255 * std[:, None, None])
        mean, std = self._normalisation[device]
        return ((pixel_values.float() - mean) / std).to(next(self.model.parameters()).dtype)

    def enable_activation_checkpointing(self) -> None:
        """Recompute each block in backward."""
        if self.is_open_clip:
            self.model.set_grad_checkpointing(True)  # open_clip and timm pass use_reentrant=False
        else:
            recompute_blocks(self.model)


def build_vision_tower(section: VisionTowerConfig, *, dtype: torch.dtype, gather: Gather = nullcontext) -> VisionTower:
    """The encoder that `section` names (alone, in a whole CLIP, or in an HF LLaVA), cut behind its feature layer.

    Under a live HfDeepSpeedConfig (ZeRO-3) transformers loads the weights partitioned; `gather` must then be given.
    """
    facts = describe_vision_tower(section)
    assert section.path is not None
    if section.path.startswith(OPEN_CLIP):
        model: nn.Module = load_open_clip(section).visual.to(dtype=dtype)
    else:
        model = _load_transformers(section.path, dtype)
    return wrap_encoder(model, section, facts, gather=gather)


def wrap_encoder(
    model: nn.Module, section: VisionTowerConfig, facts: EncoderFacts, *, gather: Gather = nullcontext
) -> VisionTower:
    """Cut a whole encoder (transformers' or open_clip's image tower) behind the feature layer of `section`."""
    num_blocks = num_blocks_run(section.layer, facts.num_blocks)
    whole = dict(model.named_parameters())
    if isinstance(model, PreTrainedModel):
        width = _cut_transformers(model, num_blocks, section.post_norm)
        _resize_positions(model, facts, gather)
    else:
        width = _cut_open_clip(model, num_blocks, section.post_norm)
    kept = dict(model.named_parameters())
    gone = {name: parameter for name, parameter in whole.items() if name not in kept}
    with gather(list(gone.values())):
        set_aside = {name: p.detach() if p.is_meta else p.detach().to("cpu", copy=True) for name, p in gone.items()}
    return VisionTower(model, section, facts, width=width, set_aside=set_aside, num_blocks=num_blocks)


def _load_transformers(path: str, dtype: torch.dtype) -> PreTrainedModel:
    config = read_vision_config(path)
    model_class = MODEL_CLASSES[config.model_type]
    if path.endswith(".json"):
        return build_random(model_class, config, dtype)
    where = f"model.vision_tower.path: {path}"
    whole = read_config(path, "model.vision_tower.path")
    if whole.model_type == "llava":
        return load_strictly(LlavaForConditionalGeneration, path, where, config=whole, dtype=dtype).model.vision_tower
    return load_strictly(model_class, path, where, accepted=_TEXT_SIDE, config=config, dtype=dtype)


def _cut_transformers(model: Any, num_blocks: int, post_norm: bool) -> int:
    model.encoder.layers = model.encoder.layers[:num_blocks]
    if not post_norm:
        model.post_layernorm = nn.Identity()
    if hasattr(model, "head"):  # SigLIP's attention pool
        model.head = nn.Identity()
    return int(model.config.hidden_size)


def _resize_positions(model: Any, facts: EncoderFacts, gather: Gather) -> None:
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


def load_open_clip(section: VisionTowerConfig, *, with_weights: bool = True) -> Any:
    """The whole CLIP in float32, unpartitioned: open_clip's loader cannot fill partitioned parameters. Under ZeRO-3
    each rank so first holds a full copy of the encoder; DeepSpeed partitions it when the engine is built. Without
    weights: its shapes alone, on the meta device."""
    import open_clip

    assert section.path is not None
    name, weights = split_open_clip(section.path)
    settings = {} if with_weights else {"load_weights": False, "device": "meta"}
    try:
        return open_clip.create_model(
            name,
            pretrained=weights,
            pretrained_text=False,
            force_image_size=section.image_size,
            require_pretrained=with_weights and (weights is not None or ":" in name),
            weights_only=True,
            **settings,
        )
    except (RuntimeError, OSError, KeyError) as error:
        raise ValueError(f"model.vision_tower.path: {section.path}: {error}") from error


def _cut_open_clip(visual: Any, num_blocks: int, post_norm: bool) -> int:
    """Cut so that the tower's own forward, which ZeRO-3 hooks need, returns every token of the feature layer."""
    return (_cut_timm if hasattr(visual, "trunk") else _cut_native)(visual, num_blocks, post_norm)


def _cut_native(visual: Any, num_blocks: int, post_norm: bool) -> int:
    if post_norm and visual.attn_pool is not None:
        _refuse_post_norm("its final norm comes after the pooling")
    visual.transformer.resblocks = visual.transformer.resblocks[:num_blocks]
    if not post_norm:
        visual.ln_post = nn.Identity()
    visual.attn_pool = visual.proj = None
    visual.pool_type, visual.output_tokens = "none", False
    return int(visual.transformer.width)


def _cut_timm(visual: Any, num_blocks: int, post_norm: bool) -> int:
    trunk = visual.trunk
    if post_norm and isinstance(trunk.norm, nn.Identity):
        _refuse_post_norm("its final norm comes after the pooling")
    trunk.blocks = trunk.blocks[:num_blocks]
    if not post_norm:
        trunk.norm = nn.Identity()
    trunk.reset_classifier(0, global_pool="")  # also takes an attention pool off
    trunk.fc_norm = nn.Identity()
    visual.head = nn.Identity()
    return int(trunk.embed_dim)


def _refuse_post_norm(why: str) -> None:
    raise ValueError(f"model.vision_tower.post_norm: true, but this encoder has no norm for patch features: {why}")
