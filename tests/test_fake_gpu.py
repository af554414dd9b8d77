"""What a GPU's run does between its waits, on a GPU that is not there (see fake_gpu.py for what that can show)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pivot.batch import CHOSEN_TOKEN, REFERENCE, SAMPLE, TARGET_TOKEN, PackedBatch, StepCounts
from pivot.config import DPOConfig, ObjectiveConfig, SFTConfig, VisionTowerConfig
from pivot.encoders.library import resolve_encoder
from pivot.encoders.tower import build_vision_tower
from pivot.evaluate.generation import _decode, _embed, _left_pad, stock_attention
from pivot.evaluate.pairs import Terms
from pivot.metrics import ComponentMeter, StepMetrics
from pivot.models.attention import choice, choose_attention
from pivot.models.attention import varlen as varlen_module
from pivot.models.mllm import MLLM
from pivot.objectives import build_objective
from pivot.startup.selfcheck import start_margins
from pivot.step import run_micro_batch
from pivot.system.distributed import World
from tests.kit.fake_gpu import GPU, fake_gpu, forbid_waits
from tests.kit.ranks.scenarios import build_plain, merge, pair
from tests.kit.syncs import Synchronised
from tests.kit.tiny import random_images, tiny_llava, tiny_open_clip
from tests.kit.trees import TREES, build_batch, random_segments

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # recompute's: all zero

WORLD = World(0, 2, GPU)
COUNTS = StepCounts({SAMPLE: 4, CHOSEN_TOKEN: 20, TARGET_TOKEN: 40})
IMAGE_TOKENS = 16
MODELS = {
    "siglip + qwen2": {"vision": "siglip", "kind": "qwen2"},
    "siglip + qwen3": {"vision": "siglip", "kind": "qwen3"},
    "clip + llama": {"vision": "clip", "kind": "llama"},
}
RUNS = [
    *((name, torch.bfloat16, "torch_varlen", "none") for name in MODELS),
    ("siglip + qwen2", torch.bfloat16, "sdpa", "selective"),
    ("siglip + qwen3", torch.float32, "sdpa", "full"),
    ("clip + llama", torch.bfloat16, "torch_varlen", "selective"),
]
TEXT_ROWS = ("two sequences", "group of four", "image tree")  # of tests.kit.trees: depth one to three
OBJECTIVES = {
    "sigmoid": ObjectiveConfig(dpo=DPOConfig()),
    "mpo": ObjectiveConfig(dpo=DPOConfig(loss={"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}, bco_shift="running_mean")),
    "all": ObjectiveConfig(dpo=DPOConfig(loss={"ipo": 1.0, "hinge": 1.0, "robust": 1.0, "simpo": 1.0})),
    "sft": ObjectiveConfig(sft=SFTConfig()),
}


class Forward:
    """An engine whose backward does nothing: there is none without a card."""

    def __init__(self, model: MLLM) -> None:
        self.model = model

    def __call__(self, batch: PackedBatch) -> Tensor:
        return self.model(batch)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        assert loss.device == GPU and loss.dtype == torch.float32 and loss.shape == ()


def rows(image: int) -> dict[str, PackedBatch]:
    """Trees of each depth, text alone (so with a dummy image), one image and several."""
    found = {name: build_batch(random_segments(TREES[name][0]), TREES[name][1]) for name in TEXT_ROWS}
    found["one image"] = pair(0, image, with_image=True)
    found["images and text"] = merge([pair(seed, image, with_image=seed != 1) for seed in range(4)], image)
    token_ids = random_segments([5, 3, 4, 6, 2, 3, 5])
    token_ids[0] += [image] * 2 * IMAGE_TOKENS
    parents = [-1, 0, 1, 1, 0, 4, 4]
    found["two images, three deep"] = build_batch(
        token_ids, parents, image_token_id=image, num_images=2, pixel_values=random_images(2)
    )
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tiny_llava(tmp_path_factory.mktemp("llava"), **MODELS[name]) for name in MODELS}


@pytest.mark.parametrize("name, dtype, backend, recompute", RUNS)
def test_a_forward_stays_on_the_gpu(
    folders: dict[str, Path], name: str, dtype: torch.dtype, backend: str, recompute: str
) -> None:
    """Every row in its own run, behind one that fills the caches; float32 log-probs come out."""
    model, image = build_plain(folders[name], dtype)
    model.use_attention(backend)
    model.enable_activation_checkpointing(recompute)
    batches = rows(image)
    with fake_gpu():
        model.to(GPU)(batches["one image"].to(GPU))
        for row, batch in batches.items():
            on_gpu = batch.pin_memory().to(GPU)
            with forbid_waits():
                logps = model(on_gpu)
            assert (logps.device, logps.dtype) == (GPU, torch.float32), row
            assert logps.shape == batch.target_ids.shape, row


@pytest.mark.parametrize("section", OBJECTIVES)
def test_a_step_waits_once(folders: dict[str, Path], section: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two micro-batches from page-locked memory with their references, up to the one read of the step's numbers."""
    model, image = build_plain(folders["siglip + qwen2"], torch.bfloat16)
    objective, batches = build_objective(OBJECTIVES[section]), rows(image)
    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", lambda table, own: table.copy_(own.repeat(2)))
    with fake_gpu():
        engine, sums = Forward(model.to(GPU)), StepMetrics(WORLD)
        engine(batches["one image"].to(GPU))
        with forbid_waits():
            for name in ("images and text", "group of four"):
                host = batches[name].pin_memory()
                host.completion_values[REFERENCE] = torch.full((host.num_completions,), -5.0)  # behind the pinning
                batch = host.to(GPU)
                logps = run_micro_batch(engine, objective, batch, COUNTS, sums, last=True)
                assert start_margins(batch, logps).device == GPU
                sums.add({"tokens": batch.num_tokens})
            sums.add({"wait_s": 0.5})
            with pytest.raises(Synchronised, match=r"Tensor.cpu waits"):  # all else is queued by then
                sums.reduce()


