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
from pivot.models.renamed import cache_argument


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
    device, language_model = pixel_values.device, model.language_model
    ids, mask = _left_pad(prompts, stop_ids[0], device)
    features = model.projector(model.vision_tower(pixel_values)).flatten(0, 1)  # [I * features, D]
    embeddings = language_model.get_input_embeddings()(ids)  # [B, L, D]
    embeddings[(ids == image_token_id) & mask] = features[feature_index].to(embeddings.dtype)
    cache = cache_argument(language_model.model, DynamicCache(config=language_model.config))
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    hidden = language_model.model(
        inputs_embeds=embeddings, attention_mask=mask.long(), position_ids=positions, **cache
    ).last_hidden_state
    stops = torch.tensor(list(stop_ids), device=device)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    columns: list[Tensor] = []
    while True:
        token = language_model.lm_head(hidden[:, -1]).argmax(-1)  # [B]
        token = torch.where(finished, stops[0], token)
        columns.append(token)
        finished |= torch.isin(token, stops)
        if len(columns) == max_new_tokens or all_done(bool(finished.all())):
            break
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        positions = positions[:, -1:] + 1
        hidden = language_model.model(
            input_ids=token[:, None], attention_mask=mask.long(), position_ids=positions, **cache
        ).last_hidden_state
    rows = torch.stack(columns, dim=1).tolist()
    return [row[: next((i for i, token in enumerate(row) if token in stop_ids), len(row))] for row in rows]


def _left_pad(prompts: Sequence[Tensor], filler: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """int64[B, L] and bool[B, L], true where a token is: the last column is every prompt's last token."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), filler, dtype=torch.int64)
    mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = True
    return ids.to(device), mask.to(device)
