"""Whether settings can be: each by what pivot/config.py says of it, those that contradict each other, and the two that
are read further here: the sets of `data.train`, and DeepSpeed's JSON, which may own no number that the YAML owns."""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

from pivot.config import COMPONENTS, KEYS, REPOSITORY, Config, ConfigError, DPOConfig, Key, TrainSource, flatten


def check_config(config: Config) -> None:
    """ConfigError for the first setting that cannot be, or that contradicts another."""
    for name, value in flatten(config).items():
        if value is not None:
            _check_value(KEYS[name], value)
    _check_contradictions(config)


def _check_value(key: Key, value: Any) -> None:
    if key.choices and value not in key.choices:
        raise ConfigError(f"{key.name}: found '{value}', expected one of {', '.join(key.choices)}")
    _require_finite(value, key.name)
    if isinstance(value, int | float) and not key.low <= value <= key.high:
        raise ConfigError(f"{key.name}: found {value}, expected a value in [{key.low:g}, {key.high:g}]")


def _require_finite(value: Any, key: str) -> None:
    """ConfigError for a number, however deep in lists and mappings, that is infinite or not a number."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key}: found {value}, expected a finite number")
    if isinstance(value, dict):
        for name, part in value.items():
            _require_finite(part, f"{key}.{name}")
    if isinstance(value, list | tuple):
        for number, part in enumerate(value):
            _require_finite(part, f"{key}[{number}]")


def read_train_sources(train: Any) -> list[TrainSource]:
    """`data.train` as a list. Raises ConfigError, naming the entry, when it is none of the forms."""
    entries = train if isinstance(train, list) else [train]
    sources = [_read_train_source(entry, f"data.train[{i}]") for i, entry in enumerate(entries)]
    if not sources:
        raise ConfigError("data.train: an empty list; expected at least one folder")
    weighted = [source for source in sources if source.weight is not None]
    if weighted and len(weighted) < len(sources):
        without = next(source.path for source in sources if source.weight is None)
        raise ConfigError(
            f"data.train: {without} has no weight but {weighted[0].path} has; give all of them one, or none"
        )
    return sources


def _read_train_source(entry: Any, where: str) -> TrainSource:
    if isinstance(entry, str) and entry:
        return TrainSource(entry)
    names = [spec.name for spec in fields(TrainSource)]
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or not set(entry) <= set(names):
        raise ConfigError(f"{where}: found {entry!r}, expected a folder, or a mapping of {', '.join(names)}")
    amounts = {name: value for name, value in entry.items() if name != "path" and value is not None}
    if len(amounts) > 1:
        raise ConfigError(f"{where}: found {' and '.join(amounts)}; expected one of weight, repeat, choose")
    for name, value in amounts.items():
        wanted = "a whole number" if name == "choose" else "a number"
        if isinstance(value, bool) or not isinstance(value, int if name == "choose" else int | float) or value <= 0:
            raise ConfigError(f"{where}.{name}: found {value!r}, expected {wanted} above 0")
    return TrainSource(**entry)


def _check_contradictions(config: Config) -> None:
    read_train_sources(config.data.train)
    for number, beta in enumerate(config.optim.betas):
        if not 0 <= beta < 1:
            raise ConfigError(f"optim.betas[{number}]: found {beta}, expected a share of at least 0 and below 1")
    if not config.optim.trained():
        raise ConfigError("optim: every component's lr is null, nothing would train; give at least one a rate")
    if (config.train.max_steps is None) == (config.train.num_epochs is None):
        raise ConfigError("train: expected exactly one of max_steps and num_epochs")
    if config.init_parts is not None:
        if config.init_from is None:
            raise ConfigError("init_parts: given without init_from; say which folder the parts come from")
        for part in config.init_parts:
            if part not in COMPONENTS:
                raise ConfigError(f"init_parts: found '{part}', expected some of {', '.join(COMPONENTS)}")
    taken = () if config.init_from is None else tuple(config.init_parts or COMPONENTS)
    for component in ("vision_tower", "language_model"):
        if component not in taken and getattr(config.model, component).path is None:
            raise ConfigError(f"model.{component}.path: absent; give it, or an init_from folder that holds the part")
    every, for_ever = config.checkpoint.every_steps, config.checkpoint.keep_every_steps
    if for_ever is not None and (every == 0 or for_ever % every):
        raise ConfigError(
            f"checkpoint.keep_every_steps: found {for_ever}, expected a multiple of checkpoint.every_steps ({every}); "
            "at other steps there is no checkpoint to keep"
        )
    if config.objective.dpo is not None:
        _check_loss(config.objective.dpo)
    compare = config.log.compare
    if compare is not None and compare.flops is compare.samples is compare.gpu_hours is None:
        raise ConfigError(f"log.compare: '{compare.name}' has no number; give flops, samples or gpu_hours of it")
    read_deepspeed_json(config.deepspeed)


def _check_loss(dpo: DPOConfig) -> None:
    if isinstance(dpo.loss, str):
        return
    if not isinstance(dpo.loss, dict) or not dpo.loss:
        raise ConfigError(f"objective.dpo.loss: found {dpo.loss!r}, expected a name or a mapping name: weight")
    for name, weight in dpo.loss.items():
        if not isinstance(weight, int | float) or isinstance(weight, bool) or weight < 0:
            hint = f"; put a space behind the colon: {name.replace(':', ': ')}" if ":" in str(name) else ""
            raise ConfigError(f"objective.dpo.loss.{name}: found {weight!r}, expected a weight of 0 or more{hint}")


# What the run YAML owns. A DeepSpeed JSON that names one of these would be a second owner of the same number.
_YAML_OWNS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.max_tokens_per_micro_batch",
    "gradient_accumulation_steps": "train.max_tokens_per_micro_batch",
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "activation_checkpointing": "train.activation_checkpointing",
}


# What else it may say. DeepSpeed passes over names that it does not know; the rest is fixed in engine/settings.py.
_OF_DEEPSPEED = (
    "zero_optimization",
    "communication_data_type",
    "aio",
    "comms_logger",
    "flops_profiler",
    "memory_breakdown",
    "dump_state",
    "csv_monitor",
    "tensorboard",
    "wandb",
    "comet",
)


def _find_deepspeed_json(path: str) -> Path:
    """`path` counted from the working directory, else from the repository (so that the default works anywhere)."""
    for candidate in (Path(path), REPOSITORY / path):
        if candidate.is_file():
            return candidate
    raise ConfigError(f"deepspeed: no file {path}; expected a JSON such as ds_configs/zero2.json")


def read_deepspeed_json(path: str) -> dict[str, Any]:
    """The sharding, offload and communication settings; ConfigError when they claim what the run YAML owns."""
    file = _find_deepspeed_json(path)
    try:
        settings = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"deepspeed: {file} is not valid JSON: {error}") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization"), dict):
        raise ConfigError(f"deepspeed: {file}: expected an object with zero_optimization (see ds_configs/)")
    for key in sorted(settings):
        if key in _YAML_OWNS:
            raise ConfigError(f"deepspeed: {file} sets '{key}', which {_YAML_OWNS[key]} owns; remove it there")
        if key not in _OF_DEEPSPEED:
            near = difflib.get_close_matches(key, _OF_DEEPSPEED, n=1, cutoff=0.8)
            hint = f"did you mean '{near[0]}'?" if near else f"expected some of {', '.join(_OF_DEEPSPEED)}"
            raise ConfigError(f"deepspeed: {file}: unknown key '{key}'; {hint}")
    return settings
