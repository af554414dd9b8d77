"""A micro-batch never makes the host wait, and a step's numbers travel together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pivot.batch import PackedBatch, StepCounts
from pivot.config import DPOConfig, ObjectiveConfig, SFTConfig
from pivot.metrics import StepMetrics
from pivot.models.mllm import MLLM
from pivot.objectives import Outcome, build_objective
from pivot.step import run_micro_batch
from pivot.system.distributed import World
from tests.kit.ranks.scenarios import build_plain, merge, pair
from tests.kit.syncs import Synchronised, forbid_syncs
from tests.kit.tiny import tiny_llava

WORLD = World(0, 1, torch.device("cpu"))
COUNTS = StepCounts(pair=4, chosen_token=20, target_token=40)
MIX = DPOConfig(loss={"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}, bco_shift="running_mean")


class Plain:
    """An engine without DeepSpeed."""

    def __init__(self, model: MLLM) -> None:
        self.model = model

    def __call__(self, batch: PackedBatch) -> Tensor:
        return self.model(batch)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()


@pytest.fixture(scope="module", params=["none", "selective", "full"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plain, int]:
    model, image_token_id = build_plain(tiny_llava(tmp_path_factory.mktemp("llava")))
    model.enable_activation_checkpointing(request.param)
    return Plain(model), image_token_id


@pytest.mark.parametrize("section", [ObjectiveConfig(dpo=MIX), ObjectiveConfig(sft=SFTConfig())], ids=["dpo", "sft"])
@pytest.mark.parametrize("with_image", [True, False], ids=["image", "text"])
def test_a_micro_batch_waits_for_nothing(engine: tuple[Plain, int], section: ObjectiveConfig, with_image: bool) -> None:
    """Forward, objective, backward and the metrics' sums, with later completions (so with masks) and without images."""
    plain, image = engine
    batch = merge([pair(seed, image, with_image=with_image) for seed in range(4)], image)
    reference = torch.full((batch.num_completions,), -5.0)
    sums = StepMetrics(WORLD)
    with forbid_syncs():
        run_micro_batch(plain, build_objective(section), batch, reference, COUNTS, sums, last=True)
    assert all(p.grad is not None for p in plain.model.parameters())


READING: dict[str, Callable[[Tensor], object]] = {
    "item": lambda t: t.sum().item(),
    "float": lambda t: float(t.sum()),
    "if": lambda t: 1 if t.sum() > 0 else 0,
    "tolist": lambda t: t.tolist(),
    "cpu": lambda t: t.cpu(),
    "to cpu": lambda t: t.to("cpu"),
    "numpy": lambda t: t.detach().numpy(),
    "nonzero": lambda t: (t > 0).nonzero(),
    "mask": lambda t: t[t > 0],
    "where": lambda t: torch.where(t > 0),
}


@pytest.mark.parametrize("name", READING)
@pytest.mark.parametrize("place", ["forward", "objective", "backward"])
def test_a_wait_is_noticed(engine: tuple[Plain, int], name: str, place: str) -> None:
    """The law above can fail: a value read in any of the three places is caught, also inside autograd."""
    plain, image = engine
    batch, objective = pair(0, image, with_image=True), build_objective(ObjectiveConfig(dpo=MIX))

    class Reading(Plain):
        def __call__(self, batch: PackedBatch) -> Tensor:
            token_logps = self.model(batch)
            if place == "forward":
                READING[name](token_logps)
            if place == "backward":
                token_logps.register_hook(lambda grad: (READING[name](grad), grad)[1])
            return token_logps

    def reading_objective(token_logps: Tensor, batch: PackedBatch, reference: Tensor | None) -> Outcome:
        if place == "objective":
            READING[name](token_logps)
        return objective(token_logps, batch, reference)

    with pytest.raises(Synchronised), forbid_syncs():
        run_micro_batch(
            Reading(plain.model),
            reading_objective,  # type: ignore[arg-type]
            batch,
            torch.zeros(2),
            COUNTS,
            StepMetrics(WORLD),
            last=True,
        )


@pytest.mark.gpu
def test_a_micro_batch_waits_for_nothing_on_a_gpu(tmp_path: Path) -> None:
    """The same, asked of CUDA itself."""
    device = torch.device("cuda")
    model, image = build_plain(tiny_llava(tmp_path))
    plain, objective = Plain(model.to(device)), build_objective(ObjectiveConfig(dpo=MIX))
    batches = [merge([pair(4 * i + j, image, with_image=True) for j in range(4)], image).to(device) for i in range(2)]
    reference, sums = torch.full((8,), -5.0, device=device), StepMetrics(WORLD)
    for number, batch in enumerate(batches):
        torch.cuda.set_sync_debug_mode("error" if number else "default")  # the first one fills caches
        try:
            run_micro_batch(plain, objective, batch, reference, COUNTS, sums, last=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
