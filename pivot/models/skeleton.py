"""The parts of a model as shapes, without memory: what counts its parameters and its work before any weight is read."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from pivot.config import ModelConfig
from pivot.encoders.facts import Encoder
from pivot.encoders.library import resolve_encoder
from pivot.encoders.tower import VisionTower, build_tower_shapes
from pivot.models.language import check_text_config, padded_vocabulary
from pivot.models.projector import Projector
from pivot.pretrained import read_config


@dataclass(frozen=True)
class Skeleton:
    """The components of a run's model on the meta device; the encoder is cut behind its feature layer."""

    vision_tower: VisionTower
    projector: Projector
    language_model: PreTrainedModel

    @property
    def components(self) -> dict[str, nn.Module]:
        return dict(vars(self))

    @property
    def text_config(self) -> PretrainedConfig:
        return self.language_model.config

    @property
    def head_size(self) -> int:
        config = self.text_config
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    def encoder_blocks(self) -> nn.ModuleList | nn.Sequential:
        return self.vision_tower.blocks()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Tied ones once."""
        for component in self.components.values():
            yield from component.parameters()


def build_skeleton(model: ModelConfig, num_tokens: int, encoder: Encoder | None = None) -> Skeleton:
    """The shapes of `model`, its paths filled in, with a vocabulary for at least `num_tokens`. Reads configurations.

    `encoder`: what `model.vision_tower` names, where that was resolved before.
    """
    with torch.device("meta"), _unwarned():
        tower = build_tower_shapes(encoder or resolve_encoder(model.vision_tower))
        language_model = _build_language_model(model, num_tokens)
        projector = Projector(model.projector, tower.width, language_model.config.hidden_size)
    return Skeleton(tower, projector, language_model)


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """Without "no pretrained weights loaded": that is what is wanted here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _build_language_model(model: ModelConfig, num_tokens: int) -> PreTrainedModel:
    path = model.language_model.path
    assert path is not None
    whole = read_config(path, "model.language_model.path")
    config = copy.deepcopy(getattr(whole, "text_config", whole))
    check_text_config(config, path)
    config.tie_word_embeddings = whole.tie_word_embeddings  # LLaVA's own word on it counts
    config.vocab_size = padded_vocabulary(config.vocab_size, num_tokens)
    return AutoModelForCausalLM.from_config(config)
