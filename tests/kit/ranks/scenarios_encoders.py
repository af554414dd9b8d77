"""What the ranks run: a step with an encoder of each library, loaded and trained under ZeRO-0 and ZeRO-3."""

from __future__ import annotations

import json
from pathlib import Path

import torch.distributed as dist

from tests.kit import tiny
from tests.kit.ranks.scenarios import build, optim_config, pair, run_step, save, weights

PATHS = "encoders.json"  # name -> path


def one_step(folder: Path) -> None:
    """Four pairs in all. Left behind: the encoder as it was loaded, and all weights behind a step."""
    tiny.tiny_open_clip(folder / f"clip-{dist.get_rank()}", with_timm=True)  # this process has to know it
    for name, path in json.loads((folder / PATHS).read_text()).items():
        for stage in (0, 3):
            engine, image = build(folder / "llava", stage, optim_config("sgd"), encoder=path)
            loaded = {key: value for key, value in weights(engine).items() if key.startswith("vision_tower.")}
            share = 4 // dist.get_world_size()
            first = dist.get_rank() * share
            run_step(engine, [pair(i, image, with_image=True) for i in range(first, first + share)], 4, 0)
            save(folder, f"{name}-stage{stage}", {"loaded": loaded, "weights": weights(engine)})
