"""Every knob of a run: typed sections, defaults < YAML < `key=value`, checked before any weight loads.

    config = load_config("run.yaml", ["optim.lr=1e-6"], objective="dpo")

An unknown key, a wrong type, an absent learning rate or a contradiction raises ConfigError, a ValueError whose text
names the full key, what was found, what was expected and what to do. Relative paths count from the working directory.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

COMPONENTS = ("vision_tower", "projector", "language_model")
OBJECTIVES = ("sft", "dpo")
REPOSITORY = Path(__file__).resolve().parent.parent


class ConfigError(ValueError):
    """A run's settings are wrong; the text says where, what was found, what was expected, what to do."""


@dataclass
class VisionTowerConfig:
    # Folder, hub id, CONFIG.json (random weights), or open_clip:MODEL[@TAG_OR_FILE]. None: taken from `init_from`.
    path: str | None = None
    layer: int = -2  # index into the hidden states as in HF LLaVA: -2 is the output of the last block but one
    post_norm: bool = False  # apply the encoder's final norm to the features
    cls: str = "drop"  # drop | keep the CLS token's feature
    image_size: int | None = None  # pixels a side; None: the encoder's own


@dataclass
class LanguageModelConfig:
    # Folder, hub id, or CONFIG.json (random weights, tokenizer beside it). None: taken from `init_from`.
    path: str | None = None


@dataclass
class ModelConfig:
    vision_tower: VisionTowerConfig = field(default_factory=VisionTowerConfig)
    projector: str = "mlp2x_gelu"  # mlp2x_gelu | linear (LLaVA's names)
    language_model: LanguageModelConfig = field(default_factory=LanguageModelConfig)


@dataclass
class ImageConfig:
    fit: str = "squash"  # squash | pad | crop: how an image becomes the encoder's square


@dataclass
class TrainSource:
    """One set of `data.train` and how much of it: at most one of the three, and weights for all sets or for none."""

    path: str
    weight: float | None = None  # share of the stream, relative to the other weights
    repeat: float | None = None  # times that each sample comes in an epoch; 0.5: every other epoch
    choose: int | None = None  # samples per epoch, the next ones in the next


@dataclass
class DataConfig:
    # A folder written by `python -m data_tools pack` or its https, s3, gs or hf address; or a list of these and of
    # {path, weight | repeat | choose}: a mixture, exact in every 1,000 samples (see TrainSource).
    train: Any = MISSING
    eval: str | None = None  # held-out pairs in the same form; None: no evaluation
    max_tokens: int = 2048  # image + prompt + longer completion; a longer pair is excluded and counted, never cut
    cache_dir: str | None = None  # side-cars (lengths, reference log-probs); None: beside the set, else output_dir
    exclude: str | None = None  # samples to leave out: a list made by `python -m data_tools exclude`
    shard_cache: str | None = None  # folder for the shards of remote sets; None: `fetched` in cache_dir
    shard_cache_gb: float = 200.0  # the most that it may take
    chat_template: str | None = None  # a Jinja file or text; None: the tokenizer's own
    image: ImageConfig = field(default_factory=ImageConfig)
    workers: int = 2  # loader processes per rank; 0 reads in the training process


@dataclass
class SFTConfig:
    """Negative log-likelihood of the (chosen) completion, mean over the step's target tokens. It has no knobs yet."""


@dataclass
class DPOConfig:
    loss: Any = "sigmoid"  # a name, or a mix {name: weight}; names in objectives/losses.py, and `sft`
    beta: float = 0.1
    reference: str | None = None  # an HF LLaVA folder; None: the weights this run starts from
    label_smoothing: float = 0.0  # share of flipped preferences, for sigmoid and robust
    simpo_gamma: float = 0.5  # SimPO's target margin, nat per token times beta
    bco_shift: str = "none"  # none | running_mean: reward shift of bco_pair


@dataclass
class ObjectiveConfig:
    sft: SFTConfig | None = None
    dpo: DPOConfig | None = None


@dataclass
class ComponentOptimConfig:
    lr: float | None = MISSING  # a number trains the component, null freezes it; it must be said
    weight_decay: float = 0.0
    min_lr_ratio: float = 0.0  # the schedule's floor as a share of lr


@dataclass
class OptimConfig:
    name: str = "adamw"  # adamw | sgd
    lr: float | None = None  # a value for ${optim.lr} to point at; trains nothing by itself
    schedule: str = "cosine"  # cosine | linear | constant, after the warm-up
    warmup_ratio: float = 0.03  # share of all steps
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float = 1.0  # global clipping; 0 switches it off
    vision_tower: ComponentOptimConfig = field(default_factory=ComponentOptimConfig)
    projector: ComponentOptimConfig = field(default_factory=ComponentOptimConfig)
    language_model: ComponentOptimConfig = field(default_factory=ComponentOptimConfig)

    def component(self, name: str) -> ComponentOptimConfig:
        return getattr(self, name)

    def trained(self) -> tuple[str, ...]:
        """The components that a rate was given for."""
        return tuple(name for name in COMPONENTS if self.component(name).lr is not None)


