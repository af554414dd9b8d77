"""The CUDA paths on a machine without a GPU: torch's fake tensors know shapes, types and devices, and hold no values.

A tensor on the wrong device, a kernel that does not take a dtype, and a value that the host reads all raise. What this
cannot show: numbers, backward passes (fake CUDA tensors have none here), the real limits of kernels, and streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pivot.batch import PackedBatch
from pivot.config import DPOConfig, ObjectiveConfig, SFTConfig
from pivot.counts import StepCounts
from pivot.data.loader import Loader
from pivot.distributed import World
from pivot.evaluate.generation import generate, stock_attention
from pivot.evaluate.pairs import score_pairs
from pivot.metrics import StepMetrics
from pivot.models.mllm import MLLM
from pivot.objectives import build_objective
from tests.ranks.scenarios import build_plain, merge, pair
from tests.tiny import tiny_llava
from tests.trees import build_batch, random_segments

GPU = torch.device("cuda", 0)
COUNTS = StepCounts(pair=4, chosen_token=20, target_token=40)
MODELS = {
    "siglip + qwen2": {"kind": "qwen2", "vision": "siglip"},
    "siglip + tied qwen2": {"kind": "qwen2", "vision": "siglip", "tie": True},
    "clip + llama": {"kind": "llama", "vision": "clip"},
}
OBJECTIVES = {
    "sigmoid": ObjectiveConfig(dpo=DPOConfig()),
    "mpo": ObjectiveConfig(dpo=DPOConfig(loss={"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}, bco_shift="running_mean")),
    "simpo": ObjectiveConfig(dpo=DPOConfig(loss={"simpo": 1.0, "ipo": 1.0, "hinge": 1.0})),
    "sft": ObjectiveConfig(sft=SFTConfig()),
}


class OneTypePerProduct(TorchDispatchMode):
    """Refuses a matrix product of two types, as a GPU's kernels do; fake tensors let it pass."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm", "convolution"):
            kinds = {value.dtype for value in args if isinstance(value, Tensor)}
            if len(kinds) > 1:
                raise RuntimeError(f"{func} of {' and '.join(map(str, kinds))}")
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Inside, "cuda" tensors can be made, and what comes from outside is a tensor of the host.

    torch 2.15 asks what card it is before it picks a kernel of variable-length attention: an A100.
    """
    card = mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    with card, FakeTensorMode(allow_non_fake_inputs=True), OneTypePerProduct():
        yield


def move(model: MLLM, dtype: torch.dtype) -> MLLM:
    """The model's parameters and buffers as ones of the GPU. Parameters keep being one where they are tied."""
    moved: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            value = moved.get(id(parameter))
            if value is None:
                value = torch.nn.Parameter(torch.empty(parameter.shape, device=GPU, dtype=dtype))
                moved[id(parameter)] = value
            setattr(module, name, value)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, device=GPU, dtype=buffer.dtype))
    return model


def rows(image: int) -> dict[str, PackedBatch]:
    """On the host, as the collator hands them over."""
    tokens = random_segments([5, 3, 4, 6, 2, 3, 5])
    tokens[0] = tokens[0][:2] + [image] * 16 + tokens[0][2:]
    pixels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    return {
        "pairs": merge([pair(seed, image, with_image=seed != 1) for seed in range(4)], image),
        "text": pair(1, image, with_image=False),
        "tree": build_batch(tokens, [-1, 0, 1, 1, 0, 4, 4], image_token_id=image, pixel_values=pixels),
    }


@pytest.fixture
def llava(tmp_path: Path) -> Callable[..., tuple[MLLM, int, dict[str, PackedBatch]]]:
    """Build outside of the fake mode what must be real: files, the host's integers."""

    def make(model: str = "siglip + qwen2") -> tuple[MLLM, int, dict[str, PackedBatch]]:
        plain, image = build_plain(tiny_llava(tmp_path, **MODELS[model]))
        return plain, image, rows(image)

    return make


Llava = Callable[..., tuple[MLLM, int, dict[str, PackedBatch]]]


