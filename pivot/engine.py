"""The only file that knows DeepSpeed: its config written out in full, one parameter group per component, one step.

Nothing of what matters is left to a default (several changed in 2026); `Engine` checks them on the built engine.
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
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor, nn
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from pivot.config import COMPONENTS, ConfigError, OptimConfig
from pivot.metrics import ComponentMeter
from pivot.run.zero_files import MASTER as MASTER_WEIGHTS
from pivot.run.zero_files import SavedShards
from pivot.startup.memory import MASTER, MOMENTS
from pivot.system.distributed import World, any_rank

ONE_SUB_GROUP = 10**12  # ZeRO-3 steps a component in one piece, so that its norms are those of the whole component
NEVER = 10**12
WHOLE_WEIGHTS_SHARE = 0.5  # of a GPU's free memory that `Engine.whole_weights` may take
WHOLE_WEIGHTS_ON_CPU = 4 * 2**30  # bytes a rank


def build_deepspeed_config(settings: dict[str, Any], *, max_grad_norm: float, bf16: bool) -> dict[str, Any]:
    """`ds_configs/*.json` plus what the run YAML owns, with no DeepSpeed default left that could change results."""
    stage = settings["zero_optimization"].get("stage", 0)
    if bf16 and stage == 0:
        raise ConfigError(
            "deepspeed: ZeRO stage 0 has no fp32 gradient accumulation for bf16 weights; "
            "use ds_configs/zero1.json (on one rank it is the same arithmetic), or train.precision=fp32"
        )
    return settings | {
        "train_micro_batch_size_per_gpu": 1,  # rows; their length is the plan's business
        "gradient_accumulation_steps": 1,  # the plan owns it: see Engine.backward
        "gradient_clipping": max_grad_norm,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"tag_validation": "Fail"},
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
    }


def _skip_compiling() -> None:
    """Before DeepSpeed's first collective: else it compiles those over shared memory, which only its inference calls.

    That would take a minute and a compiler, and again whenever another environment has been at the same cache.
    """
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False  # reading probes them all


@contextlib.contextmanager
def sharded_loading(config: dict[str, Any]) -> Iterator[None]:
    """Under ZeRO-3, transformers' from_pretrained partitions the weights over the ranks while it loads them."""
    if config["zero_optimization"].get("stage", 0) != 3:
        yield
        return
    _skip_compiling()
    alive = HfDeepSpeedConfig(config)  # transformers holds it weakly
    try:
        yield
    finally:
        del alive
        unset_hf_deepspeed_config()


