"""Where steps come from, and one micro-batch of a step: forward, objective, backward; for training, tests, benchmarks.

Where the host waits for the GPU. Ours: once an optimizer step (`StepMetrics.reduce`), once more where the step's norms
are measured (`log.every_steps`), and ahead of each step, to agree on whether to stop; the run's first step checks more.
DeepSpeed 0.19.8's own, which no setting of ours takes away:
- each micro-batch, ZeRO-1/2 with overlap_comm: `synchronize()` per reduced bucket and behind each reducing backward;
- each micro-batch, ZeRO-3: the reduction stream behind each backward, and whoever is more than two fetches or two
  reductions ahead;
- each step: `.item()` of the overflow check and of the gradient norm; with offload also the copies of both ways.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from pivot.batch import PackedBatch, StepCounts
from pivot.metrics import StepMetrics
from pivot.objectives import Objective
from pivot.system import fault, watchdog


class Step(Protocol):
    """What the loop must know of an optimizer step when it begins, the same on every rank."""

    @property
    def step(self) -> int: ...  # from 0
    @property
    def counts(self) -> StepCounts: ...  # over all ranks
    @property
    def num_micro_batches(self) -> int: ...  # per rank, equal on all of them


class StepSource(Protocol):
    """Where the steps come from: of each one its facts, and this rank's micro-batches, on the host.

    `data.loader.Loader` reads them from a data set, whose plan knows every count before. A source that makes its
    completions itself may do so when it is asked for the next step: nothing is asked of a step before it begins.
    """

    num_masked: int  # samples that this rank could not read, since the source was made
    data_wait_s: float  # how long this rank has waited for micro-batches

    def __iter__(self) -> Iterator[tuple[Step, Iterator[PackedBatch]]]: ...


class Trained(Protocol):
    """What an engine does here: a forward pass, and adding to the step's gradient."""

    def __call__(self, batch: Any) -> Tensor: ...
    def backward(self, loss: Tensor, *, last: bool) -> None: ...


def run_micro_batch(
    engine: Trained,
    objective: Objective,
    batch: PackedBatch,
    counts: StepCounts,
    sums: StepMetrics,
    *,
    last: bool,
) -> Tensor:
    """Add the batch's gradient and its metrics to the step's; gives float32[N], the log-probs of its targets.

    `counts` are the whole step's over all ranks: each term is divided by its own, once, so that a step's mean does not
    depend on how it was cut.

    Nothing here may wait for the device: no `.item()`, no `.cpu()`, no shape that depends on values. The host would
    fall behind, and the GPU idle, once per micro-batch.
    """
    watchdog.move()
    token_logps = engine(batch)
    outcome = objective(token_logps, batch)
    terms = [weight * term.total / counts.denominator(term.unit) for weight, term in outcome.loss.values()]
    loss = fault.spoil(torch.stack(terms).sum())
    engine.backward(loss, last=last)
    means = {name: term.total.detach() / counts.denominator(term.unit) for name, term in outcome.metrics.items()}
    sums.losses.append(loss.detach())
    sums.add({"loss": loss.detach()} | means)
    return token_logps.detach()
