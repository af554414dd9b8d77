"""Every knob of a run. One place says all of a key: its type, its default, what it means with its unit, which values it
may have, and who may change it.

    name: type = key(DEFAULT, TEXT, choices=(...), low=1, high=9, resume=True, ranks=True)

`MISSING` stands where there is no safe default: the run's YAML has to say it. Relative paths count from the working
directory. Loading (`pivot.config_load`), checking (`pivot.config_check`), `--help`, and what a resume or another
machine may change all read `KEYS`, the list at the end; a key is named nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from math import inf
from pathlib import Path
from typing import Any, ClassVar, get_args, get_type_hints

MISSING: Any = "???"  # OmegaConf's own sign, so that this file needs no package
COMPONENTS = ("vision_tower", "projector", "language_model")
REPOSITORY = Path(__file__).resolve().parent.parent


class ConfigError(ValueError):
    """A run's settings are wrong; the text says where, what was found, what was expected, what to do."""


def key(
    default: Any,
    text: str,
    *,
    choices: tuple[str, ...] = (),
    low: float = -inf,
    high: float = inf,
    resume: bool = False,
    ranks: bool = False,
) -> Any:
    """A setting. `choices`: the texts it may be; `low` and `high`: the numbers between which it may lie, both included.

    `resume`: a resumed run may change it, since it does not decide which numbers a step computes. `ranks`: the machines
    of a run may each have their own, since it decides no number at all and no step waits for it elsewhere.
    """
    said = {"text": text, "choices": choices, "low": low, "high": high, "resume": resume, "ranks": ranks}
    return field(default=default, metadata=said)


def section(kind: type, *, optional: bool = False, resume: bool = False) -> Any:
    """A group of settings, whose text is the docstring of `kind`. `optional`: it is absent (null) unless it is given;
    `resume`: a resumed run may change all of it."""
    said = {"text": kind.__doc__, "resume": resume}
    return field(default=None, metadata=said) if optional else field(default_factory=kind, metadata=said)


@dataclass
class VisionTowerConfig:
    """The image encoder."""

    path: str | None = key(
        None,
        "folder, hub id, CONFIG.json (random weights), open_clip:MODEL[@TAG_OR_FILE], or timm:MODEL[@FILE] (timm's "
        "local-dir:FOLDER and hf-hub:ID count as MODEL); null: taken from init_from",
    )
    layer: int = key(
        -2, "index into the hidden states as in HF LLaVA: -2 is the output of the last block (ConvNeXt: stage) but one"
    )
    post_norm: bool = key(False, "apply the encoder's final norm to the features")
    cls: str = key("drop", "what becomes of the CLS token's feature", choices=("drop", "keep"))
    registers: str = key("drop", "what becomes of the register tokens' features", choices=("drop", "keep"))
    image_size: int | None = key(
        None,
        "pixels a side; null: the encoder's own; for another one its positions are resampled once, when it is loaded",
    )


@dataclass
class LanguageModelConfig:
    """The decoder."""

    path: str | None = key(
        None, "folder, hub id, or CONFIG.json (random weights, tokenizer beside it); null: taken from init_from"
    )


@dataclass
class ModelConfig:
    """Where the three parts come from, and their shape; what init_from holds may be left out."""

    vision_tower: VisionTowerConfig = section(VisionTowerConfig)
    projector: str = key("mlp2x_gelu", "its layers, by LLaVA's names", choices=("mlp2x_gelu", "linear"))
    language_model: LanguageModelConfig = section(LanguageModelConfig)


@dataclass
class ImageConfig:
    """What is done to an image before the encoder sees it."""

    fit: str | None = key(
        None,
        "how it becomes the encoder's square; null: as the encoder's own image processor does it, squash where it has "
        "none",
        choices=("squash", "pad", "crop"),
    )


@dataclass
class TrainSource:
    """One set of `data.train` and how much of it: at most one of the three, and weights for all sets or for none."""

    path: str
    weight: float | None = None  # share of the stream, relative to the other weights
    repeat: float | None = None  # times that each sample comes in an epoch; 0.5: every other epoch
    choose: int | None = None  # samples per epoch, the next ones in the next


