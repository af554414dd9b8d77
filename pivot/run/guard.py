"""Steps that go wrong: one that is not finite is told with its samples, too many in a row end the run, and a loss far
above those of the steps before it is told, too.

    log.jsonl        {"event": "skipped", "step": 3, "reason": "loss", "ranks": [1], "hosts": ["a"], "num_samples": 2}
                     {"event": "spike", "step": 31, "loss": 5.2, "median": 0.71, "limit": 2.3, "samples": [...]}
    skipped.jsonl    a line for each sample that a skipped step is put down to, as data_tools exclude reads it

What a sample's own loss was is worked out afterwards, on the host, from the log-probs of the step: ordinary steps only
keep these and copy what the objective reads, a few small tensors for each micro-batch.
"""

from __future__ import annotations

import copy
import json
import math
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pivot.batch import PackedBatch
from pivot.data.shards import ShardSet
from pivot.objectives import Objective
from pivot.run.log import SKIPPED, RunLog
from pivot.system import distributed
from pivot.system.distributed import World

WINDOW = 100  # steps whose losses a new one is compared to
FEWEST = 20  # of them, before a loss is judged at all
NORMAL = 1.4826  # standard deviations in a median absolute deviation, for normal noise


@dataclass
class Recent:
    """What the steps so far say of the next one. A checkpoint holds it, so that a resumed run tells the same."""

    losses: list[float] = field(default_factory=list)  # of the last WINDOW + 1 steps with an update
    skipped: int = 0  # steps in a row that were not finite, up to now
    suspects: int = 0  # samples that these are put down to

    def resume_from(self, saved: Mapping[str, Any]) -> None:
        """Take over what a checkpoint holds: nothing before there was a guard."""
        self.losses = [float(loss) for loss in saved.get("losses", ())]
        self.skipped, self.suspects = int(saved.get("skipped", 0)), int(saved.get("suspects", 0))


class Limit(NamedTuple):
    """Where a loss begins to be a spike."""

    median: float
    limit: float


def spike_limit(losses: Sequence[float], factor: float) -> Limit | None:
    """The limit behind the last WINDOW `losses`: their median and `factor` robust standard deviations.

    None where there are fewer than FEWEST. The median absolute deviation, unlike the standard deviation, does not grow
    with the spikes that it is to find.
    """
    window = losses[-WINDOW:]
    if len(window) < FEWEST:
        return None
    middle = median(window)
    return Limit(middle, middle + factor * NORMAL * median(abs(loss - middle) for loss in window))


class Kept(NamedTuple):
    """A micro-batch of the step at work."""

    batch: PackedBatch  # what objectives read of it, on the host
    token_logps: Tensor  # float32[N], on the device, as is the loss
    loss: Tensor  # float32[]


