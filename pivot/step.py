"""One micro-batch of an optimizer step: forward, objective, backward; the same for training, tests and measurements.

Where the host waits for the GPU. Ours: once an optimizer step (`StepMetrics.reduce`), once more where the step's norms
are measured (`log.every_steps`); the run's first step checks more.
DeepSpeed 0.19.8's own, which no setting of ours takes away:
- each micro-batch, ZeRO-1/2 with overlap_comm: `synchronize()` per reduced bucket and behind each reducing backward;
- each micro-batch, ZeRO-3: the reduction stream behind each backward, and whoever is more than two fetches or two
  reductions ahead;
- each step: `.item()` of the overflow check and of the gradient norm; with offload also the copies of both ways.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from pivot.batch import PackedBatch, StepCounts
from pivot.metrics import StepMetrics
from pivot.objectives import Objective


class Trained(Protocol):
    """What an engine does here: a forward pass, and adding to the step's gradient."""

    def __call__(self, batch: Any) -> Tensor: ...
    def backward(self, loss: Tensor, *, last: bool) -> None: ...


def run_micro_batch(
    engine: Trained,
    objective: Objective,
    batch: PackedBatch,
    reference: Tensor | None,
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
    token_logps = engine(batch)
    outcome = objective(token_logps, batch, reference)
    terms = [weight * term.total / counts.denominator(term.unit) for weight, term in outcome.loss.values()]
    loss = torch.stack(terms).sum()
    engine.backward(loss, last=last)
    means = {name: term.total.detach() / counts.denominator(term.unit) for name, term in outcome.metrics.items()}
    sums.add({"loss": loss.detach()} | means)
    return token_logps.detach()