@dataclass
class DataConfig:
    """What is trained and evaluated on, and how it is read."""

    train: Any = key(
        MISSING,
        "a folder written by `python -m data_tools pack` or its https, s3, gs or hf address; or a list of these and of "
        "{path, weight | repeat | choose}: a mixture, exact in every 1,000 samples. A weight is a share of the stream, "
        "repeat how often each sample comes in an epoch, choose a number of samples per epoch",
        resume=True,  # the plan compares the data's fingerprint, so a set may move
    )
    eval: str | None = key(None, "held-out pairs in the same form; null: no evaluation", resume=True)
    max_tokens: int = key(
        2048, "image + prompt + longer completion; a longer pair is excluded and counted, never cut", low=2
    )
    cache_dir: str | None = key(
        None,
        "folder of side-cars (lengths, reference log-probs); null: beside the set, else output_dir",
        resume=True,
        ranks=True,
    )
    exclude: str | None = key(None, "samples to leave out: a list made by `python -m data_tools exclude`")
    shard_cache: str | None = key(
        None, "folder for the shards of remote sets; null: `fetched` in cache_dir", resume=True, ranks=True
    )
    shard_cache_gb: float = key(200.0, "the most that shard_cache may take, in GB", low=0.001, resume=True, ranks=True)
    chat_template: str | None = key(None, "a Jinja file or text; null: the checkpoint's own, else ChatML")
    image: ImageConfig = section(ImageConfig)
    image_trees: bool = key(
        False,
        "pairs about one image follow each other in the order and share its tokens in a row: faster where a set has "
        "several pairs an image, exact, but a step then holds fewer distinct images",
    )
    workers: int = key(
        2, "loader processes per rank; 0 reads in the training process", low=0, high=256, resume=True, ranks=True
    )


@dataclass
class SFTConfig:
    """Negative log-likelihood of the (chosen) completion, mean over the step's target tokens. It has no knobs yet."""


