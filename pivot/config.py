"""Every knob of a run: typed sections with their defaults, units and meanings. What cannot be defaulted is MISSING.

`pivot.config_load` merges defaults, a YAML and the command line into a `Config`; `pivot.config_check` holds what a
value may be. Relative paths count from the working directory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from omegaconf import MISSING

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
    # squash | pad | crop: how an image becomes the encoder's square; None: as the encoder's own image processor does
    # it, squash where it has none
    fit: str | None = None


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
    allow_pipe: bool = False  # sets may be pipe:COMMAND, which is run for each file, its name in place of {}
    chat_template: str | None = None  # a Jinja file or text; None: the checkpoint's own, else ChatML
    image: ImageConfig = field(default_factory=ImageConfig)
    # Pairs about one image follow each other in the order and share its tokens in a row: faster where a set has several
    # pairs an image, exact, but a step then holds fewer distinct images.
    image_trees: bool = False
    workers: int = 2  # loader processes per rank; 0 reads in the training process


@dataclass
class SFTConfig:
    """Negative log-likelihood of the (chosen) completion, mean over the step's target tokens. It has no knobs yet."""


@dataclass
class DPOConfig:
    loss: Any = "sigmoid"  # a name, or a mix {name: weight}; names in objectives/losses.py, and `sft`
    beta: float = 0.1
    reference: str | None = None  # an HF LLaVA folder; None: the weights this run starts from
    reference_per_token: bool = False  # keep the reference's log-prob of each completion token, too; for analyses
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
    precision: str = "auto"  # auto | bf16 | fp32; auto: bf16 on GPUs that compute in it (from Ampere on), else fp32
    activation_checkpointing: str = "none"  # | selective: norms, activations, gathered keys are computed again in
    # backward, about half of what a block keeps for a few percent of time | full: blocks are, a third more time
    attention: str = "auto"  # auto | torch_varlen | flash_attn | sdpa: the back end of the prefix trees' attention
    timeout_s: float = 600.0  # a collective, or a batch from the loader's workers, that takes longer ends the run


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
class CompareConfig:
    """What a run's cost is held against; any of the three."""

    name: str = MISSING  # for example "SigLIP 2 pre-training"
    flops: float | None = None
    samples: float | None = None  # image-text pairs seen
    gpu_hours: float | None = None  # of comparable cards


@dataclass
class LogConfig:
    every_steps: int = 1
    tensorboard: bool = False  # write event files to output_dir/tensorboard
    compare: CompareConfig | None = None  # a denominator for the run's FLOPs, samples and GPU-hours, shown at the end
    profile_steps: int = 0  # trace so many steps behind the first two into output_dir/profile/rankN.json; 0: none


@dataclass
class Config:
    # Not a setting: what a YAML says where it refers to something ("${oc.env:NAME}"), as {key: (text, value)}. The text
    # is saved in place of the value; `load_config` fills this in.
    texts: ClassVar[dict[tuple[str | int, ...], tuple[str, str]]] = {}

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
