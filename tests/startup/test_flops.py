"""FLOPs: worked out by hand, counted by PyTorch on the real model, and against the published limit."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from launch.random_model import write_model
from pivot.batch import CHOSEN, DUMMY_SAMPLE, REJECTED, PackedBatch
from pivot.config import COMPONENTS, LanguageModelConfig, ModelConfig, VisionTowerConfig
from pivot.data.lengths import LENGTH_RECORD, Lengths
from pivot.data.units import Work
from pivot.encoders.library import resolve_encoder
from pivot.encoders.tower import build_vision_tower
from pivot.models.language import build_language_model
from pivot.models.mllm import MLLM
from pivot.models.projector import Projector
from pivot.models.skeleton import Skeleton, build_skeleton
from pivot.startup.flops import attended, build_work_counter, count_forward, measure_matmul_tflops, training_costs
from tests.kit.ranks.scenarios import merge
from tests.kit.tiny import tiny_open_clip, write_text_json, write_vision_json
from tests.kit.trees import build_batch, random_segments

NUM_TOKENS = 300


def model_of(tmp_path: Path, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None) -> ModelConfig:
    tower = VisionTowerConfig(path=str(write_vision_json(tmp_path / "vision.json", **(vision or {}))))
    language = LanguageModelConfig(path=str(write_text_json(tmp_path / "text.json", **(text or {}))))
    return ModelConfig(vision_tower=tower, language_model=language)


def test_costs_of_a_tiny_model(tmp_path: Path) -> None:
    """Width 32, MLP 64, 4 heads of 8 with 2 for keys, 2 blocks, 320 words; encoder 3 blocks of which 2 run, 16 patches.

    A block of the language model: 32 * (32 + 16 + 16 + 32) + 3 * 32 * 64 = 9216 weights, 2 FLOPs each, 2 blocks, and
    three times that for training. An encoder block: 4 * 32² + 2 * 32 * 64 = 8192 weights. The patch embedding,
    3 * 8 * 8 * 32 weights, has no gradient of its input.
    """
    costs = training_costs(build_skeleton(model_of(tmp_path), NUM_TOKENS), COMPONENTS)
    query, behind = 32 * 32, 32 * 32 + 3 * 32 * 64  # of the second block, they run where it is read
    assert costs.per_token == 3 * 2 * (2 * 9216 - query - behind)
    assert costs.per_query == 3 * 2 * query
    assert costs.per_target == 3 * 2 * (behind + 32 * 320)
    assert costs.per_attention == costs.per_read_attention == 3 * 4 * 32
    blocks = 3 * 2 * (2 * 8192 + 4 * 16 * 32)
    assert costs.per_image_token == blocks + 2 * 2 * 3 * 8 * 8 * 32 + 3 * 2 * (32 * 32 + 32 * 32)


@pytest.mark.parametrize(
    ("trained", "encoder", "projector", "language"),
    [
        (COMPONENTS, 3, (3, 3), 3),
        (("projector",), 1, (2, 3), 2),
        (("projector", "language_model"), 1, (2, 3), 3),
        (("language_model",), 1, (1, 1), 3),
        (("vision_tower",), 3, (2, 2), 2),
    ],
)
def test_frozen_parts_cost_less(
    tmp_path: Path, trained: tuple[str, ...], encoder: float, projector: tuple[float, float], language: float
) -> None:
    """A forward, a second one to pass gradients through, a third for the gradient of a part's own weights."""
    skeleton = build_skeleton(model_of(tmp_path), NUM_TOKENS)
    forward, costs = count_forward(skeleton), training_costs(skeleton, trained)
    assert costs.per_token == language * forward.blocks
    layers = projector[0] * forward.projector_in + projector[1] * forward.projector_rest
    patches = (1 + ("vision_tower" in trained)) * forward.patches
    assert costs.per_image_token == (patches + encoder * forward.encoder) / 16 + layers


@pytest.mark.parametrize("with_timm", [False, True])
def test_open_clip(tmp_path: Path, with_timm: bool) -> None:
    """The same encoder as the tiny SigLIP, once with a CLS token: 17 positions for 16 features."""
    model = model_of(tmp_path)
    own = count_forward(build_skeleton(model, NUM_TOKENS))
    model.vision_tower.path = f"open_clip:{tiny_open_clip(tmp_path, with_timm=with_timm)}"
    found = count_forward(build_skeleton(model, NUM_TOKENS))
    positions = 16 if with_timm else 17
    mlp = 4 * 32  # open_clip's ratio; the tiny SigLIP has 2
    assert found.patches == own.patches
    assert found.encoder == 2 * (positions * 2 * (4 * 32**2 + 2 * 32 * mlp) + 4 * positions**2 * 32)


# -- against what PyTorch runs ---------------------------------------------------------------------------------

SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {},
    "cpu": {
        "text": {
            "hidden_size": 128,
            "intermediate_size": 352,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "vocab_size": 4000,
        },
        "vision": {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 5, "image_size": 112},
    },
}


def build(model: ModelConfig, trained: tuple[str, ...]) -> MLLM:
    dtype = torch.float32
    assert model.language_model.path is not None
    tower = build_vision_tower(resolve_encoder(model.vision_tower), dtype=dtype)
    language_model = build_language_model(model.language_model.path, dtype=dtype)
    found = MLLM(tower, Projector("mlp2x_gelu", tower.width, language_model.config.hidden_size), language_model).train()
    for name in COMPONENTS:
        found.get_submodule(name).requires_grad_(name in trained)
    return found


def pairs_with_images(skeleton: Skeleton, count: int) -> PackedBatch:
    image, features, size = 299, skeleton.vision_tower.num_features, skeleton.vision_tower.facts.size
    batches = []
    for seed in range(count):
        prompt, chosen, rejected = random_segments([20 + 3 * seed, 31 - 2 * seed, 17 + 4 * seed], seed=seed)
        pixels = torch.zeros(1, 3, size, size, dtype=torch.uint8)
        segments = [[image] * features + prompt, chosen, rejected]
        batches.append(build_batch(segments, [-1, 0, 0], image_token_id=image, pixel_values=pixels))
    return merge(batches, image)


class Rectangles(NamedTuple):
    """FLOPs of attention: as our count has them, and as PyTorch's counter has."""

    ours: float
    torchs: float


