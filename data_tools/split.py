"""`split`: pairs set apart for evaluation by a hash of their images, so that no image lies on both sides.

Samples that share an image, directly or through others, stay together; a sample without images stays with those of
the same prompt. Which groups go to the evaluation side depends on the images and the seed, not on their order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from pivot.data.samples import Sample, message_text
from pivot.data.shards import ShardSet


def choose_eval(shards: ShardSet, share: float, seed: int) -> np.ndarray:
    """bool[rows]: True for evaluation. At most `share` of the rows, but at least the smallest group of them.

    Raises ValueError when nothing would be left for training.
    """
    if not 0 < share < 1:
        raise ValueError(f"--eval {share}: expected a share between 0 and 1")
    groups, names = group_rows(shards.read_text(row) for row in range(len(shards)))
    sizes = np.bincount(groups, minlength=len(names))
    keys = [hashlib.sha256(f"{seed}/{name}".encode()).digest() for name in names]
    room, chosen = round(share * len(shards)), np.zeros(len(names), dtype=bool)
    for group in sorted(range(len(names)), key=keys.__getitem__):
        if sizes[group] <= room:
            chosen[group] = True
            room -= int(sizes[group])
    if not chosen.any():
        chosen[min(range(len(names)), key=lambda group: (sizes[group], keys[group]))] = True
    if chosen.all():
        raise ValueError(f"all {len(shards)} samples hang together by their images, so none can be set apart")
    return chosen[groups]


def group_rows(samples: Iterable[Sample]) -> tuple[np.ndarray, list[str]]:
    """(int64[rows] group of each row, name of each group: the smallest of the hashes that hold it together)."""
    leaders: dict[str, str] = {}

    def find(item: str) -> str:
        root = item
        while leaders[root] != root:
            root = leaders[root]
        while leaders[item] != root:  # so that the next search is short
            leaders[item], item = root, leaders[item]
        return root

    firsts = []
    for sample in samples:
        items = [image["sha256"] for image in sample["images"]] or [_prompt_hash(sample)]
        for item in items:
            leaders.setdefault(item, item)
        for item in items[1:]:
            one, other = sorted((find(items[0]), find(item)))
            leaders[other] = one
        firsts.append(items[0])
    roots = [find(item) for item in firsts]
    names = sorted(set(roots))
    numbers = {name: number for number, name in enumerate(names)}
    return np.array([numbers[root] for root in roots], dtype=np.int64), names


def _prompt_hash(sample: Sample) -> str:
    return hashlib.sha256(b"text:" + message_text(sample["prompt"]).encode()).hexdigest()