@dataclass
class TrainConfig:
    global_batch_size: int = MISSING  # pairs (SFT: samples) per optimizer step, over all ranks
    max_tokens_per_micro_batch: int = 8192  # row length per rank and micro-step; schedules only, never excludes
    max_steps: int | None = None  # optimizer steps; exactly one of max_steps and num_epochs
    num_epochs: float | None = None
    seed: int = 0
    precision: str = "auto"  # auto | bf16 | fp32; auto: bf16 on GPU, fp32 on CPU
    activation_checkpointing: bool = False  # recompute blocks in backward: less memory, about a third more time
    timeout_s: float = 600.0  # a collective that waits longer ends the run


@dataclass
class CheckpointConfig:
    every_steps: int = 100  # and at the end; 0: only at the end
    keep: int = 2  # newest checkpoints kept
    resume: str = "auto"  # auto: go on where output_dir has a run | required | none: output_dir must be empty


@dataclass
class EvaluateConfig:
    every_steps: int = 0  # 0: only at the end of the run
    num_samples: int = 1000  # the first so many of data.eval in its fixed order
    max_new_tokens: int = 32  # of a generated answer, for samples that carry one


@dataclass
class LogConfig:
    every_steps: int = 1
    tensorboard: bool = False  # write event files to output_dir/tensorboard


@dataclass
class Config:
    output_dir: str = MISSING
    init_from: str | None = None  # an HF LLaVA folder (for example a run's export/) to start from
    init_parts: list[str] | None = None  # of it, take only these components; None: all
    deepspeed: str = "ds_configs/zero2.json"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    log: LogConfig = field(default_factory=LogConfig)


def load_config(path: str | Path, overrides: list[str] | None = None, objective: str | None = None) -> Config:
    """Merge defaults, the YAML at `path` and `key=value` overrides; `objective` is the one the launch script fixes."""
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such file; expected the run's YAML")
    layers = [_load_yaml(path), *(_parse_override(text) for text in overrides or [])]
    merged = OmegaConf.structured(Config)
    sources = [str(path), *(f"command line '{text}'" for text in overrides or [])]
    for layer, source in zip(layers, sources, strict=True):
        if not isinstance(layer, DictConfig):
            raise ConfigError(f"{source}: expected a mapping of keys, found {type(layer).__name__}")
        merged = _merge(merged, layer, source)
    merged = _fix_objective(merged, objective)
    return resolve(merged)


def _load_yaml(path: str | Path) -> Any:
    try:
        return OmegaConf.load(path)
    except Exception as error:  # yaml.YAMLError or OmegaConf's own; naming them would make yaml a dependency of ours
        raise ConfigError(f"{path}: not valid YAML: {error}") from error


def _parse_override(text: str) -> DictConfig:
    if "=" not in text or text.startswith("-"):
        raise ConfigError(f"command line: found '{text}', expected key=value (for example optim.lr=1e-6)")
    return OmegaConf.from_dotlist([text])


def _merge(base: DictConfig, layer: DictConfig, source: str) -> DictConfig:
    unknown = _first_unknown(OmegaConf.to_container(layer, resolve=False), base, "")
    if unknown:
        key, siblings = unknown
        near = difflib.get_close_matches(key.rpartition(".")[2], siblings, n=1, cutoff=0.5)
        hint = f"; did you mean '{near[0]}'?" if near else f"; keys there: {', '.join(sorted(siblings))}"
        raise ConfigError(f"{source}: unknown key '{key}'{hint}")
    try:
        return OmegaConf.merge(base, layer)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        text = str(error).splitlines()[0]
        raise ConfigError(f"{source}: {error.full_key + ': ' if error.full_key else ''}{text}") from error


_FREE_FORM = {"objective.dpo.loss", "data.train"}  # their keys are values, checked where they are used
_OPTIONAL_SECTIONS = {"objective.sft": SFTConfig, "objective.dpo": DPOConfig}


def _first_unknown(found: Any, schema: DictConfig, prefix: str) -> tuple[str, list[str]] | None:
    """The first key of `found` that `schema` lacks, with the keys it could have been."""
    if not isinstance(found, dict):
        return None
    for key, value in found.items():
        full = f"{prefix}{key}"
        if key not in schema.keys():  # noqa: SIM118  (`in` alone is False for a key that is still missing)
            return full, [str(k) for k in schema]
        if full in _FREE_FORM or not isinstance(value, dict):
            continue
        if full in _OPTIONAL_SECTIONS:
            child = OmegaConf.structured(_OPTIONAL_SECTIONS[full])
        elif OmegaConf.is_missing(schema, key) or not isinstance(schema[key], DictConfig):
            continue  # a mapping where a value is expected: the merge says so
        else:
            child = schema[key]
        deeper = _first_unknown(value, child, f"{full}.")
        if deeper:
            return deeper
    return None


