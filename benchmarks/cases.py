"""What the benchmarks run on: models of published shapes with random weights, drawn photographs, random letters.

A case is a folder that both sides read: `model/` (an HF LLaVA), `set/` (packed), `rows.json` and `images/`.
"""

from __future__ import annotations

import io
import json
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # launch/ is no installed package

import numpy as np
import torch
from PIL import Image

from data_tools.architectures import qwen2, siglip
from data_tools.pack import PackOptions, pack
from launch.random_model import LANGUAGE, VISION, write_byte_tokenizer
from pivot.config import DataConfig, LanguageModelConfig, ModelConfig, VisionTowerConfig
from pivot.models.build import WeightSources, build_mllm
from pivot.models.parts import write_model
from pivot.processor import build_processor

LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Nothing but the texts: a byte tokenizer would make the usual words around them longer than they are.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{{ '<|im_end|>' if message['role'] == 'assistant' else '\n' }}{% endfor %}"
)


@dataclass(frozen=True)
class Shape:
    """A model and its pairs. Lengths are letters, one token each, drawn evenly from [low, high]: a prompt has two more
    tokens (line ends) beside the image's, a completion one (the end of the turn)."""

    vision: dict[str, Any]
    language: dict[str, Any]
    prompt: tuple[int, int]
    completion: tuple[int, int]
    pairs_per_step: int
    photograph: tuple[int, int] = (640, 480)

    @property
    def image_tokens(self) -> int:
        return (self.vision["image_size"] // self.vision["patch_size"]) ** 2


SHAPES = {
    "tiny": Shape(siglip(64, 128, 3, 2, 8, 64), qwen2(64, 176, 2, 4, 2, 512, True), (5, 10), (8, 16), 4, (96, 72)),
    "cpu": Shape(
        siglip(192, 768, 6, 3, 16, 224), qwen2(256, 688, 6, 4, 2, 8000, False), (8, 28), (19, 59), 4, (320, 240)
    ),
    "1.5b": Shape(VISION["siglip-so400m14-384"], LANGUAGE["qwen2.5-1.5b"], (48, 48), (199, 199), 32),
    "7b": Shape(VISION["siglip-so400m14-384"], LANGUAGE["qwen2.5-7b"], (48, 48), (199, 199), 32),
}


def write_case(folder: Path, shape: Shape, *, num_pairs: int, pairs_per_image: int, dtype: torch.dtype) -> None:
    """Write the model and the pairs; the same arguments give the same files."""
    _write_data(folder, shape, num_pairs, pairs_per_image)
    _write_model(folder, shape, dtype)
    (folder / "shape.json").write_text(json.dumps(asdict(shape)))


def _write_model(folder: Path, shape: Shape, dtype: torch.dtype) -> None:
    bare = folder / "bare"
    (bare / "language").mkdir(parents=True)
    (bare / "vision.json").write_text(json.dumps(shape.vision))
    (bare / "language" / "config.json").write_text(json.dumps(shape.language))
    write_byte_tokenizer(bare / "language")
    # Layer -1 is what both sides run in full: with -2 stock LLaVA computes a last block that it does not use.
    model = ModelConfig(
        vision_tower=VisionTowerConfig(path=str(bare / "vision.json"), layer=-1),
        language_model=LanguageModelConfig(path=str(bare / "language" / "config.json")),
    )
    processor = build_processor(model, DataConfig(chat_template=CHAT_TEMPLATE))
    mllm = build_mllm(
        WeightSources(model, None, ()),
        processor,
        seed=0,
        dtype=dtype,
        loading=nullcontext,
        gather=lambda _: nullcontext(),
    )
    write_model(folder / "model", mllm, mllm.state_dict(), processor)


def _write_data(folder: Path, shape: Shape, num_pairs: int, pairs_per_image: int) -> None:
    random, rows = np.random.default_rng(0), []
    (folder / "images").mkdir(parents=True)

    def text(low: int, high: int) -> str:
        return "".join(LETTERS[letter] for letter in random.integers(len(LETTERS), size=random.integers(low, high + 1)))

    for number in range(num_pairs):
        image = f"images/{number // pairs_per_image}.jpg"
        if number % pairs_per_image == 0:
            (folder / image).write_bytes(photograph(number, *shape.photograph))
        texts = {"prompt": text(*shape.prompt), "chosen": text(*shape.completion), "rejected": text(*shape.completion)}
        rows.append({"id": number, "image": image, **texts})
    (folder / "rows.json").write_text(json.dumps(rows))
    pack(PackOptions(source=folder / "rows.json", out=folder / "set"))


def photograph(number: int, width: int, height: int) -> bytes:
    """A JPEG of quality 90, about 0.3 bytes a pixel: noise whose spectrum falls as that of photographs does."""
    random = np.random.default_rng(number)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency[0, 0] = 1.0
    channels = []
    for _ in range(3):
        noise = np.fft.ifft2(np.fft.fft2(random.standard_normal((height, width))) / frequency**1.32).real
        channels.append(noise / noise.std())
    grey = channels[0]
    pixels = np.stack([grey + 0.25 * channel for channel in channels], axis=-1) * 48 + 120
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()
