"""A micro-batch never makes the host wait, a step's numbers travel together, and steps may come from any source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pivot.batch import (
    CHOSEN,
    CHOSEN_TOKEN,
    COMPLETION,
    REFERENCE,
    SAMPLE,
    TARGET_TOKEN,
    PackedBatch,
    StepCounts,
)
from pivot.config import DPOConfig, ObjectiveConfig, SFTConfig
from pivot.data.collate import Completion, Example, collate
from pivot.data.loader import Loader
from pivot.encoders.facts import ImageGeometry
from pivot.metrics import StepMetrics
from pivot.models.mllm import MLLM
from pivot.objectives import Outcome, Term, build_objective
from pivot.step import StepSource, run_micro_batch
from pivot.system.distributed import World
from tests.kit.ranks.scenarios import build_plain, merge, pair
from tests.kit.sets import FakeProcessor, make_plan, make_set
from tests.kit.syncs import Synchronised, forbid_syncs
from tests.kit.tiny import tiny_llava

GEOMETRY = ImageGeometry(size=32, num_tokens=16, mean=(0.5,) * 3, std=(0.5,) * 3, fit="squash")
WORLD = World(0, 1, torch.device("cpu"))
COUNTS = StepCounts({SAMPLE: 4, CHOSEN_TOKEN: 20, TARGET_TOKEN: 40})
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
    batch.completion_values[REFERENCE] = torch.full((batch.num_completions,), -5.0)
    sums = StepMetrics(WORLD)
    with forbid_syncs():
        run_micro_batch(plain, build_objective(section), batch, COUNTS, sums, last=True)
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
    batch.completion_values[REFERENCE] = torch.zeros(2)

    class Reading(Plain):
        def __call__(self, batch: PackedBatch) -> Tensor:
            token_logps = self.model(batch)
            if place == "forward":
                READING[name](token_logps)
            if place == "backward":
                token_logps.register_hook(lambda grad: (READING[name](grad), grad)[1])
            return token_logps

    def reading_objective(token_logps: Tensor, batch: PackedBatch) -> Outcome:
        if place == "objective":
            READING[name](token_logps)
        return objective(token_logps, batch)

    with pytest.raises(Synchronised), forbid_syncs():
        run_micro_batch(
            Reading(plain.model),
            reading_objective,  # type: ignore[arg-type]
            batch,
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
    batches = [merge([pair(4 * i + j, image, with_image=True) for j in range(4)], image) for i in range(2)]
    for batch in batches:
        batch.completion_values[REFERENCE] = torch.full((8,), -5.0)
    sums = StepMetrics(WORLD)
    for number, batch in enumerate([batch.to(device) for batch in batches]):
        torch.cuda.set_sync_debug_mode("error" if number else "default")  # the first one fills caches
        try:
            run_micro_batch(plain, objective, batch, COUNTS, sums, last=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# -- where steps come from ---------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """A step that knows its counts once its completions were drawn."""

    step: int
    counts: StepCounts
    num_micro_batches: int


class Rollouts:
    """A source that makes its completions when a step is asked for: four answers to each of two prompts.

    It stands for what online RL will do: lengths, and so the counts, are known to nobody before.
    """

    num_masked, data_wait_s = 0, 0.0

    def __init__(self, image_token_id: int, *, groups_per_row: int) -> None:
        self._image, self._groups_per_row = image_token_id, groups_per_row

    def __iter__(self) -> Iterator[tuple[Rollout, Iterator[PackedBatch]]]:
        for step in range(2):
            batches = self._draw(step)
            counts = sum((batch.counts() for batch in batches), StepCounts())
            yield Rollout(step, counts, len(batches)), iter(batches)

    def _draw(self, step: int) -> list[PackedBatch]:
        random, examples = np.random.default_rng(step), []
        for row in range(2):
            prompt = np.array([5, *[self._image] * 16, 7 + row])
            answers = [random.integers(8, 250, random.integers(1, 7)) for _ in range(4)]
            pixels = [torch.full((3, 32, 32), 40 + row, dtype=torch.uint8)]
            examples.append(Example(row, prompt, [Completion(COMPLETION, ids) for ids in answers], pixels, [str(row)]))
        batches = [
            collate(examples[i : i + self._groups_per_row], GEOMETRY, self._image)
            for i in range(0, len(examples), self._groups_per_row)
        ]
        advantages = random.normal(size=(2, 4))
        for batch in batches:
            own = advantages[batch.completion_rows.numpy(), np.arange(batch.num_completions) % 4]
            batch.completion_values["advantage"] = torch.from_numpy(own).float()
            batch.token_values["old"] = torch.full((len(batch.target_ids),), -3.0)
        return batches


class PolicyGradient:
    """-advantage * (logp - old) per token: an objective without pairs, which reads values of both kinds."""

    def __call__(self, token_logps: Tensor, batch: PackedBatch) -> Outcome:
        advantage = batch.completion_values["advantage"][batch.target_completion]
        total = -(advantage * (token_logps - batch.token_values["old"])).sum()
        return Outcome({"policy": (1.0, Term(total, TARGET_TOKEN))}, {"policy_loss": Term(total.detach(), SAMPLE)})


def run_steps(source: StepSource, plain: Plain, objective: Any) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Each step's loss and gradient, as the training loop forms them from any source; no weight moves."""
    results = []
    for step, micro_batches in source:
        plain.model.zero_grad()
        sums, losses = StepMetrics(WORLD), []
        for number, batch in enumerate(micro_batches):
            last = number == step.num_micro_batches - 1
            with forbid_syncs():
                logps = run_micro_batch(plain, objective, batch, step.counts, sums, last=last)
            losses += [w * t.total / step.counts.denominator(t.unit) for w, t in objective(logps, batch).loss.values()]
        assert len(losses) == step.num_micro_batches
        results.append((torch.stack(losses).sum(), {n: p.grad.clone() for n, p in plain.model.named_parameters()}))
    return results


def test_a_source_that_learns_its_counts_late_drives_a_step(tmp_path: Path) -> None:
    """Two prompts with four completions each: in one row or in two, the same loss and the same gradient.

    1e-5 of the gradient's norm, as for every other split (see tests/models/test_mllm.py).
    """
    model, image = build_plain(tiny_llava(tmp_path))
    whole = run_steps(Rollouts(image, groups_per_row=2), Plain(model), PolicyGradient())
    split = run_steps(Rollouts(image, groups_per_row=1), Plain(model), PolicyGradient())
    assert len(whole) == len(split) == 2
    for (loss, gradients), (other_loss, others) in zip(whole, split, strict=True):
        torch.testing.assert_close(loss, other_loss, atol=1e-5, rtol=1e-5)
        norm = torch.stack([grad.norm() for grad in gradients.values()]).norm()
        assert norm > 0
        assert all(float((others[name] - grad).norm() / norm) < 1e-5 for name, grad in gradients.items())


def test_the_loader_is_such_a_source(tmp_path: Path) -> None:
    """Over a packed set, whose plan knows before what the batches then hold: eight chosen completions in two steps."""
    shards = make_set(tmp_path / "data")
    plan = make_plan(shards, tmp_path / "cache", world_size=1, roles=(CHOSEN,), limit=8, global_batch_size=4)
    source: StepSource = Loader(shards, plan, FakeProcessor())
    steps = []
    for step, micro_batches in source:
        batches = list(micro_batches)
        assert len(batches) == step.num_micro_batches
        assert sum((batch.counts() for batch in batches), StepCounts()) == step.counts
        steps.append(step.step)
    assert steps == [0, 1]