def test_evaluation_sums_on_the_gpu(folders: dict[str, Path]) -> None:
    """An objective's terms over held-out batches; counts come from the batch on the host."""
    model, image = build_plain(folders["siglip + qwen2"], torch.bfloat16)
    objective, host = build_objective(OBJECTIVES["mpo"]), rows(image)["images and text"]
    terms = Terms(objective)
    host.completion_values[REFERENCE] = torch.zeros(host.num_completions)
    with fake_gpu():
        batch = host.to(GPU)
        outcome = objective(model.to(GPU)(batch), batch)
    terms.add(outcome, host)
    terms.add(outcome, host)


def test_norms_are_measured_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the optimizer as it is once it has stepped: where AdamW is fused, its step counter lies on the GPU, too."""

    class Stepped:
        def __init__(self, weight: torch.nn.Parameter, state: dict[str, Any]) -> None:
            self.state = {weight: state}
            group = {"params": [weight], "component": "projector", "lr": 1e-3, "weight_decay": 0.1}
            self.param_groups = [group | {"betas": (0.9, 0.95), "eps": 1e-8}]

    summed: list[torch.device] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda own: summed.append(own.device))
    meter = ComponentMeter("adamw")
    meter.start(enabled=True)
    with fake_gpu():
        weight = torch.nn.Parameter(torch.zeros(5, 3, device=GPU))
        weight.grad = torch.zeros(5, 3, device=GPU)
        state = {name: torch.zeros(5, 3, device=GPU) for name in ("exp_avg", "exp_avg_sq")}
        stepped = Stepped(weight, state | {"step": torch.ones((), device=GPU)})
        with forbid_waits():
            meter.observe_full_gradients(stepped.param_groups)
            meter.observe(stepped)  # type: ignore[arg-type]
            with pytest.raises(Synchronised):  # the one read, of what all ranks have summed
                meter.norms(World(0, 2, GPU), partitioned=True, total_norm=1.0)
    assert summed == [GPU]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", MODELS)
def test_answers_are_made_on_the_gpu(folders: dict[str, Path], name: str, dtype: torch.dtype) -> None:
    """Prompts of two lengths, one without an image, encoded; then token by token, without the question whether all are
    finished, for which the host does wait."""
    model, image = build_plain(folders[name], dtype)
    prompts = [torch.tensor([image] * IMAGE_TOKENS + [1, 2, 3]), torch.tensor([4, 5])]
    laid_out = (*_left_pad(prompts, 258, image), random_images(1), torch.arange(IMAGE_TOKENS), torch.tensor([258, 257]))
    with fake_gpu(), stock_attention(model.to(GPU)), torch.no_grad():
        ids, mask, positions, pixels, index, stops = (tensor.to(GPU) for tensor in laid_out)
        _embed(model, ids, positions, pixels, index)
        with forbid_waits():
            embeddings = _embed(model, ids, positions, pixels, index)
            tokens = _decode(model, embeddings, mask, stops)
            for _ in range(3):
                token, finished = next(tokens)
                assert (token.device, token.shape, finished.dtype) == (GPU, (2,), torch.bool)


def test_the_preferred_back_end_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """`choose_attention` for a GPU, where each back end's forward runs on the tree and then counts as equal to SDPA."""

    def forward(backend: Any, states: list[Tensor], weight: Tensor, segments: Any) -> list[Tensor]:
        query = states[0][:, :, : segments.num_queries]
        output = backend(query, *states[1:], segments, None)
        assert output.shape == weight[:, : segments.num_queries].shape and output.device == GPU
        return [output.detach()] * 4

    monkeypatch.setattr(choice, "_run", forward)
    monkeypatch.setattr(Tensor, "item", lambda tensor: 0.0)  # of every error: a fake one has no value
    # torch 2.15 asks the driver whether cuDNN may take a chain of one query; other releases have no such question.
    monkeypatch.setattr("torch.nn.attention.varlen._cudnn_decode_disabled", lambda _: True, raising=False)
    with fake_gpu():
        shape: dict[str, Any] = {"device": GPU, "heads": 8, "key_heads": 2, "head_size": 64}
        assert str(choose_attention("auto", dtype=torch.bfloat16, **shape)) == "torch_varlen"
        found = choose_attention("auto", dtype=torch.float32, **shape)
    assert found.name == "sdpa" and found.refused["torch_varlen"] == "needs bf16, the run is in float32"


