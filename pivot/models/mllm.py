"""The multimodal LLM: images -> features -> a row of tokens in prefix trees -> log-probs of its targets.

Letters as in `pivot.batch`: T tokens, I images, F image tokens, N targets; P patch features an image, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from pivot.batch import PackedBatch
from pivot.encoders.tower import VisionTower
from pivot.models.attention import registered_name
from pivot.models.decoder import reads_at_targets, streamline
from pivot.models.head import LMHead
from pivot.models.projector import Projector
from pivot.models.recompute import recompute_cheap_modules, recomputing
from pivot.renamed import recompute_blocks


class MLLM(nn.Module):
    """Vision encoder + projector + causal language model, scored at the batch's targets.

    `language_model` is a plain causal decoder of transformers (its `lm_head` is replaced by one that scores; its
    attention by the tree's). The children carry the names of HF LLaVA, so that checkpoints map by eye.
    """

    vision_tower: VisionTower
    projector: Projector
    attention: str  # the back end of the language model's prefix trees
    language_model: Any  # transformers' *ForCausalLM have no common type with .model and .lm_head

    def __init__(self, vision_tower: VisionTower, projector: Projector, language_model: Any) -> None:
        super().__init__()
        self.vision_tower = vision_tower
        self.projector = projector
        self.language_model = language_model
        language_model.lm_head = LMHead.from_linear(language_model.lm_head)
        self._reads_at_targets = reads_at_targets(language_model.config)
        if self._reads_at_targets:
            streamline(language_model)
        self._recomputing: Callable[[], AbstractContextManager] = nullcontext
        self.use_attention("sdpa")
        disable_dropout(self)

    def use_attention(self, backend: str) -> None:
        """Run the trees on this back end; `choose_attention` says which are there."""
        self.attention = backend
        self.language_model.set_attn_implementation(registered_name(backend))

    def forward(self, batch: PackedBatch) -> Tensor:
        """float32[N]: the log-probability of each target. One call of each module, whatever the batch holds.

        1. the encoder turns the images into patch features; 2. the projector maps them to image features; 3. they take
        the places of the image tokens' embeddings; 4. the decoder runs over the prefix trees; 5. the head scores the
        targets, and them alone.
        """
        with self._recomputing():
            patches = self.vision_tower(batch.pixel_values)  # 1. [I, P, encoder's width]
            features = self.projector(patches).flatten(0, 1)  # 2. [I * P, D]
            embeddings = self._embed(batch, features)  # 3. [T, D]
            hidden = self._decode(batch, embeddings)  # 4. [N, D]
        return self.language_model.lm_head(hidden, batch.target_ids)  # 5. [N]

    def _embed(self, batch: PackedBatch, features: Tensor) -> Tensor:
        """The row's embeddings, with image features where its image tokens are.

        With no image the dummy's features go nowhere, but they stay in the graph: `index_copy` of nothing still passes
        an exact zero back, so every rank runs the encoder's backward and ZeRO-3 finds a fresh gradient.
        """
        embeddings = self.language_model.get_input_embeddings()(batch.token_ids)  # [T, D]
        shown = features[batch.feature_index].to(embeddings.dtype)  # [F, D]
        return embeddings.index_copy(0, batch.image_positions, shown)

    def _decode(self, batch: PackedBatch, embeddings: Tensor) -> Tensor:
        """The last hidden states at the target positions; a family that `streamline` knows works out no others."""
        reading = {"reading": batch.reading} if self._reads_at_targets else {}
        hidden = self.language_model.model(
            inputs_embeds=embeddings[None],
            position_ids=batch.position_ids[None],
            segments=batch.segments,
            use_cache=False,
            **reading,
        ).last_hidden_state[0]  # [N, D], or [T, D]
        return hidden if self._reads_at_targets else hidden[batch.target_positions]

    def enable_activation_checkpointing(self, granularity: str) -> None:
        """Compute again in backward: "none"; "selective", what is cheap; "full", whole blocks. Called once."""
        if granularity == "selective":
            recompute_cheap_modules(self.vision_tower)
            recompute_cheap_modules(self.projector)
            self._recomputing = recomputing
        elif granularity == "full":
            self.vision_tower.enable_activation_checkpointing()
            recompute_blocks(self.language_model)


def disable_dropout(model: nn.Module) -> None:
    """Switch dropout and drop-path off: a shared prompt must be one computation, and policy == reference at step 0."""
    for module in model.modules():
        for name in ("p", "drop_prob", "dropout", "attention_dropout", "dropout_p"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
