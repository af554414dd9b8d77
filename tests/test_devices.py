"""What a run makes of the GPUs that it finds: asked of the driver, which answers here as a machine with GPUs would."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pivot.metrics import peak_memory_gib
from pivot.startup import inputs, memory
from pivot.system import distributed
from pivot.system.distributed import World

GPU, CPU = torch.device("cuda", 1), torch.device("cpu")


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A process of a node with two GPUs of 80 GiB, and what it asks torch for."""
    asked: dict[str, Any] = {}
    place = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node-0", "MASTER_PORT": "29500"}
    for name, value in (place | {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    answers: dict[str, Any] = {"is_available": True, "device_count": 2, "max_memory_allocated": 2**31}
    answers["get_device_properties"] = SimpleNamespace(total_memory=80 * 2**30)
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *device, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.update(device=device))
    dist = distributed.dist
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: asked.update(backend=backend))
    monkeypatch.setattr(dist, "get_rank", lambda: 5)
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    return asked


def test_a_rank_takes_the_gpu_of_its_place_in_the_node(node: dict[str, Any]) -> None:
    assert distributed.start(60) == World(5, 8, GPU)
    assert node == {"device": GPU, "backend": "nccl"}


def test_the_cpu_is_taken_where_it_is_asked_for(node: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """And the GPUs are left alone: memory is the process's own, and no random state of theirs is kept."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert distributed.start(60) == World(5, 8, CPU)
    assert node == {"backend": "gloo"}
    assert 0 < peak_memory_gib(CPU) != peak_memory_gib(GPU) == 2
    assert set(distributed.rng_state()) == {"cpu"}


def test_a_process_without_a_gpu_of_its_own_is_told_so(node: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As where SLURM shows each process one GPU: else CUDA would say `invalid device ordinal`."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"LOCAL_RANK is 1, but this process sees 1 GPU\(s\); start as many ranks"):
        distributed.start(60)
    assert node == {}


@pytest.mark.parametrize(
    "precision, device, computes_bf16, expected",
    [
        ("auto", GPU, [True, True], torch.bfloat16),
        ("auto", GPU, [True, False], torch.float32),  # an older GPU among them
        ("auto", CPU, [True, True], torch.float32),
        ("bf16", GPU, [False, False], torch.bfloat16),
        ("fp32", GPU, [True, True], torch.float32),
    ],
)
def test_precision(
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    device: torch.device,
    computes_bf16: list[bool],
    expected: torch.dtype,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: computes_bf16[0])
    monkeypatch.setattr(distributed, "gather", lambda own: [own, *(own and other for other in computes_bf16[1:])])
    assert inputs.resolve_dtype(precision, World(0, 2, device)) == expected


def test_memory_is_that_of_the_rank_s_gpu(node: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    available, host = memory.available_memory(World(5, 8, GPU))
    assert available == 80 * 2**30
    assert memory.available_memory(World(5, 8, CPU)) == (host, host)
