"""LLaVA-OneVision's mixing YAML: `datasets: [{json_path, sampling_strategy}]`, each file LLaVA conversations.

`sampling_strategy` is all, or first, end or random with a number or a percentage: `first:10%`, `random:500`. A random
choice is drawn from the path and the row's number, so it is the same every time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.readers import llava
from data_tools.readers.files import read_rows, require_inside
from data_tools.readers.rows import Place, read_row
from data_tools.records import Drop, Record


def matches(path: Path) -> bool:
    if not path.is_file() or path.suffix not in (".yaml", ".yml"):
        return False
    return "json_path" in path.read_text("utf-8")


def read(path: Path, image_roots: Sequence[Path], image_column: str | None = None) -> Iterator[Record | Drop]:
    for entry in _entries(path):
        file = require_inside(_find(path, str(entry["json_path"])), [*image_roots, path.parent], path)
        folders = tuple(str(folder) for folder in [*image_roots, file.parent, path.parent])
        wanted = _wanted(path, file, str(entry.get("sampling_strategy") or "all"))
        for number, row in enumerate(read_rows(file)):
            if wanted is None or number in wanted:
                yield from read_row(llava, row, Place(file.stem, f"{number:09d}", folders), image_column)


def _entries(path: Path) -> list[dict[str, Any]]:
    from omegaconf import OmegaConf

    try:
        listed: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:  # yaml.YAMLError or OmegaConf's own; naming them would make yaml a dependency of ours
        raise ValueError(f"{path} is not YAML ({error})") from error
    entries = listed.get("datasets") if isinstance(listed, dict) else None
    if not isinstance(entries, list) or not all(isinstance(e, dict) and e.get("json_path") for e in entries):
        raise ValueError(f"{path}: expected datasets as a list of {{json_path, sampling_strategy}}")
    return entries


def _find(path: Path, name: str) -> Path:
    for candidate in (path.parent / name, path.parent / Path(name).name):
        if candidate.is_file():
            return candidate
    raise ValueError(f"{path} names {name}, which is neither there nor beside it")


def _wanted(path: Path, file: Path, strategy: str) -> set[int] | None:
    """The numbers of the rows to take, None for all."""
    kind, _, amount = strategy.partition(":")
    if kind == "all":
        return None
    total = sum(1 for _ in read_rows(file))
    share = amount.endswith("%")
    if kind not in ("first", "end", "random") or not amount.removesuffix("%").isdecimal():
        expected = "all, or first, end or random with :N or :N%"
        raise ValueError(f"{path}: sampling_strategy of {file.name} is {strategy}, expected {expected}")
    number = math.ceil(total * int(amount[:-1]) / 100) if share else min(total, int(amount))
    if kind == "random":
        keys = [hashlib.sha256(f"{file.name}/{row}".encode()).digest() for row in range(total)]
        return set(np.argsort(np.array(keys), kind="stable")[:number].tolist())
    return set(range(number)) if kind == "first" else set(range(total - number, total))
