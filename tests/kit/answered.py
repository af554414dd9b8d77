"""A small preference set with answers, two questions an image."""

from __future__ import annotations

from pathlib import Path

from data_tools.pack import PackOptions, pack
from tests.kit.sets import image_bytes, write_rows


def make_answered_set(folder: Path, name: str, count: int, *, first_image: int = 0, answers: bool = True) -> Path:
    """The packed folder `folder`/`name`: `count` pairs, every seventh without an image, prompts of seven lengths."""
    rows, images = [], {}
    for i in range(count):
        right, wrong = ("red", "dark blue") if i % 2 else ("Dark  blue", "red")
        row = {"id": f"r{i}", "prompt": f"Which colour is <b>it</b>, {i}?" + "?" * (i % 7), "chosen": right}
        row["rejected"] = wrong
        if answers and i % 3:
            row["answer"] = right
        if i % 7:
            row["image"] = f"{i // 2}.png"
            images[row["image"]] = image_bytes(first_image + i // 2)
        rows.append(row)
    source = write_rows(folder / f"{name}-source", rows, images)
    result = pack(PackOptions(source=source, out=folder / name, name=name, samples_per_shard=10))
    assert result.complete, result.tally
    return folder / name