def test_flash_attention_gets_what_it_takes(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The flash-attn package's function, which stands here with its demands alone: it has no fake kernel."""

    def varlen(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        for states in (q, k, v):
            assert states.dtype == torch.bfloat16 and states.device == GPU and states.is_contiguous()
        for cumulative in (options["cu_seqlens_q"], options["cu_seqlens_k"]):
            assert cumulative.dtype == torch.int32 and cumulative.device == GPU
        assert isinstance(options["max_seqlen_q"], int) and isinstance(options["max_seqlen_k"], int)
        return torch.empty_like(q)

    monkeypatch.setattr(varlen_module, "_flash_function", lambda: varlen)
    model, image = build_plain(folders["siglip + qwen2"], torch.bfloat16)
    model.use_attention("flash_attn")
    host = rows(image)["two images, three deep"]
    with fake_gpu():
        model.to(GPU)(host.to(GPU))
        on_gpu = host.pin_memory().to(GPU)
        with forbid_waits():
            assert model(on_gpu).shape == host.target_ids.shape


@pytest.mark.parametrize("with_timm", [False, True])
def test_an_open_clip_encoder_stays_on_the_gpu(tmp_path: Path, with_timm: bool) -> None:
    name = tiny_open_clip(tmp_path, with_timm=with_timm)
    tower = build_vision_tower(resolve_encoder(VisionTowerConfig(path=f"open_clip:{name}")), dtype=torch.bfloat16)
    pixels = random_images(2)
    with fake_gpu():
        pixels = pixels.to(GPU)
        tower.to(GPU)(pixels)
        with forbid_waits():
            features = tower(pixels)
        assert (features.device, features.dtype, features.shape) == (GPU, torch.bfloat16, (2, 16, tower.width))


# -- the harness -----------------------------------------------------------------------------------------------------


FAULTS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda t: t.sum().item(),
    "cpu": lambda t: t.cpu(),
    "to host": lambda t: t.to(torch.device("cpu")),
    "to gpu": lambda t: torch.zeros(3).to(GPU),
    "to gpu, pinned, blocking": lambda t: torch.zeros(3).pin_memory().to(GPU),
    "new from numbers": lambda t: torch.tensor([1.0, 2.0], device=GPU),
    "copy_": lambda t: t.copy_(torch.zeros(t.shape)),
    "index on the host": lambda t: t[torch.zeros(2, dtype=torch.int64)],
    "index_select on the host": lambda t: t.index_select(0, torch.zeros(2, dtype=torch.int64)),
    "sum with the host": lambda t: t + torch.zeros(t.shape),
    "dtypes": lambda t: t[None] @ torch.zeros(t.shape[0], 2, device=GPU, dtype=torch.bfloat16),
    "mask": lambda t: t[t > 0],
    "branch": lambda t: 1 if t.sum() > 0 else 0,
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed(folders: dict[str, Path], name: str) -> None:
    """Planted in a forward, behind the decoder's last norm, where it must be the fault that raises and nothing else."""
    model, image = build_plain(folders["siglip + qwen2"])
    host = pair(0, image, with_image=True)
    planted: list[Callable[[Tensor], object]] = []

    def commit_faults(module: torch.nn.Module, args: Any, output: Tensor) -> None:
        for fault in planted:
            fault(output[0, :, 0])

    model.language_model.model.norm.register_forward_hook(commit_faults)
    with fake_gpu():
        model.to(GPU)
        batch = host.to(GPU)
        model(batch)
        with forbid_waits():
            model(batch)
        planted.append(FAULTS[name])
        with pytest.raises((Synchronised, RuntimeError)), forbid_waits():
            model(batch)


@pytest.mark.parametrize(
    "name", ["token_ids", "position_ids", "feature_index", "image_positions", "target_ids", "reading"]
)
def test_what_is_left_on_the_host_is_noticed(folders: dict[str, Path], name: str) -> None:
    model, image = build_plain(folders["siglip + qwen2"])
    host = pair(0, image, with_image=True)
    with fake_gpu():
        batch = host.to(GPU)
        model.to(GPU)(batch)
        setattr(batch, name, getattr(host, name))
        with pytest.raises((Synchronised, RuntimeError)), forbid_waits():
            model(batch)
