"""The memory estimate: its arithmetic by hand, its advice, and its activations against a measured peak."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_tools.architectures import qwen2, siglip
from launch.random_model import write_model
from pivot.batch import PackedBatch
from pivot.config import COMPONENTS, ConfigError, LanguageModelConfig, ModelConfig, VisionTowerConfig
from pivot.config_check import read_deepspeed_json
from pivot.encoders.library import resolve_encoder
from pivot.encoders.tower import VisionTower, build_vision_tower
from pivot.models.language import build_language_model
from pivot.models.mllm import MLLM
from pivot.models.projector import Projector
from pivot.models.skeleton import build_skeleton
from pivot.startup.memory import GIB, Row, Setup, estimate, judge
from tests.kit.live_memory import LiveMemory
from tests.kit.ranks.scenarios import merge
from tests.kit.trees import build_batch, random_segments

ROW = Row(tokens=8192, images=7, targets=2800)
CARD, HOST = 80 * GIB, 500 * GIB


def zero(name: str) -> dict[str, Any]:
    return read_deepspeed_json(f"ds_configs/{name}.json")["zero_optimization"]


@pytest.fixture(scope="module")
def setup_7b(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("7b")
    write_model(folder, "siglip-so400m14-384", "qwen2.5-7b")
    model = ModelConfig(
        vision_tower=VisionTowerConfig(path=str(folder / "vision.json")),
        language_model=LanguageModelConfig(path=str(folder / "language" / "config.json")),
    )
    skeleton = build_skeleton(model, 300)
    return Setup(skeleton, COMPONENTS, "adamw", torch.bfloat16, 8, zero("zero2"), ROW, "full")


@pytest.mark.parametrize(
    ("stage", "world_size", "bytes_per_parameter"),
    [
        (1, 8, 2 + (4 + 2) + 12 / 8),  # weights, fp32 sums beside bf16 gradients, a share of master and moments
        (2, 8, 2 + 4 / 8 + 12 / 8),
        (3, 8, 18 / 8),
        (2, 1, 18),
    ],
)
def test_states_by_hand(setup_7b: Setup, stage: int, world_size: int, bytes_per_parameter: float) -> None:
    """8.03 billion parameters in bf16, trained by AdamW."""
    every = sum(p.numel() for p in setup_7b.skeleton.parameters())
    assert every == pytest.approx(8.03e9, rel=0.001)
    found = estimate(replace(setup_7b.at_stage(stage), world_size=world_size))
    assert found.states == pytest.approx(bytes_per_parameter * every)


def test_offloaded_states_are_the_hosts(setup_7b: Setup) -> None:
    found = estimate(replace(setup_7b, zero=zero("zero3_offload"), world_size=1))
    assert found.states == 0
    assert found.host == pytest.approx(18 * 8.03e9, rel=0.001)


def test_a_frozen_part_has_weights_alone(setup_7b: Setup) -> None:
    found = estimate(replace(setup_7b, trained=("projector",), world_size=1))
    trained = sum(p.numel() for p in setup_7b.skeleton.projector.parameters())
    assert found.gradients + found.optimizer == 16 * trained
    assert found.weights == pytest.approx(2 * 8.03e9, rel=0.001)


def test_the_smallest_stage_that_fits_is_named(setup_7b: Setup) -> None:
    """7B on 8 cards of 80 GB: ZeRO-1's fp32 sums do not fit, ZeRO-2 does, ZeRO-3 would send more for nothing."""
    assert len(judge(setup_7b, CARD, HOST, "GPU")) == 1
    (_, advice) = judge(setup_7b.at_stage(3), CARD, HOST, "GPU")
    assert "a lower stage fits and sends less: ds_configs/zero2.json takes" in advice
    (_, advice) = judge(replace(setup_7b.at_stage(1), row=replace(ROW, tokens=16384)), CARD, HOST, "GPU")
    assert "WARNING" in advice and "take a higher stage: ds_configs/zero2.json" in advice


