"""What must hold before a preference run may train: margins of zero at the start, and a gradient for every parameter.

A first loss that is not ln 2 means that policy and reference are not the same model, tokens or template; public
threads are full of runs that trained on for days like that.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pivot.batch import REFERENCE, PackedBatch
from pivot.data.plan import Plan
from pivot.data.reference_cache import ReferenceCache, Score
from pivot.startup.inputs import Inputs
from pivot.step import StepSource
from pivot.system import distributed

FP32_MARGIN = 1e-4  # of a reward margin; the rounding of a few hundred summed log-probs stays below a tenth of it
REPACKING_FACTOR = 4.0  # bf16: times what another packing of the same pairs changes
REPACKED_PAIRS = 32


@torch.no_grad()
def margin_tolerance(
    inputs: Inputs, open_source: Callable[[Plan], StepSource], score: Score, reference: ReferenceCache
) -> float | None:
    """How far a first margin may be from 0: rounding in fp32, in bf16 a multiple of what repacking changes. Collective.

    None where the run does not start from its reference. In bf16 some pairs of the reference are scored again, in
    another packing than the one they were scored in.
    """
    scale = inputs.objective.margin_scale
    if scale is None or inputs.objective.reference_folder is not None:
        return None
    if inputs.dtype == torch.float32:
        return FP32_MARGIN
    worst = torch.zeros(())
    for _, micro_batches in open_source(_repack(inputs.plan)):
        for batch in micro_batches:
            logps = batch.completion_logps(score(batch).float().cpu())
            worst = torch.maximum(worst, ((logps - reference.lookup(batch)) * batch.completion_weight).abs().max())
    noise = scale * max(distributed.gather(float(worst)))
    return max(FP32_MARGIN, REPACKING_FACTOR * 2 * noise)  # a margin is a difference of two completions


def _repack(plan: Plan) -> Plan:
    """A walk over REPACKED_PAIRS of them, in rows as short as may be."""
    lengths, limit = plan.lengths, min(REPACKED_PAIRS, plan.num_pairs)
    longest = int((lengths.prompt + lengths.completion_tokens(plan.roles))[plan.kept].max())
    return plan.another(limit=limit, global_batch_size=limit, max_tokens_per_micro_batch=longest, image_trees=False)


def start_margins(batch: PackedBatch, token_logps: Tensor) -> Tensor:
    """float32[..]: (policy - reference) of chosen minus the same of rejected, 0 for masked pairs; then that of each
    completion without a partner, alone."""
    change = batch.completion_logps(token_logps) - batch.completion_values[REFERENCE]
    change = torch.where(batch.completion_weight > 0, change, 0.0)
    chosen, rejected = batch.pairs
    alone = torch.ones_like(change, dtype=torch.bool).index_fill(0, torch.cat([chosen, rejected]), False)
    return torch.cat([change[chosen] - change[rejected], torch.where(alone, change, 0.0)])


def require_zero_margins(margins: Tensor, tolerance: float, world: distributed.World) -> None:
    """RuntimeError on every rank unless all start margins, float32[P] on each rank, lie within `tolerance`.

    `margins` are those of `start_margins` in the objective's `margin_scale`.
    """
    worst = torch.tensor([0.0, 0.0], device=world.device, dtype=torch.float64)
    worst[0] = margins.abs().nan_to_num(nan=math.inf).max() if len(margins) else 0.0
    torch.distributed.all_reduce(worst, op=torch.distributed.ReduceOp.MAX)
    if worst[0] > tolerance:
        raise RuntimeError(
            f"start-up self-check: the reward margin of a pair is {float(worst[0]):.3g} before the first update, "
            f"expected 0 within {tolerance:.3g} (so the first sigmoid loss would not be ln 2). Policy and reference "
            "differ: check objective.dpo.reference, or delete the `ref` folder in data.cache_dir to score it anew"
        )


class GradientWatch:
    """Notices which trainable parameters receive a gradient, from now until `require_all`."""

    def __init__(self, model: nn.Module) -> None:
        self._waiting = {name for name, p in model.named_parameters() if p.requires_grad}
        self._hooks = [
            parameter.register_hook(lambda grad, name=name: self._waiting.discard(name))
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]

    def require_all(self) -> None:
        """RuntimeError that names the parameters which a whole step left without a gradient; then stop watching."""
        for hook in self._hooks:
            hook.remove()
        missing = sorted(name for names in distributed.gather(sorted(self._waiting)) for name in names)
        if missing:
            raise RuntimeError(
                f"start-up self-check: {len(set(missing))} trainable tensors got no gradient in the first step "
                f"({', '.join(missing[:3])}, ...); ZeRO-3 would repeat stale gradients for them. Freeze the component "
                "(optim.COMPONENT.lr=null) or choose a model whose forward uses all of its parameters"
            )
