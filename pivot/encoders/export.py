"""The encoder alone, trained parameters and those set aside, as its own library keeps one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pivot.encoders.facts import ImageGeometry
from pivot.encoders.library import resolve_encoder
from pivot.encoders.tower import VisionTower, build_vision_tower

NOTE = "pivot_encoder.json"
KNOWN_BY = ("config.json", "open_clip_config.json")  # a folder without either is no encoder
PREFIX = "vision_tower.model."  # of the encoder's parameters in the model's state dict


def write_encoder(
    folder: str | Path, vision_tower: VisionTower, state_dict: Mapping[str, Tensor], geometry: ImageGeometry
) -> float:
    """Write the whole encoder, with the way in which `geometry` prepares its images.

    `state_dict` is the MLLM's (our names, consolidated). What is written is read back by stock code and compared bit
    for bit, and its features for one image are compared to those of our tower: gives the largest difference. Raises
    RuntimeError where they differ.
    """
    values = {name.removeprefix(PREFIX): value for name, value in state_dict.items() if name.startswith(PREFIX)}
    values = {name: value.detach().cpu().contiguous() for name, value in (values | vision_tower.set_aside).items()}
    library = vision_tower.library
    library.write(Path(folder), vision_tower.encoder, vision_tower.model, values, geometry)
    return _compare_features(vision_tower, library.name_folder(str(folder)), values)


def _compare_features(vision_tower: VisionTower, path: str, values: Mapping[str, Tensor]) -> float:
    """The largest difference of a feature between the whole encoder as its library reads and runs it, and ours with the
    values in hand: float32, one image."""
    written = resolve_encoder(replace(vision_tower.section, path=path, image_size=None))
    size = vision_tower.facts.size
    images = torch.randint(0, 256, (1, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    tower = build_vision_tower(written, dtype=torch.float32).eval()
    kept = {name: value.float() for name, value in values.items() if name not in tower.set_aside}
    tower.model.load_state_dict(kept, strict=True)
    with torch.no_grad():
        expected = tower.choose_tokens(tower.library.run_stock(written, tower.normalise(images)))
        features = tower(images)
    error = (features - expected).abs().max().item()
    if not error <= 1e-4 * expected.abs().max().item():  # the same operations: 0 on a CPU; NaN fails too
        raise RuntimeError(f"{path}: the encoder that was read back gives other features (difference {error:g})")
    return error


def write_note(folder: Path, vision_tower: VisionTower, geometry: ImageGeometry, *, place: Path) -> dict[str, Any]:
    """Write NOTE beside an encoder in `folder`, which is to lie at `place`, and give it: how images are prepared, which
    features a run took of it, and which parameters lie behind those, unchanged by the run."""
    section = vision_tower.section
    note: dict[str, Any] = {
        "path": vision_tower.library.name_folder(str(place)),
        "began_as": vision_tower.encoder.path,
        "image": asdict(geometry),
        "features": {name: getattr(section, name) for name in ("layer", "post_norm", "cls", "registers")},
        "width": vision_tower.width,
        "set_aside": {
            "what": f"behind block {vision_tower.num_blocks} of {vision_tower.facts.num_blocks}: never run, never "
            "trained, written back as they were read; a head among them does not fit what was trained before it",
            "parameters": {name: list(value.shape) for name, value in vision_tower.set_aside.items()},
        },
    }
    (folder / NOTE).write_text(json.dumps(note, indent=1) + "\n")
    return note
