"""Floating-point operations of the parts of a model, from its configuration, without weights.

They weigh samples against each other when a step is dealt to ranks; a factor common to all of them changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pivot.config import ModelConfig, VisionTowerConfig
from pivot.data.plan import Costs
from pivot.geometry import (
    OPEN_CLIP,
    describe_vision_tower,
    num_blocks_run,
    read_config,
    read_vision_config,
    split_open_clip,
)

FORWARD, BACKWARD = 1.0, 2.0  # of a matrix product: one forward, two backward (its input's gradient, its weight's)


def training_costs(model: ModelConfig, tokens_per_image: int, trained: Sequence[str]) -> Costs:
    """The work of a training step per token, image token, target and query-key pair, in forward FLOPs.

    A frozen part in front of everything that trains has no backward; one behind it passes gradients on.
    """
    text = _text_config(model)
    hidden, layers = int(text.hidden_size), int(text.num_hidden_layers)
    head_size = int(getattr(text, "head_dim", None) or hidden // text.num_attention_heads)
    queries = head_size * int(text.num_attention_heads)
    keys = head_size * int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    block = hidden * (2 * queries + 2 * keys) + 3 * hidden * int(text.intermediate_size)  # q, o, k, v; gated MLP
    vision, projector, language = _factors(trained)
    width, encoder = _encoder_flops(model.vision_tower, tokens_per_image)
    projector_size = width * hidden + (hidden * hidden if model.projector != "linear" else 0)
    return Costs(
        per_token=language * 2.0 * layers * block,
        per_image_token=vision * encoder + projector * 2.0 * projector_size,
        per_target=language * 2.0 * hidden * int(text.vocab_size),
        per_attention=language * 4.0 * layers * queries,
    )


def _factors(trained: Sequence[str]) -> tuple[float, float, float]:
    """Work of training over work of a forward pass, for vision tower, projector and language model."""
    factors, gradient = [], False
    for name in ("vision_tower", "projector", "language_model"):
        own = name in trained
        factors.append(FORWARD + (BACKWARD / 2 if gradient or own else 0.0) + (BACKWARD / 2 if own else 0.0))
        gradient = gradient or own
    return factors[0], factors[1], factors[2]


def _encoder_flops(section: VisionTowerConfig, tokens_per_image: int) -> tuple[int, float]:
    """(width, forward FLOPs of the blocks that run, per image token that comes out)."""
    facts = describe_vision_tower(section)
    width, mlp = _encoder_shape(section)
    patches = (facts.size // facts.patch_size) ** 2 + int(facts.has_cls)
    blocks = num_blocks_run(section.layer, facts.num_blocks)
    per_patch = 2.0 * (4 * width * width + 2 * width * mlp) + 4.0 * patches * width
    return width, blocks * patches * per_patch / tokens_per_image


def _encoder_shape(section: VisionTowerConfig) -> tuple[int, int]:
    """(width, width of the MLP)."""
    assert section.path is not None
    if not section.path.startswith(OPEN_CLIP):
        config = read_vision_config(section.path)
        return int(config.hidden_size), int(config.intermediate_size)
    import open_clip

    vision = open_clip.get_model_config(split_open_clip(section.path)[0])["vision_cfg"]
    if "timm_model_name" in vision:
        import timm
        import torch

        with torch.device("meta"):
            width = int(timm.create_model(vision["timm_model_name"], pretrained=False).num_features)
    else:
        width = int(vision["width"])
    return width, int(width * vision.get("mlp_ratio", 4.0))


def _text_config(model: ModelConfig) -> Any:
    assert model.language_model.path is not None
    config = read_config(model.language_model.path, "model.language_model.path")
    return getattr(config, "text_config", config)
