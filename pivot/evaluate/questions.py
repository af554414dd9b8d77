"""Greedy answers to the held-out questions: dealt to ranks, batched by length, gathered once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pivot.data.images import ImageError, load_image
from pivot.data.shards import DamagedSample
from pivot.evaluate.generation import generate, stock_attention
from pivot.evaluate.held_out import HeldOut, Question
from pivot.models.mllm import MLLM
from pivot.processor import Processor
from pivot.system import distributed, preemption
from pivot.system.distributed import World

MAX_BATCH = 128  # prompts; what bounds it for real models is the token budget


def answer_questions(
    held_out: HeldOut,
    questions: Sequence[Question],
    model: MLLM,
    processor: Processor,
    world: World,
    *,
    max_new_tokens: int,
    max_tokens: int,
    in_step: bool,
) -> dict[int, str]:
    """row -> the generated text, for all ranks' questions; one that cannot be read is left out. Collective.

    A batch holds at most `max_tokens` tokens with its answers. `in_step`: every rank runs equally many forwards, as
    it must where weights are gathered for each of them.
    """
    lengths = {question.row: int(held_out.plan.lengths.prompt[question.row]) for question in questions}
    batches = cut_batches(lengths, world.size, max_tokens=max_tokens, max_new_tokens=max_new_tokens)
    own = batches[world.rank :: world.size]
    if in_step:
        own += [[]] * (-(-len(batches) // world.size) - len(own))
    texts: dict[int, str] = {}
    with stock_attention(model):
        for rows in own:
            if distributed.any_asked() if in_step else preemption.reason():
                break
            texts |= _answer(held_out, rows, model, processor, world, max_new_tokens=max_new_tokens, in_step=in_step)
    distributed.check_preemption()
    return {row: text for part in distributed.gather(texts) for row, text in part.items()}


def cut_batches(lengths: dict[int, int], num_shares: int, *, max_tokens: int, max_new_tokens: int) -> list[list[int]]:
    """Rows in batches of like length, the longest first; their number is a multiple of `num_shares` where it can be."""
    rows = sorted(lengths, key=lambda row: (-lengths[row], row))
    if not rows:
        return []
    size = min(MAX_BATCH, max(1, max_tokens // (lengths[rows[0]] + max_new_tokens)))
    rounds = -(-len(rows) // (size * num_shares))
    return [part.tolist() for part in np.array_split(rows, min(len(rows), rounds * num_shares))]


def _answer(
    held_out: HeldOut,
    rows: list[int],
    model: MLLM,
    processor: Processor,
    world: World,
    *,
    max_new_tokens: int,
    in_step: bool,
) -> dict[int, str]:
    batch = _Prompts(processor)
    answered = [row for row in rows if batch.add(held_out, row)]
    if not answered:
        if not in_step:
            return {}
        batch.add_filler()
    continuations = generate(
        model,
        batch.prompts,
        batch.pixel_values().to(world.device),
        batch.feature_index().to(world.device),
        image_token_id=processor.image_token_id,
        stop_ids=stop_ids(model, processor),
        max_new_tokens=max_new_tokens,
        all_done=(lambda done: not distributed.any_rank(not done, world.device)) if in_step else bool,
    )
    texts = [processor.read_answer(ids) for ids in continuations]
    return dict(zip(answered, texts, strict=False))  # a filler's text belongs to no row


def stop_ids(model: MLLM, processor: Processor) -> list[int]:
    """The end of a turn, and what else the language model was made to stop at: as the export's generation_config."""
    config = model.language_model.generation_config
    others = config.eos_token_id if config is not None else None
    listed = others if isinstance(others, list) else [others]
    return [processor.end_of_turn_id, *(i for i in listed if i is not None and i != processor.end_of_turn_id)]


class _Prompts:
    """A batch of prompts; an image that several of them show is there once."""

    def __init__(self, processor: Processor) -> None:
        self._processor = processor
        self._pixels: list[Tensor] = []
        self._image_numbers: dict[str, int] = {}
        self._features: list[Tensor] = []
        self.prompts: list[Tensor] = []

    def add(self, held_out: HeldOut, row: int) -> bool:
        """Add the prompt of a row; False when its sample is damaged."""
        geometry = self._processor.geometry
        try:
            sample, files = held_out.shards.read(row)
            pixels = [load_image(data, geometry) for data in files]
        except (DamagedSample, ImageError):
            return False
        self.prompts.append(torch.from_numpy(self._processor.encode(sample["prompt"], {}).prompt))
        for image, values in zip(sample["images"], pixels, strict=True):
            number = self._image_numbers.setdefault(image["sha256"], len(self._pixels))
            if number == len(self._pixels):
                self._pixels.append(values)
            self._features.append(torch.arange(geometry.num_tokens) + number * geometry.num_tokens)
        return True

    def add_filler(self) -> None:
        """A prompt for a rank that has nothing to do but must go along."""
        self.prompts.append(torch.tensor([self._processor.end_of_turn_id]))

    def pixel_values(self) -> Tensor:
        size = self._processor.geometry.size
        return torch.stack(self._pixels or [torch.zeros(3, size, size, dtype=torch.uint8)])

    def feature_index(self) -> Tensor:
        return torch.cat([torch.zeros(0, dtype=torch.int64), *self._features])
