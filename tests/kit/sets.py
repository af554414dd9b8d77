"""Small data sets and a processor that needs no tokenizer."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_tools.pack import PackOptions, pack
from pivot.data.lengths import LENGTH_RECORD, Lengths, build_lengths, load_lengths
from pivot.data.plan import Plan, PlanSettings
from pivot.data.shards import ShardSet
from pivot.encoders.facts import ImageGeometry
from pivot.processor import EncodedPair

IMAGE_TOKEN_ID = 300
END_OF_TURN = 301
GEOMETRY = ImageGeometry(size=8, num_tokens=4, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), fit="squash")


class FakeProcessor:
    """One token a byte, one image `num_tokens` image tokens, an end token behind each completion."""

    geometry = GEOMETRY
    image_token_id = IMAGE_TOKEN_ID

    def __init__(self, fingerprint: str = "f" * 64) -> None:
        self.fingerprint = fingerprint

    def encode(self, prompt: list[dict[str, Any]], completions: dict[str, list[dict[str, Any]]]) -> EncodedPair:
        ids: list[int] = []
        num_images = 0
        for part in prompt[0]["content"]:
            if part["type"] == "image":
                ids += [IMAGE_TOKEN_ID] * self.geometry.num_tokens
                num_images += 1
            else:
                ids += part["text"].encode()
        texts = {role: messages[0]["content"].encode() for role, messages in completions.items()}
        encoded = {role: np.array([*text, END_OF_TURN], dtype=np.int64) for role, text in texts.items()}
        return EncodedPair(np.array(ids, dtype=np.int64), encoded, num_images)


def image_bytes(number: int, format: str = "PNG", size: tuple[int, int] = (12, 10)) -> bytes:
    """A noise image that is a function of `number`."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def write_rows(folder: Path, rows: list[dict[str, Any]], images: dict[str, bytes] | None = None) -> Path:
    """LLaVA DPO rows as folder/source.json with their images beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in (images or {}).items():
        (folder / name).write_bytes(data)
    (folder / "source.json").write_text(json.dumps(rows))
    return folder / "source.json"


def make_rows(count: int) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Rows of various lengths: every fourth without an image, every fifth with the image of the row before."""
    rows, images = [], {}
    for i in range(count):
        row = {"id": f"r{i}", "prompt": f"Question {i}?" + "?" * (i % 7), "chosen": "yes" * (1 + i % 5) + str(i)}
        row["rejected"] = "no" * (1 + i % 3) + str(i)
        if i % 4:
            name = f"{i - 1 if i % 5 == 0 else i}.png"
            images[name] = image_bytes(i)
            row["image"] = name
        rows.append(row)
    return rows, images


def mixed_rows(count: int) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Pairs with a PNG, a JPEG, two pictures or none, some with an answer, some without words: seven shapes."""
    rows: list[dict[str, Any]] = []
    images: dict[str, bytes] = {}
    for i in range(count):
        names = [[f"{i}.png"], [f"{i}.jpg"], [], [f"{i}.jpg", f"{i}.png"], [f"{i}.jpg"], [f"{i}.png", f"{i}.jpg"]][
            i % 6
        ]
        images |= {name: image_bytes(i, "PNG" if name.endswith("png") else "JPEG") for name in names}
        row = {"id": f"r{i}", "prompt": f"What {i}?", "chosen": f"A{i}", "rejected": f"B{i}", "image": names}
        if i % 6 == 1 and i > 30:
            row["answer"] = "yes"  # only behind the five samples that `datasets` looks at
        if i % 6 == 4 and i < 30:
            row["prompt"] = "<image>"
        rows.append(row)
    return rows, images


def row_of(shards: ShardSet, number: int) -> int:
    """Where pair `number` of make_rows lies: those with a picture are in other shards than those without."""
    return next(row for row in range(len(shards)) if shards.read_text(row)["id"] == f"source/r{number}")


def make_set(folder: Path, count: int = 24, samples_per_shard: int = 5) -> ShardSet:
    """A packed data set of `count` pairs."""
    rows, images = make_rows(count)
    source = write_rows(folder / "source", rows, images)
    result = pack(PackOptions(source=source, out=folder / "set", name="tiny", samples_per_shard=samples_per_shard))
    assert result.complete, result.tally
    return ShardSet.open(folder / "set")


def make_plan(shards: ShardSet, cache_dir: Path, processor: Any = None, **changes: Any) -> Plan:
    processor = processor or FakeProcessor()
    build_lengths(shards, processor, cache_dir)
    return plan_of(
        load_lengths(shards, processor, cache_dir),
        **{
            "fingerprint": shards.fingerprint,
            "shard_sizes": shards.shard_sizes,
            "describe": shards.describe,
            **changes,
        },
    )


def plan_of(lengths: Lengths, **changes: Any) -> Plan:
    settings: dict[str, Any] = {
        "fingerprint": "data",
        "shard_sizes": [len(lengths)],
        "seed": 7,
        "global_batch_size": 8,
        "max_tokens": 100,
        "max_tokens_per_micro_batch": 200,
        "world_size": 2,
        "roles": ("chosen", "rejected"),
    }
    return Plan(PlanSettings(lengths=lengths, **(settings | changes)))


def random_lengths(count: int, seed: int = 0) -> Lengths:
    """Lengths of `count` made-up pairs: prompts 20 to 60 tokens, half of them an image's; completions 1 to 40."""
    random = np.random.default_rng(seed)
    records = np.zeros(count, dtype=LENGTH_RECORD)
    records["prompt"] = random.integers(20, 61, count)
    records["image"] = np.where(random.random(count) < 0.5, 16, 0)
    records["chosen"] = random.integers(1, 41, count)
    records["rejected"] = random.integers(1, 41, count)
    return Lengths.from_records(records)


def answer_rows(count: int) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Rows in TRL's unpaired format: two questions to a picture, every seventh without one, every third answer bad."""
    rows, images = [], {}
    for i in range(count):
        desirable = i % 3 != 2
        content: list[dict[str, Any]] = [{"type": "text", "text": f"Which colour, {i}?" + "?" * (i % 5)}]
        row: dict[str, Any] = {"id": f"r{i}", "label": desirable, "images": []}
        if i % 7:
            images[f"{i // 2}.png"] = image_bytes(i // 2)
            row["images"] = [f"{i // 2}.png"]
            content.insert(0, {"type": "image"})
        row["prompt"] = [{"role": "user", "content": content}]
        row["completion"] = [{"role": "assistant", "content": ("red", "dark blue")[i % 2] if desirable else "no idea"}]
        rows.append(row)
    return rows, images


def make_answer_set(folder: Path, name: str = "answers", count: int = 24, samples_per_shard: int = 8) -> ShardSet:
    """A packed set of kind unpaired in `folder`/`name`."""
    source = write_rows(folder / f"{name}-source", *answer_rows(count))
    result = pack(PackOptions(source=source, out=folder / name, name=name, samples_per_shard=samples_per_shard))
    assert result.complete, result.tally
    return ShardSet.open(folder / name)