class StepGuard:
    """Looks at each finished step of a run."""

    def __init__(
        self,
        folder: Path,
        shards: ShardSet,
        objective: Objective,
        log: RunLog,
        world: World,
        max_skipped: int,  # steps in a row that are not finite
        spike_factor: float,  # robust standard deviations; 0 looks for no spikes
    ) -> None:
        self._folder, self._shards, self._objective, self._log, self._world = folder, shards, objective, log, world
        self._max_skipped, self._spike_factor = max_skipped, spike_factor
        self._kept: list[Kept] = []

    def keep(self, batch: PackedBatch, token_logps: Tensor, loss: Tensor) -> None:
        """Remember a micro-batch of the step at work, on the host, and what the device has of it: the float32[N]
        log-probs of its targets and its loss, for which nothing waits."""
        self._kept.append(Kept(copy_for_scoring(batch), token_logps, loss))

    def check(self, step: int, metrics: Mapping[str, float], recent: Recent) -> None:
        """Judge step `step` (counted from 1) by its metrics, which are those of all ranks. Collective.

        RuntimeError on all ranks once `max_skipped` steps in a row were not finite.
        """
        kept, self._kept = self._kept, []
        loss = metrics["loss"]
        if metrics["skipped_steps"] or not math.isfinite(loss):
            recent.skipped += 1
            recent.suspects += self._tell_skipped(step, "gradient" if math.isfinite(loss) else "loss", kept)
            if recent.skipped >= self._max_skipped:
                raise RuntimeError(self._describe_end(recent))
            return
        recent.skipped = recent.suspects = 0
        limit = self._find_spike(loss, recent.losses)
        if limit is not None:
            self._tell_spike(step, loss, limit, kept)
        recent.losses = [*recent.losses[-WINDOW:], loss]

    def _find_spike(self, loss: float, before: Sequence[float]) -> Limit | None:
        """The limit that `loss` is above, where the step before was below its own: a spike of many steps is one."""
        limit = spike_limit(before, self._spike_factor)
        if not self._spike_factor or limit is None or loss <= limit.limit:
            return None
        last = spike_limit(before[:-1], self._spike_factor)
        return limit if last is None or before[-1] <= last.limit else None

    # -- words -----------------------------------------------------------------------------------------------------

    def _tell_skipped(self, step: int, reason: str, kept: list[Kept]) -> int:
        """Name the samples that the step is put down to: those that `_look_at` suspects, else all. Their number."""
        seen = self._look_at(kept)
        found = [sample for sample in seen if sample["suspect"]] or seen
        ranks = sorted({sample["rank"] for sample in found})
        hosts = sorted({sample["host"] for sample in found})
        path = self._folder / SKIPPED
        if self._world.is_main:
            lines = [{"step": step, "reason": reason} | _without(sample, "loss", "suspect") for sample in found]
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        self._log.event("skipped", step=step, reason=reason, ranks=ranks, hosts=hosts, num_samples=len(found))
        where = f"of rank {', '.join(map(str, ranks))} on {', '.join(hosts)}"
        self._world.say(
            f"skipped    step {step}: its {reason} is not finite; {path} names {len(found)} samples {where}"
        )
        return len(found)

    def _tell_spike(self, step: int, loss: float, limit: Limit, kept: list[Kept]) -> None:
        seen = sorted(self._look_at(kept), key=lambda sample: -sample["loss"])
        samples = [{name: sample[name] for name in ("dataset", "shard", "ordinal", "loss")} for sample in seen]
        self._log.event("spike", step=step, loss=loss, **limit._asdict(), samples=samples)
        worst = (
            f"; its worst sample: {seen[0]['shard']} sample {seen[0]['ordinal']} ({seen[0]['loss']:.4g})"
            if seen
            else ""
        )
        self._world.say(
            f"spike      step {step}: loss {loss:.4g} is above {limit.limit:.4g}, the median is {limit.median:.4g}"
            f"{worst}; log.jsonl names all"
        )

    def _describe_end(self, recent: Recent) -> str:
        return (
            f"{recent.skipped} steps in a row had a loss or gradient that is not finite (train.max_skipped_steps); "
            f"{self._folder / SKIPPED} names the {recent.suspects} samples that they are put down to: look at them, "
            "leave them out (python -m data_tools exclude SET --from that file --out LIST, data.exclude=LIST), or "
            "lower the learning rates; either needs a new output_dir"
        )

    def _look_at(self, kept: list[Kept]) -> list[dict[str, Any]]:
        """Every sample of the step on all ranks: where it was, its name, its own loss, and whether it is suspect.

        Of a micro-batch those are whose own loss or gradient is not finite; all of one whose loss nevertheless is not.
        """
        place = {"rank": self._world.rank, "host": socket.gethostname()}
        own = []
        for number, (batch, token_logps, loss) in enumerate(kept):
            losses = own_losses(self._objective, batch, token_logps.cpu())
            explained = not all(finite for _, _, finite in losses)
            for row, own_loss, finite in losses:
                suspect = not finite or not (explained or loss.isfinite())
                facts = {"micro_batch": number, "loss": own_loss, "suspect": bool(suspect)}
                own.append(place | facts | self._shards.address(row))
        return [sample for rank in distributed.gather(own) for sample in rank]


def copy_for_scoring(batch: PackedBatch) -> PackedBatch:
    """What objectives read of a batch on the host, in memory of its own.

    A batch that a loader's worker made lies in memory that both share, with an open file for each of its tensors: those
    of a whole step would be more files than a process may have open.
    """
    kept = copy.copy(batch)
    for name in ("token_ids", "position_ids", "pixel_values", "image_positions", "feature_index"):
        setattr(kept, name, torch.empty(0))  # what the model alone reads
    kept.sample_index = batch.sample_index.clone()
    return kept.move(Tensor.clone)


def own_losses(objective: Objective, batch: PackedBatch, token_logps: Tensor) -> list[tuple[int, float, bool]]:
    """(row of the data set, loss, whether loss and gradient are finite) of each sample of a batch on the host, each as
    if it were a step of its own; without those that are masked."""
    found = []
    for group, row in enumerate(batch.sample_index.tolist()):
        alone = copy.copy(batch)
        alone.completion_weight = torch.where(batch.group == group, batch.completion_weight, 0.0)
        if not alone.completion_weight.any():
            continue
        logps, counts = token_logps.clone().requires_grad_(), alone.counts(objective.roles)
        terms = objective(logps, alone).loss.values()
        loss = torch.stack([weight * term.total / counts.denominator(term.unit) for weight, term in terms]).sum()
        (gradient,) = torch.autograd.grad(loss, logps)
        loss = loss.detach()
        found.append((row, float(loss), bool(loss.isfinite() and gradient.isfinite().all())))
    return found


def _without(sample: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in sample.items() if name not in names}
