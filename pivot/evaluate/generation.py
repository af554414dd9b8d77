"""Greedy answers with a key-value cache: batched, left-padded, images encoded once per batch.

A loop of our own rather than transformers' `generate`: what a checkpoint's generation_config holds (a repetition
penalty, a temperature) cannot change a score, the head runs on one position, and ranks can stop together.

Letters: B prompts, L the longest of them, I images, D hidden width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from pivot.models.mllm import MLLM
from pivot.renamed import cache_argument


@contextlib.contextmanager
def stock_attention(model: MLLM) -> Iterator[None]:
    """Evaluation mode and transformers' own attention: the tree's has neither padding nor a cache."""
    language_model, was_training = model.language_model, model.training
    language_model.set_attn_implementation("sdpa")
    model.eval()  # activation checkpointing would switch the cache off
    try:
        yield
    finally:
        model.use_attention(model.attention)
        model.train(was_training)


@torch.no_grad()
def generate(
    model: MLLM,
    prompts: Sequence[Tensor],
    pixel_values: Tensor,
    feature_index: Tensor,
    *,
    image_token_id: int,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    all_done: Callable[[bool], bool] = bool,
) -> list[list[int]]:
    """The most likely continuation of each prompt, token by token, without the stop token; inside `stock_attention`.

    `prompts`: int64[length] each. `pixel_values`: uint8[I, 3, H, W], at least one. `feature_index`: int64[F], which
    image feature goes to each image token, prompt after prompt. `all_done` lets ranks that must run equally many
    forwards (ZeRO-3) agree on the end.
    """
    laid_out = _left_pad(prompts, stop_ids[0], image_token_id)
    ids, mask, image_positions = (tensor.to(pixel_values.device) for tensor in laid_out)
    embeddings = _embed(model, ids, image_positions, pixel_values, feature_index)
    columns: list[Tensor] = []
    for token, finished in _decode(model, embeddings, mask, torch.tensor(list(stop_ids), device=mask.device)):
        columns.append(token)
        if len(columns) == max_new_tokens or all_done(bool(finished.all())):  # the host waits here, once a token
            break
    rows = torch.stack(columns, dim=1).tolist()
    return [row[: next((i for i, token in enumerate(row) if token in stop_ids), len(row))] for row in rows]


def _embed(model: MLLM, ids: Tensor, image_positions: Tensor, pixel_values: Tensor, feature_index: Tensor) -> Tensor:
    """[B, L, D] of ids int64[B, L]; at `image_positions` int64[F] of the B * L places there are image features."""
    features = model.projector(model.vision_tower(pixel_values)).flatten(0, 1)  # [I * features, D]
    embeddings = model.language_model.get_input_embeddings()(ids)
    shown = features[feature_index].to(embeddings.dtype)
    return embeddings.flatten(0, 1).index_copy(0, image_positions, shown).view_as(embeddings)


def _decode(model: MLLM, embeddings: Tensor, mask: Tensor, stops: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each further token int64[B], and which prompts are finished with it, bool[B]; those get a stop token from there.

    Of embeddings [B, L, D], mask bool[B, L] and the stop tokens; without an end of its own.
    """
    language_model = model.language_model
    cache = cache_argument(language_model.model, DynamicCache(config=language_model.config))
    finished = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    given: dict[str, Tensor] = {"inputs_embeds": embeddings}
    while True:
        hidden = language_model.model(
            attention_mask=mask.long(), position_ids=positions, **given, **cache
        ).last_hidden_state
        token = language_model.lm_head(hidden[:, -1]).argmax(-1)  # [B]
        token = torch.where(finished, stops[0], token)
        finished = finished | torch.isin(token, stops)
        yield token, finished
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1
        given = {"input_ids": token[:, None]}


def _left_pad(prompts: Sequence[Tensor], filler: int, image_token_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """int64[B, L], bool[B, L], true where a token is, and int64[F], where image tokens are in B * L; on the host.

    The last column is every prompt's last token.
    """
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), filler, dtype=torch.int64)
    mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = True
    return ids, mask, ((ids == image_token_id) & mask).flatten().nonzero()[:, 0]
