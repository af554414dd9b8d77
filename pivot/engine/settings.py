"""What DeepSpeed is told, written out in full: nothing that matters is left to a default (several changed in 2026)."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn
from torch.utils import cpp_extension
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from pivot.config import ConfigError
from pivot.system import watchdog

ONE_SUB_GROUP = 10**12  # ZeRO-3 steps a component in one piece, so that its norms are those of the whole component
NEVER = 10**12
MASTER_BYTES = 4  # of an fp32 copy of a trained weight, which ZeRO 1-3 keep in fp32 runs, too
MOMENT_BYTES = {"adamw": 8, "sgd": 0}  # of a trained weight


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


def require_settings(engine: Any, config: dict[str, Any]) -> None:
    """The built engine must hold what was asked for; a silently dropped key would train something else."""
    zero, stage = config["zero_optimization"], int(engine.zero_optimization_stage())
    model_dtype, accumulation_dtype = engine.get_data_types()
    held = {
        "zero_optimization.stage": (stage, zero.get("stage", 0)),
        "gradient_clipping": (engine.gradient_clipping(), config["gradient_clipping"]),
        "gradient_accumulation_steps": (engine.gradient_accumulation_steps(), 1),
        "bf16.enabled": (model_dtype == torch.bfloat16, config["bf16"]["enabled"]),
        "data_types.grad_accum_dtype": (accumulation_dtype, torch.float32),
        "communication_data_type": (engine.communication_data_type, torch.float32),
        "checkpoint.tag_validation": (engine.checkpoint_tag_validation_fail(), True),
    }
    if stage == 3:
        held["zero_optimization.sub_group_size"] = (engine.zero_sub_group_size(), ONE_SUB_GROUP)
        threshold = zero.get("stage3_param_persistence_threshold")
        held["zero_optimization.stage3_param_persistence_threshold"] = (
            int(engine.zero_param_persistence_threshold()),
            threshold,
        )
    for key, (value, expected) in held.items():
        if value != expected:
            raise RuntimeError(f"DeepSpeed holds {key} = {value}, expected {expected}; write it in the JSON")


def skip_compiling() -> None:
    """Before DeepSpeed's first collective: else it compiles those over shared memory, which only its inference calls.

    That would take a minute and a compiler, and again whenever another environment has been at the same cache.
    """
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False  # reading probes them all


@contextlib.contextmanager
def compiling(key: str) -> Iterator[None]:
    """Inside, DeepSpeed compiles what the JSON's `key` needs, or loads what it compiled before.

    ConfigError where there is no compiler, and where other users may write where the results lie: loading is running.
    """
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    if folder.is_dir() and folder.stat().st_mode & stat.S_IWOTH:
        raise ConfigError(
            f"TORCH_EXTENSIONS_DIR: everybody may write into {folder}, and what lies there would be run; "
            f"chmod o-w {folder}, or set it to a folder of your own"
        )
    try:
        yield
    except Exception as error:
        compiler = os.environ.get("CXX", "c++")
        if shutil.which(compiler) is not None:
            raise
        raise ConfigError(
            f"deepspeed: {key} needs a C++ compiler for what DeepSpeed compiles at its first use, and {compiler} is "
            "not on PATH; install one (g++), or take ds_configs/zero3.json"
        ) from error


@contextlib.contextmanager
def sharded_loading(config: dict[str, Any]) -> Iterator[None]:
    """Under ZeRO-3, transformers' from_pretrained partitions the weights over the ranks while it loads them."""
    if config["zero_optimization"].get("stage", 0) != 3:
        yield
        return
    skip_compiling()
    alive = HfDeepSpeedConfig(config)  # transformers holds it weakly
    try:
        yield
    finally:
        del alive
        unset_hf_deepspeed_config()


def gathered(parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager:
    """The full values of partitioned parameters on every rank; whole ones stay as they are."""
    watchdog.move()  # a large model is loaded, and written, tensor by tensor
    return deepspeed.zero.GatheredParameters([p for p in parameters if hasattr(p, "ds_id")])
