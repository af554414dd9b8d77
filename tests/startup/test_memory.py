"""The memory estimate: the arithmetic of states by hand, and the advice that follows from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from launch.random_model import write_model
from pivot.config import COMPONENTS, ConfigError, LanguageModelConfig, ModelConfig, VisionTowerConfig
from pivot.config_check import read_deepspeed_json
from pivot.models.skeleton import build_skeleton
from pivot.startup.memory import GIB, Setup, describe_memory, estimate

# Of 8,192 tokens; measured by pivot/startup/activations.py in tests/startup/test_activations.py.
ACTIVATIONS = {"none": 39.5 * GIB, "selective": 26.7 * GIB, "full": 3.7 * GIB}
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
    return Setup(skeleton, COMPONENTS, "adamw", torch.bfloat16, 8, zero("zero2"), "full", ACTIVATIONS.__getitem__)


def with_tokens(setup: Setup, tokens: int) -> Setup:
    return replace(setup, activations=lambda checkpointing: ACTIVATIONS[checkpointing] * tokens / 8192)


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


@pytest.mark.parametrize(
    ("stage", "bytes_per_parameter"),
    [
        (2, 2 / 8 + 12 / 16),  # rank 0 alone copies the weights, each rank a sixteenth of masters and moments
        (3, 12 / 16),  # the masters are the weights
    ],
)
def test_copies_of_a_checkpoint_by_hand(setup_7b: Setup, stage: int, bytes_per_parameter: float) -> None:
    """A machine's, by rank: 16 ranks of two machines. None where training waits for the disk."""
    setup = replace(setup_7b.at_stage(stage), world_size=16)
    assert estimate(setup).copy == 0
    every = sum(p.numel() for p in setup_7b.skeleton.parameters())
    assert estimate(replace(setup, local_ranks=8, copies=True)).copy == pytest.approx(bytes_per_parameter * every)


def test_copies_that_do_not_fit_are_told(setup_7b: Setup) -> None:
    """7B under ZeRO-2 on 8 ranks: 2 / 8 + 12 / 8 bytes of 8.03 billion parameters are 13.1 GiB a rank."""
    setup = replace(setup_7b, local_ranks=8, copies=True)
    (_, line) = describe_memory(setup, CARD, 13.2 * GIB, "GPU")
    assert line.strip() == "and 13.1 GiB of the machine's for a checkpoint that is being written"
    (_, line) = describe_memory(setup, CARD, 13 * GIB, "GPU")
    assert line.endswith("; that does not fit, so training waits for each")


def test_a_frozen_part_has_weights_alone(setup_7b: Setup) -> None:
    found = estimate(replace(setup_7b, trained=("projector",), world_size=1))
    trained = sum(p.numel() for p in setup_7b.skeleton.projector.parameters())
    assert found.gradients + found.optimizer == 16 * trained
    assert found.weights == pytest.approx(2 * 8.03e9, rel=0.001)


def test_the_smallest_stage_that_fits_is_named(setup_7b: Setup) -> None:
    """7B on 8 cards of 80 GB: ZeRO-1's fp32 sums do not fit, ZeRO-2 does, ZeRO-3 would send more for nothing."""
    assert len(describe_memory(setup_7b, CARD, HOST, "GPU")) == 1
    (_, advice) = describe_memory(setup_7b.at_stage(3), CARD, HOST, "GPU")
    assert "a lower stage fits and sends less: ds_configs/zero2.json takes" in advice
    (_, advice) = describe_memory(with_tokens(setup_7b.at_stage(1), 24576), CARD, HOST, "GPU")
    assert "WARNING" in advice and "take a higher stage: ds_configs/zero2.json" in advice


def test_states_that_cannot_fit_are_refused(setup_7b: Setup) -> None:
    with pytest.raises(ConfigError, match=r"ZeRO stage 2 and 1 rank.*134.6 GiB a rank and the GPU has 80.0; take") as e:
        describe_memory(replace(setup_7b, world_size=1), CARD, HOST, "GPU")
    assert "ds_configs/zero3_offload.json" in str(e.value)
    with pytest.raises(ConfigError, match="machine, for what is offloaded, has 64.0"):
        describe_memory(replace(setup_7b, zero=zero("zero3_offload"), world_size=1), CARD, 64 * GIB, "GPU")


def test_activations_that_may_not_fit_are_warned_of(setup_7b: Setup) -> None:
    whole = replace(setup_7b, checkpointing="none")
    (_, warning) = describe_memory(with_tokens(whole, 10240), CARD, HOST, "GPU")
    assert "WARNING: it may run out of memory; set train.activation_checkpointing=selective" in warning
    (_, warning) = describe_memory(with_tokens(whole, 16384), CARD, HOST, "GPU")
    assert "WARNING: it may run out of memory; set train.activation_checkpointing=full" in warning
    (_, warning) = describe_memory(with_tokens(setup_7b, 2**18), CARD, HOST, "GPU")
    assert "lower train.max_tokens_per_micro_batch" in warning


def test_a_model_that_fits_without_offloading_is_told_so(setup_7b: Setup) -> None:
    (_, _, advice) = describe_memory(replace(setup_7b, zero=zero("zero3_offload")), CARD, HOST, "GPU")
    assert "fits without offloading" in advice and "ds_configs/zero2.json" in advice


def test_the_machines_memory_beside_its_gpus_is_looked_at(setup_7b: Setup) -> None:
    """ZeRO-2 on 8 ranks of one machine: the model that rank 0 exports is 15.0 GiB, 1.9 a rank, and the loaders hold
    1 GiB each; of 4 GiB a rank that is below nine tenths, of 3 it is not. Offloading adds its states."""
    beside = replace(setup_7b, local_ranks=8, read_ahead=1.0 * GIB)
    assert len(describe_memory(beside, CARD, 4 * GIB, "GPU")) == 1
    (_, warning) = describe_memory(beside, CARD, 3 * GIB, "GPU", "machine of node7")
    assert "WARNING: the machine of node7 may run out of memory beside its GPUs" in warning
    assert "the model to export 1.9, read ahead 1.0, 2.9 in all of 3.0 GiB a rank" in warning
    lines = describe_memory(replace(beside, zero=zero("zero3_offload")), CARD, 18 * GIB, "GPU")
    assert "offloaded 16.8, the model to export 1.9, read ahead 1.0, 19.7 in all of 18.0 GiB a rank" in lines[-1]
    on_cpu = describe_memory(
        replace(beside, read_ahead=90.0 * GIB), CARD, CARD, "machine"
    )  # the first line says it all
    assert "beside its GPUs" not in " ".join(on_cpu)