def _fix_objective(config: DictConfig, objective: str | None) -> DictConfig:
    """Make exactly one objective present; refuse a YAML written for the other script."""
    present = [name for name in OBJECTIVES if config.objective[name] is not None]
    if len(present) > 1:
        raise ConfigError("objective: both sft and dpo are given; expected one of them, remove the other")
    if objective is None:
        if not present:
            raise ConfigError("objective: none is given; expected objective.sft or objective.dpo")
    elif present and present != [objective]:
        raise ConfigError(
            f"objective.{present[0]} is given, but this script trains {objective}; "
            f"run launch/train_{present[0]}.py, or replace the section by objective.{objective}"
        )
    elif not present:
        section = {"sft": SFTConfig, "dpo": DPOConfig}[objective]
        config.objective[objective] = OmegaConf.structured(section)
    return config


def resolve(config: DictConfig) -> Config:
    """Resolve interpolations, demand every mandatory key, check the values, and give the typed object."""
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise ConfigError(_missing_text(missing))
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        text = str(error).splitlines()[0]
        raise ConfigError(f"{error.full_key or 'config'}: {text}") from error
    typed = OmegaConf.to_object(config)
    assert isinstance(typed, Config)
    _check(typed)
    return typed


def _missing_text(keys: list[str]) -> str:
    rates = [key for key in keys if key.startswith("optim.") and key.endswith(".lr")]
    if rates:
        return f"{rates[0]}: absent; expected a learning rate, or null to freeze the component (none is a default)"
    return f"{keys[0]}: absent; it has no default, set it in the YAML or as {keys[0]}=VALUE"


_CHOICES = {
    "model.vision_tower.cls": ("drop", "keep"),
    "model.projector": ("mlp2x_gelu", "linear"),
    "data.image.fit": ("squash", "pad", "crop"),
    "objective.dpo.bco_shift": ("none", "running_mean"),
    "optim.name": ("adamw", "sgd"),
    "optim.schedule": ("cosine", "linear", "constant"),
    "train.precision": ("auto", "bf16", "fp32"),
    "checkpoint.resume": ("auto", "required", "none"),
}
# key -> (lowest, highest) value, both allowed
_RANGES: dict[str, tuple[float, float]] = {
    "data.max_tokens": (2, float("inf")),
    "data.workers": (0, 256),
    "data.shard_cache_gb": (0.001, float("inf")),
    "objective.dpo.beta": (1e-12, float("inf")),
    "objective.dpo.label_smoothing": (0.0, 0.499999),
    "optim.warmup_ratio": (0.0, 1.0),
    "optim.eps": (1e-20, 1.0),
    "optim.max_grad_norm": (0.0, float("inf")),
    "train.global_batch_size": (1, float("inf")),
    "train.max_tokens_per_micro_batch": (2, float("inf")),
    "train.max_steps": (1, float("inf")),
    "train.num_epochs": (1e-6, float("inf")),
    "train.timeout_s": (1.0, float("inf")),
    "checkpoint.every_steps": (0, float("inf")),
    "checkpoint.keep": (2, float("inf")),  # with 1, the only one may be the one being written
    "evaluate.every_steps": (0, float("inf")),
    "evaluate.num_samples": (1, float("inf")),
    "evaluate.max_new_tokens": (1, float("inf")),
    "log.every_steps": (1, float("inf")),
}
for _component in COMPONENTS:
    _RANGES[f"optim.{_component}.lr"] = (0.0, float("inf"))
    _RANGES[f"optim.{_component}.weight_decay"] = (0.0, float("inf"))
    _RANGES[f"optim.{_component}.min_lr_ratio"] = (0.0, 1.0)


def _lookup(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part) if value is not None else None
    return value


def _check(config: Config) -> None:
    for key, choices in _CHOICES.items():
        value = _lookup(config, key)
        if value is not None and value not in choices:
            raise ConfigError(f"{key}: found '{value}', expected one of {', '.join(choices)}")
    for key, (low, high) in _RANGES.items():
        value = _lookup(config, key)
        if value is not None and not low <= value <= high:
            raise ConfigError(f"{key}: found {value}, expected a value in [{low:g}, {high:g}]")
    _check_contradictions(config)


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
    if config.objective.dpo is not None:
        _check_loss(config.objective.dpo)
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


def find_deepspeed_json(path: str) -> Path:
    """`path` counted from the working directory, else from the repository (so that the default works anywhere)."""
    for candidate in (Path(path), REPOSITORY / path):
        if candidate.is_file():
            return candidate
    raise ConfigError(f"deepspeed: no file {path}; expected a JSON such as ds_configs/zero2.json")


def read_deepspeed_json(path: str) -> dict[str, Any]:
    """The sharding, offload and communication settings; ConfigError when they claim what the run YAML owns."""
    found = find_deepspeed_json(path)
    try:
        settings = json.loads(found.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"deepspeed: {found} is not valid JSON: {error}") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization"), dict):
        raise ConfigError(f"deepspeed: {found}: expected an object with zero_optimization (see ds_configs/)")
    for key in sorted(settings):
        if key in _YAML_OWNS:
            raise ConfigError(f"deepspeed: {found} sets '{key}', which {_YAML_OWNS[key]} owns; remove it there")
    return settings


def to_yaml(config: Config) -> str:
    """The resolved config as YAML; `load_config` reads it back equal."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