@dataclass
class DPOConfig:
    """A preference loss of chosen and rejected completions, or a mix of several, mean over the step's pairs."""

    loss: Any = key("sigmoid", "a name, or a mix {name: weight}; the names are in objectives/losses.py, and `sft`")
    beta: float = key(
        0.1, "reward per nat of log ratio: a larger one keeps the policy nearer to the reference", low=1e-12
    )
    reference: str | None = key(None, "an HF LLaVA folder; null: the weights that this run starts from")
    label_smoothing: float = key(
        0.0,
        "share of flipped preferences, for sigmoid, robust, aot and aot_unpaired; for exo_pair the label's doubt, "
        "which must be above 0 (the paper's is 0.001)",
        low=0,
        high=0.499999,
    )
    f_divergence_type: str = key(
        "reverse_kl",
        "what holds the policy to the reference, for the losses of a margin (f-DPO)",
        choices=("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    )
    f_alpha_divergence_coef: float = key(0.5, "alpha of alpha_divergence: 0 is forward_kl, 1 reverse_kl")
    discopop_tau: float = key(0.05, "DiscoPOP's temperature, in units of the reward margin", low=1e-3, high=1)
    simpo_gamma: float = key(0.5, "SimPO's target margin, nat per token times beta")
    bco_shift: str = key("none", "reward shift of bco_pair", choices=("none", "running_mean"))


@dataclass
class KTOConfig:
    """Single answers, each desirable or undesirable, mean over the step's answers; a pair is read as one of each."""

    beta: float = key(
        0.1, "reward per nat of log ratio: a larger one keeps the policy nearer to the reference", low=1e-12
    )
    reference: str | None = key(None, "an HF LLaVA folder; null: the weights that this run starts from")
    desirable_weight: float = key(
        1.0,
        "of the loss of desirable answers; the paper: weight times number, 1 to 4/3 of the undesirable ones'",
        low=0,
    )
    undesirable_weight: float = key(1.0, "of the loss of undesirable answers", low=0)
    baseline: str = key(
        "mismatched",
        "what a gain is measured from. mismatched: the KL from the reference in the step before, of answers to other "
        "prompts; none: 0, TRL's apo_zero_unpaired",
        choices=("mismatched", "none"),
    )


@dataclass
class ObjectiveConfig:
    """What is learned: exactly one of these."""

    sft: SFTConfig | None = section(SFTConfig, optional=True)
    dpo: DPOConfig | None = section(DPOConfig, optional=True)
    kto: KTOConfig | None = section(KTOConfig, optional=True)


@dataclass
class ComponentOptimConfig:
    """How this component is trained, or that it is not."""

    lr: float | None = key(MISSING, "a number trains the component, null freezes it; it must be said", low=0)
    weight_decay: float = key(0.0, "of all its parameters", low=0)
    min_lr_ratio: float = key(0.0, "the schedule's floor as a share of lr", low=0, high=1)


@dataclass
class OptimConfig:
    """The optimizer, and the schedule of its rates; the rates themselves are each component's."""

    name: str = key("adamw", "which optimizer", choices=("adamw", "sgd"))
    lr: float | None = key(None, "a value for ${optim.lr} to point at; trains nothing by itself")
    schedule: str = key("cosine", "how the rates go down after the warm-up", choices=("cosine", "linear", "constant"))
    warmup_ratio: float = key(0.03, "of all steps, the share in which the rates go up", low=0, high=1)
    betas: tuple[float, float] = key((0.9, 0.999), "AdamW's decay rates, each at least 0 and below 1")
    eps: float = key(1e-8, "added to AdamW's denominator", low=1e-20, high=1)
    max_grad_norm: float = key(1.0, "global clipping; 0 switches it off", low=0)
    vision_tower: ComponentOptimConfig = section(ComponentOptimConfig)
    projector: ComponentOptimConfig = section(ComponentOptimConfig)
    language_model: ComponentOptimConfig = section(ComponentOptimConfig)

    def component(self, name: str) -> ComponentOptimConfig:
        return getattr(self, name)

    def trained(self) -> tuple[str, ...]:
        """The components that a rate was given for."""
        return tuple(name for name in COMPONENTS if self.component(name).lr is not None)


@dataclass
class TrainConfig:
    """How large a step is, how many there are, and how they are computed."""

    global_batch_size: int = key(MISSING, "pairs (SFT, KTO: samples) per optimizer step, over all ranks", low=1)
    max_tokens_per_micro_batch: int = key(
        8192, "row length per rank and micro-step; schedules only, never excludes", low=2, resume=True
    )
    max_steps: int | None = key(None, "optimizer steps; exactly one of max_steps and num_epochs", low=1)
    num_epochs: float | None = key(None, "passes over the data; exactly one of max_steps and num_epochs", low=1e-6)
    seed: int = key(0, "of the data's order and of random weights")
    precision: str = key(
        "auto", "auto: bf16 on GPUs that compute in it (from Ampere on), else fp32", choices=("auto", "bf16", "fp32")
    )
    activation_checkpointing: str = key(
        "none",
        "what backward computes again. selective: norms, activations and gathered keys, so that 0.7 of what is kept "
        "remains, for a few percent of time; full: whole blocks, for a third more time",
        choices=("none", "selective", "full"),
        resume=True,
    )
    attention: str = key(
        "auto",
        "what computes the prefix trees' attention: torch_varlen, flash_attn or sdpa; auto: the fastest of them that "
        "works here and proves equal to sdpa",
        resume=True,
    )
    max_skipped_steps: int = key(
        3, "steps in a row with a loss or gradient that is not finite, behind which the run ends", low=1, resume=True
    )
    timeout_s: float = key(
        600.0, "a collective, or a batch from the loader's workers, that takes longer ends the run", low=1, resume=True
    )


@dataclass
class CheckpointConfig:
    """When the run is saved, and whether it goes on from there."""

    every_steps: int = key(100, "optimizer steps from one checkpoint to the next; 0: only the one at the end", low=0)
    keep: int = key(2, "newest checkpoints kept; of one alone, it may be the one being written", low=2)
    keep_every_steps: int | None = key(
        None, "checkpoints kept for ever: of steps that are multiples of this, itself a multiple of every_steps", low=1
    )
    asynchronous: bool = key(
        False,
        "true: training waits for a copy in the machine's memory, not for the disk; the files are the same to the bit. "
        "Off, because a crash while they are written costs those steps, too, and a stop then waits for two saves",
    )
    resume: str = key(
        "auto",
        "auto: go on where output_dir has a run; required: it must have one; none: output_dir must be empty",
        choices=("auto", "required", "none"),
    )


@dataclass
class EvaluateConfig:
    """What is measured on data.eval, and when."""

    every_steps: int = key(0, "optimizer steps from one evaluation to the next; 0: only the one at the end", low=0)
    num_samples: int = key(1000, "the first so many of data.eval in its fixed order", low=1)
    max_new_tokens: int = key(32, "the longest generated answer, for samples that carry one", low=1)


@dataclass
class CompareConfig:
    """If given, a denominator for what the run cost, shown at its end: its name and any of the three numbers."""

    name: str = key(MISSING, 'for example "SigLIP 2 pre-training"')
    flops: float | None = key(None, "floating-point operations", low=1)
    samples: float | None = key(None, "image-text pairs seen", low=1)
    gpu_hours: float | None = key(None, "of comparable cards", low=1e-6)


@dataclass
class LogConfig:
    """What the run writes about itself."""

    every_steps: int = key(1, "steps from one row of the log to the next", low=1)
    tensorboard: bool = key(False, "write event files to output_dir/tensorboard")
    wandb: str | None = key(
        None,
        "hand the log on to Weights & Biases, where WANDB_API_KEY, WANDB_ENTITY and WANDB_PROJECT (else pivot) say, or "
        "keep it in output_dir/wandb",
        choices=("online", "offline"),
    )
    spike_factor: float = key(
        10.0, "tell of a loss so many robust standard deviations above the last 100 steps' median; 0: never", low=0
    )
    compare: CompareConfig | None = section(CompareConfig, optional=True)
    profile_steps: int = key(
        0,
        "trace so many steps behind the first two into output_dir/profile/rankN.json, megabytes each",
        low=0,
        high=1000,
    )


@dataclass
class Config:
    # Not a setting: what a YAML says where it refers to something ("${oc.env:NAME}"), as {key: (text, value)}. The text
    # is saved in place of the value; `load_config` fills this in.
    texts: ClassVar[dict[tuple[str | int, ...], tuple[str, str]]] = {}

    output_dir: str = key(MISSING, "the run's folder; the same command goes on with what it holds", resume=True)
    init_from: str | None = key(None, "an HF LLaVA folder (for example a run's export/) to start from")
    init_parts: list[str] | None = key(None, f"of init_from, take only these of {', '.join(COMPONENTS)}; null: all")
    deepspeed: str = key("ds_configs/zero2.json", "sharding, offload and communication", resume=True)
    model: ModelConfig = section(ModelConfig)
    data: DataConfig = section(DataConfig)
    objective: ObjectiveConfig = section(ObjectiveConfig)
    optim: OptimConfig = section(OptimConfig)
    train: TrainConfig = section(TrainConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig, resume=True)
    evaluate: EvaluateConfig = section(EvaluateConfig, resume=True)
    log: LogConfig = section(LogConfig, resume=True)


@dataclass(frozen=True)
class Key:
    """What is said above of one setting or section, under its full name ("train.max_steps")."""

    name: str
    default: Any  # MISSING where the run's YAML has to say it; None for a section
    section: type | None  # the dataclass of a section; None for a setting
    text: str
    choices: tuple[str, ...] = ()
    low: float = -inf
    high: float = inf
    resume: bool = False  # also where a section around it says so
    ranks: bool = False


def _section_of(kind: Any) -> type | None:
    """The dataclass of a field that is a section, also an optional one (`SFTConfig | None`)."""
    return next((part for part in (kind, *get_args(kind)) if isinstance(part, type) and is_dataclass(part)), None)


def _walk(kind: type, prefix: str = "", *, resume: bool = False) -> Iterator[Key]:
    """Everything in `kind` in the order of this file, a section before what it holds."""
    types = get_type_hints(kind)
    for spec in fields(kind):
        inner = _section_of(types[spec.name])
        default = None if inner is not None else spec.default
        said = {**spec.metadata, "resume": resume or spec.metadata["resume"]}
        yield Key(prefix + spec.name, default, inner, **said)
        if inner is not None:
            yield from _walk(inner, f"{prefix}{spec.name}.", resume=said["resume"])


KEYS = {described.name: described for described in _walk(Config)}


def flatten(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Full name -> value of every setting; an optional section that is absent is None under its own name."""
    if not is_dataclass(settings):
        return {prefix: settings}
    flat: dict[str, Any] = {}
    for spec in fields(settings):
        flat |= flatten(getattr(settings, spec.name), f"{prefix}.{spec.name}" if prefix else spec.name)
    return flat
