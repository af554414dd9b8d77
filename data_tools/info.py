"""`info`: what a packed data set holds, read from its manifest and index alone; no shard is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data_tools.console import bytes_text, count_text
from pivot.batch import CHOSEN, REJECTED
from pivot.data.samples import ROLES_OF_KIND, UNPAIRED
from pivot.data.shards import ShardSet

LABELS = {"desirable": CHOSEN, "undesirable": REJECTED}
BARS = " ▁▂▃▄▅▆▇█"
NUM_BARS = 24


def describe(folder: str | Path, top: int = 3) -> dict[str, Any]:
    """The facts, for `--json`."""
    shards = ShardSet.open(folder)
    index, manifest = shards.index, shards.manifest
    with_images = index[index["n_images"] > 0]
    columns = {name: index[f"chars_{name}"] for name in ("prompt", *ROLES_OF_KIND[shards.kind])}
    labels = {}
    if shards.kind == UNPAIRED:
        columns |= {role: columns[role][columns[role] > 0] for role in ROLES_OF_KIND[UNPAIRED]}
        labels = {"labels": {name: len(columns[role]) for name, role in LABELS.items()}}
    return {
        "name": shards.name,
        "kind": shards.kind,
        "samples": len(shards),
        **labels,
        "images": int(index["n_images"].sum()),
        "without_image": int((index["n_images"] == 0).sum()),
        "several_images": int((index["n_images"] > 1).sum()),
        "bytes": sum(shard.bytes for shard in shards.shards),
        "shards": len(shards.shards),
        "samples_per_shard": [min(shards.shard_sizes), max(shards.shard_sizes)],
        "shapes": _shapes(shards),
        "fingerprint": shards.fingerprint,
        "sources": manifest.get("sources", {}),
        "drops": manifest.get("drops", {}),
        "made_by": manifest.get("made_by"),
        "largest_image": [int(index["img_w"].max()), int(index["img_h"].max())],
        "image_width": _spread(with_images["img_w"]),
        "image_height": _spread(with_images["img_h"]),
        "letters": {name: _spread(values) for name, values in columns.items()},
        "largest_samples": [
            {"row": int(row), "bytes": int(index["span"][row]), "where": shards.describe(int(row))}
            for row in np.argsort(-index["span"].astype(np.int64), kind="stable")[:top]
        ],
    }


def describe_in_words(facts: dict[str, Any]) -> dict[str, str]:
    """field -> text, for people."""
    low, high = facts["samples_per_shard"]
    each = f"{low:,} samples" if low == high else f"{low:,} to {high:,} samples"
    drops = ", ".join(f"{reason}: {count:,}" for reason, count in facts["drops"].items())
    words = {
        "name": facts["name"],
        "kind": facts["kind"],
        "samples": f"{facts['samples']:,}",
        **_label_text(facts),
        "images": f"{facts['images']:,} ({facts['without_image']:,} samples without, "
        f"{facts['several_images']:,} with several)",
        "size": f"{bytes_text(facts['bytes'])} in {count_text(facts['shards'], 'shard')} of {each}",
        "members": "\n".join(
            f"{shape['members']}: {shape['samples']:,} samples in {count_text(len(shape['shards']), 'shard')}"
            for shape in facts["shapes"]
        ),
        "fingerprint": facts["fingerprint"],
        "sources": "\n".join(
            f"{name}: {source['samples']:,} samples, repeat_time {source['repeat_time']:g}"
            for name, source in facts["sources"].items()
        ),
        "dropped": drops or "none",
    }
    if facts["made_by"]:
        words["made by"] = ", ".join(f"{name} {value}" for name, value in facts["made_by"].items())
    words["image width"] = _spread_text(facts["image_width"], "px")
    words["image height"] = _spread_text(facts["image_height"], "px")
    for name, spread in facts["letters"].items():
        words[f"letters of {name}"] = _spread_text(spread, "")
    words["largest samples"] = "\n".join(
        f"{bytes_text(sample['bytes'])}: {sample['where']}" for sample in facts["largest_samples"]
    )
    return words


def _label_text(facts: dict[str, Any]) -> dict[str, str]:
    labels = facts.get("labels", {})
    return {"labels": ", ".join(f"{count:,} {name}" for name, count in labels.items())} if labels else {}


def _shapes(shards: ShardSet) -> list[dict[str, Any]]:
    """Which shards `datasets` can open together: those whose samples have the same members and types of JSON."""
    shapes: dict[str, dict[str, Any]] = {}
    for shard in shards.shards:
        members = shard.shape.partition("/")[0] or "mixed"
        shape = shapes.setdefault(shard.shape, {"members": members, "samples": 0, "shards": []})
        shape["samples"] += shard.samples
        shape["shards"].append(shard.name)
    return list(shapes.values())


def _spread(values: np.ndarray) -> dict[str, Any]:
    """Percentiles, and a histogram over [0, 99th percentile]."""
    if not len(values):
        return {"min": 0, "median": 0, "p99": 0, "max": 0, "histogram": []}
    low, middle, most, high = (int(value) for value in np.percentile(values, [0, 50, 99, 100]))
    counts, _ = np.histogram(np.minimum(values, most), bins=NUM_BARS, range=(0, max(1, most)))
    return {"min": low, "median": middle, "p99": most, "max": high, "histogram": counts.tolist()}


def _spread_text(spread: dict[str, Any], unit: str) -> str:
    if not spread["histogram"]:
        return "-"
    most = max(spread["histogram"])
    bars = "".join(BARS[-(-count * (len(BARS) - 1) // most)] for count in spread["histogram"])
    unit = f" {unit}" if unit else ""
    return (
        f"{spread['min']:,} to {spread['max']:,}{unit}, median {spread['median']:,}, 99 % up to {spread['p99']:,}\n"
        f"0 {bars} {spread['p99']:,}"
    )
