"""Greedy answers: those of stock transformers on the same folder, whatever the padding; the model is left as it was."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from pivot.config import Config
from pivot.evaluate.generation import generate, stock_attention
from pivot.models.attention import registered_name
from pivot.models.build import build_mllm, resolve_sources
from pivot.models.mllm import MLLM
from pivot.processor import Processor, build_processor
from tests.kit import tiny

NEW_TOKENS = 12


def load(folder: Path) -> tuple[MLLM, Processor]:
    config = Config(output_dir="unused", init_from=str(folder))
    sources = resolve_sources(config)
    processor = build_processor(sources.model, config.data)
    whole: Any = nullcontext
    model = build_mllm(sources, processor, seed=0, dtype=torch.float32, loading=nullcontext, gather=lambda _: whole())
    return model.train(), processor


def prompt(processor: Processor, text: str, num_images: int) -> torch.Tensor:
    parts: list[dict[str, Any]] = [{"type": "image", "image": i} for i in range(num_images)]
    message = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
    return torch.from_numpy(processor.encode([message], {}).prompt)


def features(processor: Processor, images: list[int]) -> torch.Tensor:
    tokens = processor.geometry.num_tokens
    return torch.cat([torch.arange(tokens) + image * tokens for image in images])


@pytest.mark.parametrize("kind, tie", [("qwen2", True), ("llama", False)])
def test_equals_stock_generate(tmp_path: Path, kind: str, tie: bool) -> None:
    """A batch of four lengths, one prompt without an image, one image shown twice: token by token as one at a time."""
    folder = tiny.tiny_llava(tmp_path, kind=kind, tie=tie)
    model, processor = load(folder)
    texts = [("What?", [0]), ("Which colour is the object at the top left?", [1]), ("Hi", []), ("And this one?", [0])]
    prompts = [prompt(processor, text, len(images)) for text, images in texts]
    pixels = tiny.random_images(2)
    with stock_attention(model):
        found = generate(
            model,
            prompts,
            pixels,
            features(processor, [image for _, images in texts for image in images]),
            image_token_id=processor.image_token_id,
            stop_ids=[processor.end_of_turn_id],
            max_new_tokens=NEW_TOKENS,
        )
    stock = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    mean, std = (torch.tensor(x)[:, None, None] for x in (processor.geometry.mean, processor.geometry.std))
    expected = []
    for ids, (_, images) in zip(prompts, texts, strict=True):
        settings: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
        settings |= {"eos_token_id": processor.end_of_turn_id, "attention_mask": torch.ones_like(ids)[None]}
        if images:
            settings["pixel_values"] = (pixels[images] / 255 - mean) / std
        with torch.no_grad():
            out = stock.generate(input_ids=ids[None], **settings)
        new = out[0, len(ids) :].tolist()
        expected.append([token for token in new if token != processor.end_of_turn_id])
    assert found == expected
    assert len({tuple(tokens) for tokens in found}) > 1  # the prompts matter, or nothing was compared


def test_stops_at_each_stop_token_and_at_the_limit(tmp_path: Path) -> None:
    model, processor = load(tiny.tiny_llava(tmp_path))
    prompts, index = [prompt(processor, "What?", 1)], features(processor, [0])

    def run(stop_ids: list[int], limit: int) -> list[int]:
        settings: dict[str, Any] = {"image_token_id": processor.image_token_id, "max_new_tokens": limit}
        with stock_attention(model):
            return generate(model, prompts, tiny.random_images(1), index, stop_ids=stop_ids, **settings)[0]

    free = run([processor.end_of_turn_id], 8)
    assert len(free) == 8  # random weights hardly ever end a turn
    first = free.index(free[3])
    assert run([processor.end_of_turn_id, free[3]], 8) == free[:first]
    assert run([processor.end_of_turn_id], 1) == free[:1]


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model, _ = load(tiny.tiny_llava(tmp_path))
    with pytest.raises(KeyError), stock_attention(model):
        assert not model.training and model.language_model.config._attn_implementation == "sdpa"
        raise KeyError
    assert model.training and model.language_model.model.training
    assert model.language_model.config._attn_implementation == registered_name("sdpa")
