"""Prints what a forward and backward of the real model takes above its weights and gradients; run alone, on a CPU.

python -m tests.memory_probe FOLDER TOKENS IMAGES none|selective|full
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from pivot.batch import PackedBatch
from pivot.config import COMPONENTS, LanguageModelConfig, ModelConfig, VisionTowerConfig
from pivot.memory import Row, Setup, estimate
from pivot.models.language import build_language_model
from pivot.models.mllm import MLLM
from pivot.models.projector import Projector
from pivot.models.skeleton import build_skeleton
from pivot.models.vision import build_vision_tower
from tests.ranks.scenarios import merge
from tests.trees import build_batch, random_segments


def batch_of(tokens: int, images: int, features: int, size: int) -> PackedBatch:
    """`images` pairs of equal lengths, about `tokens` in all."""
    own = max(9, tokens // images - features) // 3
    pairs = []
    for seed in range(images):
        prompt, chosen, rejected = random_segments([own, own, own], seed=seed)
        pixels = torch.zeros(1, 3, size, size, dtype=torch.uint8)
        segments = [[299] * features + prompt, chosen, rejected]
        pairs.append(build_batch(segments, [-1, 0, 0], image_token_id=299, pixel_values=pixels))
    return merge(pairs, 299)


def peak_bytes() -> int:
    """Of this program. Not getrusage's: that starts with what the process held before it became this program."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main(folder: Path, tokens: int, images: int, recompute: str) -> None:
    config = ModelConfig(
        vision_tower=VisionTowerConfig(path=str(folder / "vision.json")),
        language_model=LanguageModelConfig(path=str(folder / "language" / "config.json")),
    )
    skeleton, dtype = build_skeleton(config, 300), torch.float32
    tower = build_vision_tower(config.vision_tower, dtype=dtype)
    language_model = build_language_model(str(config.language_model.path), dtype=dtype)
    model = MLLM(tower, Projector("mlp2x_gelu", tower.width, language_model.config.hidden_size), language_model).train()
    model.enable_activation_checkpointing(recompute)
    features, size = tower.num_features, tower.facts.size
    model(batch_of(8, 1, features, size)).sum().backward()  # libraries, gradients
    batch = batch_of(tokens, images, features, size)
    before = peak_bytes()
    model(batch).sum().backward()
    row = Row(batch.num_tokens, images, len(batch.target_ids))
    guess = estimate(Setup(skeleton, COMPONENTS, "adamw", dtype, 1, {"stage": 0}, row, recompute))
    measured = peak_bytes() - before
    print(json.dumps({"measured": measured, "estimated": guess.activations + guess.head, "row": row.tokens}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
