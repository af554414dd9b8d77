"""An optimizer step on DeepSpeed: forward, backward, update, one parameter group per component; and its state.

The loss is scaled here and nowhere else: the caller hands over sums divided by the step's *global* counts, and
DeepSpeed's own division by the accumulation is switched off.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from pivot.config import COMPONENTS, OptimConfig
from pivot.engine.files import Write, handed_to, inert_loading, unknown_classes
from pivot.engine.reshape import load_reshaped
from pivot.engine.settings import MASTER_BYTES, MOMENT_BYTES, compiling, gathered, require_settings, skip_compiling
from pivot.metrics import ComponentMeter
from pivot.system.distributed import World, any_rank

WHOLE_WEIGHTS_SHARE = 0.5  # of a GPU's free memory that `Engine.whole_weights` may take
WHOLE_WEIGHTS_ON_CPU = 4 * 2**30  # bytes a rank


class Engine:
    """A DeepSpeed engine around `model`: `forward`, `backward`, `step`, `measure`, state in and out.

    `model` has the children named in COMPONENTS; those in `optim.trained()` train, the others are frozen here.
    `schedule(step, min_lr_ratio)` gives the factor on each component's rate.
    """

    def __init__(
        self,
        model: nn.Module,
        config: dict[str, Any],
        optim: OptimConfig,
        schedule: Callable[[int, float], float],
        world: World,
    ) -> None:
        self.model = model
        self.world = world
        self._optim = optim
        self._schedule = schedule
        self._meter = ComponentMeter(optim.name)
        groups = _parameter_groups(model, optim)
        self._trained: list[list[nn.Parameter]] = [group["params"] for group in groups]  # DeepSpeed empties its own
        self._optimizer = _build_optimizer(groups, optim, config)
        self._optimizer.register_step_post_hook(self._meter.observe)
        logging.getLogger("DeepSpeed").setLevel(os.environ.get("PIVOT_DEEPSPEED_LOG", "WARNING"))
        skip_compiling()
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=self._optimizer, config=config)
        self.stage = int(self._engine.zero_optimization_stage())
        self.dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
        for module in model.modules():
            if hasattr(module, "adds_in_place"):  # see pivot.models.head: ZeRO takes `.grad` away into its buckets
                module.adds_in_place = self.stage == 0  # type: ignore[assignment]  # nn.Module knows no bool
        if self.stage == 0 and world.size == 1:
            self._engine.enable_backward_allreduce = False  # it would copy every gradient into buckets and back
        require_settings(self._engine, config)

    # -- the step ------------------------------------------------------------------------------------------------

    def __call__(self, batch: Any) -> Tensor:
        return self._engine(batch)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of `loss`, this rank's share of the step's mean; `last` marks the step's last micro-batch.

        DeepSpeed averages over ranks, so the share is multiplied by their number: the step's gradient is the sum of
        all shares, whatever the split into micro-batches and ranks.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.world.size, scale_wrt_gas=False)

    def step(self, step: int, *, measure: bool) -> dict[str, float]:
        """Update the weights for optimizer step `step`: lr per component, and with `measure` `ComponentMeter.norms`.

        A gradient that is not finite, on whichever rank, changes nothing on any: `skipped_steps` is 1 then.
        """
        metrics: dict[str, float] = {f"lr/{name}": rate for name, rate in self._set_rates(step).items()}
        self._meter.start(enabled=measure)
        if self.stage == 0 and self._skip_at_stage_0():
            metrics["skipped_steps"] = 1
        else:
            if self.stage == 0 and measure:
                self._meter.observe_full_gradients(self._engine.optimizer.param_groups)
            before = self._engine.skipped_steps
            self._engine.step()
            metrics["skipped_steps"] = self._engine.skipped_steps - before
        total_norm = self._engine.get_global_grad_norm()
        return metrics | self._meter.norms(self.world, partitioned=self.stage > 0, total_norm=total_norm)

    def _skip_at_stage_0(self) -> bool:
        """Drop a gradient that is not finite; the other stages' optimizers do so themselves, ZeRO-0 has none."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        skip = any_rank(not math.isfinite(nn.utils.get_total_norm(gradients)), self.world.device)
        if skip:
            self._engine.zero_grad()
        return skip

    def _set_rates(self, step: int) -> dict[str, float]:
        """Write the rates of `step` into the groups: a function of the step alone, so a resume cannot lose it."""
        rates = {}
        for group in self._engine.optimizer.param_groups:
            component = self._optim.component(group["component"])
            assert component.lr is not None  # frozen components have no group
            group["lr"] = rates[group["component"]] = component.lr * self._schedule(step, component.min_lr_ratio)
            group["weight_decay"] = component.weight_decay
        return rates

    # -- state ---------------------------------------------------------------------------------------------------

    def save(self, folder: Path, tag: str, write: Write) -> None:
        """Hand this rank's files of weights and optimizer state, below folder/tag, to `write`. Collective."""
        with handed_to(write, self._engine):
            self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False, client_state={})

    def load(self, folder: Path, tag: str) -> None:
        """Restore what `save` wrote; RuntimeError when DeepSpeed finds nothing (it only warns), ValueError when a file
        would have to run code."""
        try:
            with inert_loading():
                path, _ = self._engine.load_checkpoint(str(folder), tag=tag)
        except pickle.UnpicklingError as error:
            named = re.search(r"GLOBAL ([\w.]+)", str(error))  # the rest of it advises to load the file all the same
            what = named[1] if named else "something else than tensors and plain values"
            raise ValueError(f"{folder / tag}: a file holds {what}, which training never writes there") from error
        if path is None:
            raise RuntimeError(f"{folder / tag}: DeepSpeed loaded nothing; the checkpoint is not one of this stage")

    def load_reshaped(self, folder: Path) -> None:
        """Restore what another number of ranks or another ZeRO stage wrote: see reshape.py."""
        load_reshaped(folder, self._engine, self._optimizer, self._trained, self.world)

    def unknown_classes(self, path: Path) -> list[str]:
        """What a file of a checkpoint names that training never writes: see files.py."""
        return unknown_classes(path)

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether all weights and the optimizer's state are, on every rank. Collective; reads each share once."""
        tensors = [getattr(parameter, "ds_tensor", parameter) for parameter in self.model.parameters()]
        for master, state in self._optimizer.state.items():
            tensors += [master, *(value for value in state.values() if torch.is_tensor(value))]
        highest = (torch.linalg.vector_norm(t.detach(), math.inf) for t in tensors if t.numel())  # NaN where one is
        return not any_rank(not all(math.isfinite(value) for value in highest), self.world.device)

    def state_dict(self) -> dict[str, Tensor]:
        """The whole model on rank 0's CPU, one tensor at a time, tied ones once each; empty elsewhere. Collective."""
        whole: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            with gathered([parameter]):
                if self.world.is_main:
                    whole[name] = parameter.detach().to("cpu", copy=True)
        if self.world.is_main:
            persistent = self.model.state_dict(keep_vars=True)
            whole |= {n: b.detach().to("cpu", copy=True) for n, b in persistent.items() if not _is_parameter(b)}
        return whole

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[bool]:
        """Let every rank run `model` on its own, as often as it likes, where the weights fit. Collective at both ends.

        ZeRO-3 would gather each weight again for each forward, that is for each token of an answer. Gives False where
        the weights stay partitioned and all ranks must go on running equally many forwards.
        """
        parameters = list(self.model.parameters())
        if self.stage < 3 or not self._fits_whole(parameters):
            yield self.stage < 3
            return
        offload = self._engine.optimizer.parameter_offload
        with gathered(parameters):
            offload._remove_module_hooks()  # they would let go of each weight behind the module that used it
            offload.forward_hooks, offload.backward_hooks = [], []
            try:
                yield True
            finally:
                offload.setup_zero_stage3_hooks()

    def _fits_whole(self, parameters: list[nn.Parameter]) -> bool:
        size = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in parameters)
        room: float = WHOLE_WEIGHTS_ON_CPU
        if self.world.device.type == "cuda":
            room = WHOLE_WEIGHTS_SHARE * torch.cuda.mem_get_info(self.world.device)[0]
        return not any_rank(size > room, self.world.device)

    def checkpoint_bytes(self) -> tuple[int, int]:
        """About what `save` hands over: of rank 0 alone, and of all ranks together, each its share."""
        master = MASTER_BYTES if self.stage > 0 else 0
        weights = states = 0
        for parameter in self.model.parameters():
            size = getattr(parameter, "ds_numel", parameter.numel())
            is_master_alone = self.stage == 3 and parameter.requires_grad
            weights += size * parameter.element_size() * (not is_master_alone)
            states += size * (master + MOMENT_BYTES[self._optim.name]) * parameter.requires_grad
        if self.stage == 0:
            return weights + states, 0
        return (0, weights + states) if self.stage == 3 else (weights, states)

    # -- facts ---------------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """What the log's first row says about the engine."""
        parameters = list(self.model.parameters())
        return {
            "zero_stage": self.stage,
            "persistence_threshold": getattr(self._engine.optimizer, "_param_persistence_threshold", None)
            if self.stage < 3
            else int(self._engine.zero_param_persistence_threshold()),
            "num_persistent_parameters": sum(bool(getattr(p, "ds_persist", False)) for p in parameters),
            "num_partitioned_parameters": sum(hasattr(p, "ds_id") for p in parameters),
            "deepspeed_optimizer": type(self._engine.optimizer).__name__,
        }


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def _parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """One group per trained component (an empty one would crash DeepSpeed's schedule); the others get no gradient."""
    groups: list[dict[str, Any]] = []
    for name in COMPONENTS:
        parameters = list(model.get_submodule(name).parameters())
        component = optim.component(name)
        for parameter in parameters:
            parameter.requires_grad_(component.lr is not None)
        if component.lr is not None:
            rate, decay = component.lr, component.weight_decay
            groups.append({"params": parameters, "component": name, "lr": rate, "weight_decay": decay})
    return groups


def _build_optimizer(groups: list[dict[str, Any]], optim: OptimConfig, config: dict[str, Any]) -> torch.optim.Optimizer:
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0)
    offload = config["zero_optimization"].get("offload_optimizer", {}).get("device", "none")
    if offload == "cpu":
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiled at first use, about a minute

        with compiling("offload_optimizer"):
            return DeepSpeedCPUAdam(groups, lr=0.0, betas=optim.betas, eps=optim.eps, adamw_mode=True)
    # Fused on every device: one pass over weights, gradients and moments (on the CPU a third of the time). The weights
    # may still lie on the CPU here, DeepSpeed moves them.
    return torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, eps=optim.eps, fused=True)