def test_states_that_cannot_fit_are_refused(setup_7b: Setup) -> None:
    with pytest.raises(ConfigError, match=r"ZeRO stage 2 and 1 rank.*134.6 GiB a rank and the GPU has 80.0; take") as e:
        judge(replace(setup_7b, world_size=1), CARD, HOST, "GPU")
    assert "ds_configs/zero3_offload.json" in str(e.value)
    with pytest.raises(ConfigError, match="machine, for what is offloaded, has 64.0"):
        judge(replace(setup_7b, zero=zero("zero3_offload"), world_size=1), CARD, 64 * GIB, "GPU")


def test_activations_that_may_not_fit_are_warned_of(setup_7b: Setup) -> None:
    whole = replace(setup_7b, activation_checkpointing="none", row=replace(ROW, tokens=10240))
    (_, warning) = judge(whole, CARD, HOST, "GPU")
    assert "WARNING: it may run out of memory; set train.activation_checkpointing=selective" in warning
    (_, warning) = judge(replace(whole, row=replace(ROW, tokens=16384)), CARD, HOST, "GPU")
    assert "WARNING: it may run out of memory; set train.activation_checkpointing=full" in warning
    (_, warning) = judge(replace(setup_7b, row=replace(ROW, tokens=2**18)), CARD, HOST, "GPU")
    assert "lower train.max_tokens_per_micro_batch" in warning


def test_a_model_that_fits_without_offloading_is_told_so(setup_7b: Setup) -> None:
    (_, _, advice) = judge(replace(setup_7b, zero=zero("zero3_offload")), CARD, HOST, "GPU")
    assert "fits without offloading" in advice and "ds_configs/zero2.json" in advice


def batch_of(tokens: int, images: int, tower: VisionTower) -> PackedBatch:
    """`images` pairs of equal lengths, about `tokens` in all."""
    own = max(9, tokens // images - tower.num_features) // 3
    pairs = []
    for seed in range(images):
        prompt, chosen, rejected = random_segments([own, own, own], seed=seed)
        pixels = torch.zeros(1, 3, tower.facts.size, tower.facts.size, dtype=torch.uint8)
        segments = [[299] * tower.num_features + prompt, chosen, rejected]
        pairs.append(build_batch(segments, [-1, 0, 0], image_token_id=299, pixel_values=pixels))
    return merge(pairs, 299)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(("tokens", "images"), [(2000, 8), (4000, 16)])
def test_activations_against_a_measured_peak(tmp_path: Path, recompute: str, tokens: int, images: int) -> None:
    """The estimate over what tensors held above weights and gradients, as 1 means exact.

    Seen with torch 2.11 and 2.14: 1.13, 1.06 and 1.04 for 2,000 tokens, 1.20, 1.15 and 1.32 for 4,000."""
    (tmp_path / "language").mkdir()
    (tmp_path / "vision.json").write_text(json.dumps(siglip(192, 768, 6, 6, 16, 224)))
    (tmp_path / "language" / "config.json").write_text(json.dumps(qwen2(256, 1024, 6, 8, 2, 8000, False)))
    config = ModelConfig(
        vision_tower=VisionTowerConfig(path=str(tmp_path / "vision.json")),
        language_model=LanguageModelConfig(path=str(tmp_path / "language" / "config.json")),
    )
    tower = build_vision_tower(resolve_encoder(config.vision_tower), dtype=torch.float32)
    language_model = build_language_model(str(config.language_model.path), dtype=torch.float32)
    model = MLLM(tower, Projector("mlp2x_gelu", tower.width, language_model.config.hidden_size), language_model).train()
    model.enable_activation_checkpointing(recompute)
    model(batch_of(8, 1, tower)).sum().backward()  # the gradients are there
    batch = batch_of(tokens, images, tower)
    with LiveMemory() as memory:
        model(batch).sum().backward()
    row = Row(batch.num_tokens, images, len(batch.target_ids))
    setup = Setup(build_skeleton(config, 300), COMPONENTS, "adamw", torch.float32, 1, {"stage": 0}, row, recompute)
    guess = estimate(setup)
    assert 0.75 < (guess.activations + guess.head) / memory.peak_bytes < 1.33