_IN_DEEPSPEEDS_FILES = [LossScaler, ZeroStageEnum, fragment_address]  # its classes there, plain data all of them
_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextlib.contextmanager
def _inert_loading() -> Iterator[None]:
    """torch.load builds tensors, plain values and DeepSpeed's few classes, and calls nothing that a file names.

    DeepSpeed asks for weights_only=False wherever it loads; torch lets the environment overrule every caller.
    """
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals(_IN_DEEPSPEEDS_FILES):
            yield
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def gathered(parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager:
    """The full values of partitioned parameters on every rank; whole ones stay as they are."""
    return deepspeed.zero.GatheredParameters([p for p in parameters if hasattr(p, "ds_id")])


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
        _skip_compiling()
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=self._optimizer, config=config)
        self.stage = int(self._engine.zero_optimization_stage())
        self.dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
        for module in model.modules():
            if hasattr(module, "adds_in_place"):  # see pivot.models.head: ZeRO takes `.grad` away into its buckets
                module.adds_in_place = self.stage == 0  # type: ignore[assignment]  # nn.Module knows no bool
        if self.stage == 0 and world.size == 1:
            self._engine.enable_backward_allreduce = False  # it would copy every gradient into buckets and back
        self._require_settings(config)

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

    def save(self, folder: Path, tag: str) -> None:
        """Write this rank's share of weights and optimizer state below folder/tag; publishing it is the caller's."""
        self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False, client_state={})

    def load(self, folder: Path, tag: str) -> None:
        """Restore what `save` wrote; RuntimeError when DeepSpeed finds nothing (it only warns), ValueError when a file
        would have to run code."""
        try:
            with _inert_loading():
                path, _ = self._engine.load_checkpoint(str(folder), tag=tag)
        except pickle.UnpicklingError as error:
            named = re.search(r"GLOBAL ([\w.]+)", str(error))  # the rest of it advises to load the file all the same
            what = named[1] if named else "something else than tensors and plain values"
            raise ValueError(f"{folder / tag}: a file holds {what}, which training never writes there") from error
        if path is None:
            raise RuntimeError(f"{folder / tag}: DeepSpeed loaded nothing; the checkpoint is not one of this stage")

    @torch.no_grad()
    def load_reshaped(self, folder: Path) -> None:
        """Restore a checkpoint that another number of ranks or another ZeRO stage wrote, bit by bit. Collective.

        Each rank maps all shards and takes its own part, a parameter at a time, so that no second copy of the model
        comes into memory. Rates, decay and betas are those of the config, as ever: of a checkpoint none count.
        ValueError where the shards are not of this model; RuntimeError where DeepSpeed holds other weights afterwards.
        """
        if self.stage == 0:
            raise ValueError(f"{folder}: only ZeRO-1, 2 and 3 can take over the shards of others; set deepspeed to one")
        with _inert_loading():
            saved = SavedShards(folder, lambda path: torch.load(path, map_location="cpu", mmap=True))
        name_of = {parameter: name for name, parameter in self.model.named_parameters()}
        _require_same_parameters(saved, [name_of[parameter] for group in self._trained for parameter in group])
        for index, (parameters, master) in enumerate(zip(self._trained, self._masters(), strict=True)):
            moments = {kind: torch.zeros_like(master) for kind in saved.kinds if kind != MASTER_WEIGHTS}
            for parameter, own, place in self._placements(parameters):
                for kind, target in ({MASTER_WEIGHTS: master} | moments).items():
                    values = saved.read(name_of[parameter], kind)[own]
                    target[place.start : place.start + len(values)].copy_(values)
            if moments:
                counted = saved.num_updates(index)
                is_tensor = isinstance(self._optimizer, torch.optim.AdamW)  # DeepSpeed's counts in a plain number
                step = torch.tensor(float(counted), device=master.device) if is_tensor else counted
                self._optimizer.state[master] = {"step": step, **moments}
        for name, parameter in self.model.named_parameters():
            whole = saved.read(name, MASTER_WEIGHTS) if parameter.requires_grad else saved.read_frozen(name)
            if whole is not None:
                self._set_weights(name, parameter, whole)

    def _masters(self) -> list[Tensor]:
        """This rank's flat fp32 part of each trained component, by the names that DeepSpeed's optimizers give it."""
        optimizer = self._engine.optimizer
        for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            if hasattr(optimizer, name):
                return getattr(optimizer, name)
        raise RuntimeError(
            f"DeepSpeed {deepspeed.__version__}'s {type(optimizer).__name__} keeps its master weights elsewhere than "
            "known; go on with the number of ranks and the ZeRO stage before"
        )

    def _placements(self, parameters: list[Any]) -> Iterator[tuple[Any, slice, slice]]:
        """(parameter, which of its elements this rank keeps, where they lie in the rank's flat part of the group)."""
        start = 0
        for parameter in parameters:
            if self.stage == 3:  # every parameter is cut into equal parts, the last one padded
                part = -(-parameter.ds_numel // self.world.size)
                own, place = slice(part * self.world.rank, part * (self.world.rank + 1)), slice(start, start + part)
                start += part
            elif parameter._hp_mapping is None:  # none of it is this rank's
                continue
            else:
                inside, flat = parameter._hp_mapping.lp_fragment_address, parameter._hp_mapping.hp_fragment_address
                own = slice(inside.start, inside.start + inside.numel)
                place = slice(flat.start, flat.start + flat.numel)
            yield parameter, own, place

    def _set_weights(self, name: str, parameter: Any, values: Tensor) -> None:
        """Set a whole weight, [numel], and see that its master, where it has one, is the same."""
        partitioned = hasattr(parameter, "ds_id")
        shape = parameter.ds_shape if partitioned else parameter.shape
        with deepspeed.zero.GatheredParameters([parameter] if partitioned else [], modifier_rank=0):
            if not partitioned or self.world.is_main:
                parameter.data.copy_(values.view(shape))
        if parameter.requires_grad:
            held = deepspeed.utils.safe_get_full_fp32_param(parameter)
            if held is None or not torch.equal(held.flatten().cpu(), values):
                raise RuntimeError(
                    f"{name}: DeepSpeed {deepspeed.__version__} holds another master weight than the checkpoint's, so "
                    "its parts lie elsewhere than expected; go on with the number of ranks and the ZeRO stage before"
                )

    def unknown_classes(self, path: Path) -> list[str]:
        """What a file of torch.save names beyond tensors, plain values and DeepSpeed's own; nothing of it is run."""
        try:
            with _inert_loading():
                return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        except (ValueError, RuntimeError, pickle.UnpicklingError) as error:
            return [f"no file of torch.save ({str(error).splitlines()[0]})"]

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

    def checkpoint_bytes(self) -> int:
        """About what `save` writes over all ranks: weights, fp32 masters of the trained ones, and their moments."""
        master = MASTER if self.stage > 0 else 0
        size = 0
        for parameter in self.model.parameters():
            trained = (master + MOMENTS[self._optim.name]) * parameter.requires_grad
            is_master_alone = self.stage == 3 and parameter.requires_grad
            kept = 0 if is_master_alone else parameter.element_size()
            size += getattr(parameter, "ds_numel", parameter.numel()) * (kept + trained)
        return size

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

    def _require_settings(self, config: dict[str, Any]) -> None:
        """The built engine must hold what was asked for; a silently dropped key would train something else."""
        engine, zero = self._engine, config["zero_optimization"]
        model_dtype, accumulation_dtype = engine.get_data_types()
        held = {
            "zero_optimization.stage": (self.stage, zero.get("stage", 0)),
            "gradient_clipping": (engine.gradient_clipping(), config["gradient_clipping"]),
            "gradient_accumulation_steps": (engine.gradient_accumulation_steps(), 1),
            "bf16.enabled": (model_dtype == torch.bfloat16, config["bf16"]["enabled"]),
            "data_types.grad_accum_dtype": (accumulation_dtype, torch.float32),
            "communication_data_type": (engine.communication_data_type, torch.float32),
            "checkpoint.tag_validation": (engine.checkpoint_tag_validation_fail(), True),
        }
        if self.stage == 3:
            held["zero_optimization.sub_group_size"] = (engine.zero_sub_group_size(), ONE_SUB_GROUP)
            threshold = zero.get("stage3_param_persistence_threshold")
            held["zero_optimization.stage3_param_persistence_threshold"] = (
                int(engine.zero_param_persistence_threshold()),
                threshold,
            )
        for key, (value, expected) in held.items():
            if value != expected:
                raise RuntimeError(f"DeepSpeed holds {key} = {value}, expected {expected}; write it in the JSON")


def _require_same_parameters(saved: SavedShards, trained: list[str]) -> None:
    unlike = sorted(set(saved.names) ^ set(trained))
    if unlike:
        raise ValueError(
            f"{saved.folder}: its shards train {len(saved.names)} parameters, this run {len(trained)}; the first that "
            f"only one of them has is {unlike[0]}"
        )


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

        return DeepSpeedCPUAdam(groups, lr=0.0, betas=optim.betas, eps=optim.eps, adamw_mode=True)
    # Fused on every device: one pass over weights, gradients and moments (on the CPU a third of the time). The weights
    # may still lie on the CPU here, DeepSpeed moves them.
    return torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, eps=optim.eps, fused=True)


def learning_rate_factor(step: int, floor: float, *, total_steps: int, warmup_ratio: float, schedule: str) -> float:
    """The factor on the peak rate at optimizer step `step` (from 0): a linear warm-up, then down to `floor`.

    The warm-up takes ceil(warmup_ratio * total_steps) steps and its first step is not zero: no step is wasted.
    """
    warmup_steps = math.ceil(warmup_ratio * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "cosine":
        decay = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))  # arxiv.org/abs/1608.03983, eq. 5
    elif schedule == "linear":
        decay = 1.0 - min(1.0, progress)
    else:
        decay = 1.0
    return floor + (1.0 - floor) * decay