class ProductCounter(TorchDispatchMode):
    """Add up the FLOPs of matrix products, convolutions and fused attention from the shapes that torch runs them on.

    torch's own counter knows fused attention on a CPU in some releases and not in others, so the shapes are read here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products = self.attention = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if "attention" in name:
            # Forward has two products of a query with a key; the fused backward has five, since it scores them again.
            query, key = args[1:3] if name.endswith("backward") else args[:2]
            count = 5.0 if name.endswith("backward") else 2.0
            self.attention += count * 2.0 * query.numel() * key.shape[-2]
        elif name in ("mm", "bmm"):
            if args[0].shape[-1] > 1:  # an outer product adds nothing up; rotary angles are one in some releases
                self.products += 2.0 * args[0].numel() * args[1].shape[-1]
        elif name in ("addmm", "baddbmm"):
            self.products += 2.0 * args[1].numel() * args[2].shape[-1]
        elif name == "convolution":
            self.products += 2.0 * result.numel() * args[1][0].numel()
        elif name == "convolution_backward":
            grads = sum(args[-1][:2])  # of the input and of the weight, where they are asked for
            self.products += grads * 2.0 * args[0].numel() * args[2][0].numel()
        else:
            assert not any(word in name for word in ("matmul", "linear", "conv", "dot")), f"{name} is not counted here"
        return result


def counted_by_torch(model: MLLM, batch: PackedBatch) -> tuple[float, float]:
    """FLOPs of a forward and backward: (of matrix products and convolutions, of fused attention as rectangles)."""
    with ProductCounter() as counter:
        model(batch).sum().backward()
    return counter.products, counter.attention


def our_attention(skeleton: Skeleton, batch: PackedBatch, trained: tuple[str, ...]) -> Rectangles:
    """What our count holds for attention; and the same as PyTorch counts it, which swaps the rectangles in.

    It counts every query with every key of a chain, masked or not, and 2.5 forwards for a backward, since the fused
    kernels compute the scores again there.
    """
    forward, tower = count_forward(skeleton), skeleton.vision_tower
    positions = tower.num_features + int(tower.facts.has_cls)
    encoder = batch.pixel_values.shape[0] * 4.0 * positions**2 * tower.width * tower.num_blocks
    rectangle = own = 0.0
    for segments, flops in (
        (batch.segments, forward.attention),
        (batch.reading.segments, forward.read_attention),
    ):
        rectangle += sum(chain.num_queries * chain.num_keys for chain in segments.chains) * flops
        own += attended(segments) * flops
    vision = float("vision_tower" in trained)
    return Rectangles(
        ours=encoder * (1 + 2 * vision) + 3 * own,
        torchs=encoder * (1 + 2.5 * vision) + 3.5 * rectangle,
    )


@pytest.mark.parametrize("trained", [COMPONENTS, ("projector",), ("language_model",), ("vision_tower", "projector")])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_torchs_count(tmp_path: Path, shape: str, trained: tuple[str, ...]) -> None:
    """Forward and backward of the real model, product by product; seen equal to the last digit.

    Nothing is computed twice here: the few logits are kept, and so is what the blocks compute.
    """
    config = model_of(tmp_path, **SHAPES[shape])
    skeleton = build_skeleton(config, NUM_TOKENS)
    batch = pairs_with_images(skeleton, 3)
    model = build(config, trained)
    multiplied, fused = counted_by_torch(model, batch)
    useful = build_work_counter(skeleton, trained).useful(batch)
    attention = our_attention(skeleton, batch, trained)
    assert useful - attention.ours == pytest.approx(multiplied, rel=1e-9)
    assert attention.torchs == pytest.approx(fused, rel=1e-9)


# -- the limit -----------------------------------------------------------------------------------------------------


def lengths_of(prompt: int, image: int, chosen: int, rejected: int) -> Lengths:
    records = np.zeros(1, dtype=LENGTH_RECORD)
    for name, value in {"prompt": prompt, "image": image, "chosen": chosen, "rejected": rejected}.items():
        records[name] = value
    return Lengths.from_records(records)


def behind_attention(skeleton: Skeleton) -> float:
    """FLOPs of a block on one token behind its attention: the output's matrix and the MLP's three."""
    text = skeleton.text_config
    return 2.0 * text.hidden_size * (text.hidden_size + 3 * text.intermediate_size)


@pytest.mark.parametrize(("language", "tflop"), [("qwen2.5-1.5b", 12.2), ("qwen2.5-7b", 50.3)])
def test_a_pair_at_the_limit(tmp_path: Path, language: str, tflop: float) -> None:
    """SigLIP-So400m/14 at 384 (729 tokens), 50 prompt tokens, 2 x 200 completion tokens, everything trained.

    The limit that is published counts every block on every token: 12.11 and 50.26 with the 26 encoder blocks that layer
    -2 runs. The last block asks at 401 of 1,179 tokens and goes on at 400, which takes 0.22 and 1.09 off.
    """
    write_model(tmp_path, "siglip-so400m14-384", language)
    tower = VisionTowerConfig(path=str(tmp_path / "vision.json"))
    config = LanguageModelConfig(path=str(tmp_path / "language" / "config.json"))
    skeleton = build_skeleton(ModelConfig(vision_tower=tower, language_model=config), NUM_TOKENS)
    work = Work(lengths_of(779, 729, 200, 200), (CHOSEN, REJECTED), training_costs(skeleton, COMPONENTS))
    width = skeleton.text_config.hidden_size
    saved = 3 * (778 * (2.0 * width**2 + 4.0 * width * 779 / 2) + 779 * behind_attention(skeleton))
    assert (float(work.costs[0]) + saved) / 1e12 == pytest.approx(tflop, rel=0.01)
    assert saved / 1e12 == pytest.approx({"qwen2.5-1.5b": 0.22, "qwen2.5-7b": 1.085}[language], abs=0.005)


def test_the_plan_counts_what_the_batch_holds(tmp_path: Path) -> None:
    """Useful FLOPs known before a pair is read = those of the row it becomes; a dummy has none."""
    skeleton = build_skeleton(model_of(tmp_path), NUM_TOKENS)
    batch, counter = pairs_with_images(skeleton, 1), build_work_counter(skeleton, COMPONENTS)
    planned = Work(lengths_of(16 + 20, 16, 31, 17), (CHOSEN, REJECTED), counter.costs).costs[0]
    assert counter.useful(batch) == pytest.approx(planned, rel=1e-12)
    dummy = replace(batch, sample_index=torch.tensor([DUMMY_SAMPLE]))
    assert counter.useful(dummy) == 0


def test_a_shared_image_is_encoded_once(tmp_path: Path) -> None:
    """Two pairs about one image in a row: the encoder's work of one; a row without images has none that is useful."""
    skeleton = build_skeleton(model_of(tmp_path), NUM_TOKENS)
    counter = build_work_counter(skeleton, COMPONENTS)
    batch = pairs_with_images(skeleton, 2)
    shared = replace(batch, pixel_values=batch.pixel_values[:1])
    image = counter.costs.per_image_token * 16
    assert counter.useful(batch) - counter.useful(shared) == pytest.approx(image)
    text = replace(shared, image_positions=torch.zeros(0, dtype=torch.long))
    assert counter.useful(shared) - counter.useful(text) == pytest.approx(image)


def test_the_matrix_rate_is_that_of_a_machine() -> None:
    """Positive, and no more than ten times what it takes to multiply ourselves; quick enough for a start."""
    threads, started = torch.get_num_threads(), time.process_time()
    rate = measure_matmul_tflops(torch.device("cpu"), torch.float32)
    assert time.process_time() - started < 5.0 * threads
    left = torch.randn(1024, 1024)
    before = time.perf_counter()
    left @ left
    own = 2 * 1024**3 / (time.perf_counter() - before) / 1e12
    assert own / 10 < rate < 1e4