@pytest.mark.parametrize("attention", ["sdpa", "torch_varlen"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("model", MODELS)
def test_a_forward_reads_nothing_on_the_host(llava: Llava, model: str, recompute: str, attention: str) -> None:
    mllm, _, batches = llava(model)
    mllm.enable_activation_checkpointing(recompute)
    mllm.use_attention(attention)
    with fake_gpu():
        move(mllm, torch.bfloat16)
        for batch in batches.values():
            token_logps = mllm(batch.to(GPU))
            assert token_logps.device == GPU and token_logps.dtype == torch.float32
            assert token_logps.shape == batch.target_ids.shape


def test_a_forward_in_fp32_runs_too(llava: Llava) -> None:
    mllm, _, batches = llava()
    with fake_gpu():
        move(mllm, torch.float32)
        assert mllm(batches["tree"].to(GPU)).device == GPU


def test_a_batch_moves_whole_but_for_the_hosts_integers(llava: Llava) -> None:
    batch = llava()[2]["tree"]
    with fake_gpu():
        moved = batch.to(GPU)
        layout = moved.segments.layout
        there = [
            *(value for name, value in vars(moved).items() if isinstance(value, Tensor) and name != "sample_index"),
            *moved.by_role.values(),
            *(moved.reading.positions, moved.reading.queries, moved.reading.targets),
            *(layout.cu_queries, layout.cu_keys, layout.key_index),
        ]
        assert {tensor.device for tensor in there} == {GPU}
        assert moved.sample_index.device.type == "cpu"
        assert isinstance(layout.max_keys, int) and isinstance(moved.segments.chains[0].num_keys, int)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_and_its_sums_read_nothing(llava: Llava, name: str) -> None:
    """Up to where a step's numbers are gathered, which is where the host waits once a step."""
    _, _, batches = llava()
    with fake_gpu():
        objective, sums = build_objective(OBJECTIVES[name]), StepMetrics(World(0, 1, GPU), COUNTS)
        for host_batch in (batches["pairs"], batches["text"]):
            batch = host_batch.to(GPU)
            token_logps = torch.empty(batch.target_ids.shape, device=GPU)
            outcome = objective(token_logps, batch, torch.empty(batch.num_completions, device=GPU))
            terms = [weight * term.total / COUNTS.denominator(term.unit) for weight, term in outcome.loss.values()]
            sums.add(outcome, torch.stack(terms).sum())
        assert {value.device for value in sums._sums.values()} == {GPU}


def test_held_out_pairs_are_scored_up_to_their_numbers(llava: Llava) -> None:
    """The scores of a batch are read on the host once; everything in front of that runs on the GPU."""
    mllm, _, batches = llava()
    scored: list[Tensor] = []

    def forward(batch: PackedBatch) -> Tensor:
        scored.append(mllm(batch))
        return scored[-1]

    with fake_gpu():
        move(mllm, torch.bfloat16)
        loader: Loader = [(None, iter([batches["tree"]]))]  # type: ignore[assignment]
        with pytest.raises((RuntimeError, TypeError, DataDependentOutputException)):  # numpy asks for the scores
            score_pairs(loader, forward, World(0, 1, GPU))
        assert scored[0].device == GPU


def test_an_answer_is_generated_without_reading_but_for_its_end(llava: Llava) -> None:
    """One token: the prompt runs through the encoder, the cache and the head; then the host asks whether it ended."""
    mllm, image, _ = llava()
    prompts = [torch.tensor([5, *[image] * 16, 7, 8]), torch.tensor([5, 6])]
    feature_index = torch.arange(16)

    with fake_gpu(), stock_attention(mllm):
        move(mllm, torch.bfloat16)
        pixels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8).to(GPU)
        with pytest.raises(DataDependentOutputException) as raised:
            generate(
                mllm,
                prompts,
                pixels,
                feature_index.to(GPU),
                image_token_id=image,
                stop_ids=[0],
                max_new_tokens=2,
            )
    (*_, asking) = (str(entry.statement) for entry in raised.traceback if entry.path.name == "generation.py")
    assert "all_done(bool(finished.all()))" in asking


# -- the harness can fail ------------------------------------------------------------------------------------------

PLANTED: dict[str, Callable[[Tensor], object]] = {
    "an index left on the host": lambda states: states.index_select(0, torch.tensor([0])),
    "a constant of the host": lambda states: states + torch.ones(states.shape),
    "a number that the host reads": lambda states: states.sum().item(),
    "a branch on a value": lambda states: 1 if states.sum() > 0 else 0,
    "a shape that depends on values": lambda states: states[states > 0],
    "float32 beside bfloat16": lambda states: states.bfloat16()[None] @ torch.ones(len(states), 1, device=GPU),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_caught(llava: Llava, name: str) -> None:
    mllm, _, batches = llava()
    caught = (RuntimeError, DataDependentOutputException, DynamicOutputShapeException)
    with fake_gpu():
        move(mllm, torch.bfloat16)
        token_logps = mllm(batches["tree"].to(GPU))
        with pytest.raises(caught):
            PLANTED[name](token_logps)
