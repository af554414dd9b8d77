"""What the ranks run: engines of every ZeRO stage over hand-made micro-batches; numbers go to files, not to asserts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from pivot.batch import REFERENCE, SAMPLE, PackedBatch, StepCounts
from pivot.config import REPOSITORY, ComponentOptimConfig, Config, DPOConfig, ObjectiveConfig, OptimConfig
from pivot.config_check import read_deepspeed_json
from pivot.engine import Engine, build_deepspeed_config, gathered, sharded_loading
from pivot.models import head as logprobs
from pivot.models.build import build_mllm, resolve_sources
from pivot.models.mllm import MLLM
from pivot.objectives import build_objective
from pivot.processor import build_processor
from pivot.run import checkpoint
from pivot.system.distributed import World
from tests.kit.trees import build_batch, random_segments

RATES = {"vision_tower": 0.02, "projector": 0.05, "language_model": 0.03}
ADAM_RATES = {"vision_tower": 2e-4, "projector": 1e-3, "language_model": 5e-4}
IMAGE_TOKENS = 16
MAX_GRAD_NORM = 0.5  # below every norm met here, so that clipping is at work


def world() -> World:
    return World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


def optim_config(name: str = "sgd", frozen: tuple[str, ...] = (), **changes: Any) -> OptimConfig:
    """`decays`: the weight decay of each component; none by default."""
    rates = RATES if name == "sgd" else ADAM_RATES
    decays = changes.pop("decays", {})
    components = {
        component: ComponentOptimConfig(
            lr=None if component in frozen else rate, weight_decay=decays.get(component, 0.0)
        )
        for component, rate in rates.items()
    }
    return OptimConfig(name=name, max_grad_norm=changes.pop("max_grad_norm", 1.0), **components, **changes)


def build(
    llava: Path,
    stage: int | str,
    optim: OptimConfig,
    *,
    bf16: bool = False,
    recompute: str = "none",
    encoder: str | None = None,
) -> tuple[Engine, int]:
    """An engine around the LLaVA of a folder, as train.py builds it; and the image-token id.

    `encoder`: one in place of the LLaVA's own, with a new projector.
    """
    name = f"zero{stage}.json"
    settings = build_deepspeed_config(
        read_deepspeed_json(str(REPOSITORY / "ds_configs" / name)), max_grad_norm=optim.max_grad_norm, bf16=bf16
    )
    config = Config(output_dir="unused", init_from=str(llava))
    if encoder is not None:
        config.init_parts, config.model.vision_tower.path = ["language_model"], encoder
    sources = resolve_sources(config)
    processor = build_processor(sources.model, config.data)
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = build_mllm(
        sources,
        processor,
        seed=0,
        dtype=dtype,
        loading=lambda: sharded_loading(settings),
        gather=gathered,
    ).train()
    model.enable_activation_checkpointing(recompute)
    engine = Engine(model, settings, optim, lambda step, floor: 1.0, world())
    return engine, processor.image_token_id


def pair(seed: int, image_token_id: int, *, with_image: bool) -> PackedBatch:
    """A preference pair of its own lengths; the prompt holds an image or does not."""
    lengths = [4 + seed % 3, 3 + seed % 5, 2 + seed % 4]
    prompt, chosen, rejected = random_segments(lengths, seed=seed)
    if with_image:
        prompt = [image_token_id] * IMAGE_TOKENS + prompt
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    if not with_image:
        pixels = torch.zeros_like(pixels)
    return build_batch([prompt, chosen, rejected], [-1, 0, 0], image_token_id=image_token_id, pixel_values=pixels)


def merge(batches: list[PackedBatch], image_token_id: int) -> PackedBatch:
    """Several pairs in one row, as a larger budget packs them."""
    token_ids: list[list[int]] = []
    parents: list[int] = []
    for batch in batches:
        first = len(parents)
        for i in range(len(batch.segments)):
            span = slice(int(batch.segments.start[i]), int(batch.segments.end[i]))
            token_ids.append(batch.token_ids[span].tolist())
            parent = int(batch.segments.parent[i])
            parents.append(parent if parent < 0 else parent + first)
    images = [b.pixel_values for b in batches if len(b.image_positions)] or [batches[0].pixel_values]
    return build_batch(token_ids, parents, image_token_id=image_token_id, pixel_values=torch.cat(images))


def run_step(
    engine: Engine,
    rows: list[PackedBatch],
    num_pairs: int,
    step: int,
    *,
    update: bool = True,
    measure: bool = True,
) -> dict[str, float]:
    """One step of DPO against a fixed reference (a function of the completion's place), over this rank's rows."""
    for number, row in enumerate(rows):
        engine.backward(_loss(engine, row, num_pairs), last=number == len(rows) - 1)
    if not update:
        return {}
    return engine.step(step, measure=measure)


def _loss(model: Callable[[PackedBatch], Tensor], row: PackedBatch, num_pairs: int) -> Tensor:
    objective = build_objective(ObjectiveConfig(dpo=DPOConfig()))
    counts = StepCounts({SAMPLE: num_pairs})
    row.completion_values[REFERENCE] = -5.0 * row.completion_tokens.float()
    outcome = objective(model(row), row)
    return sum(weight * term.total / counts.denominator(term.unit) for weight, term in outcome.loss.values())


def weights(engine: Engine) -> dict[str, Tensor]:
    return engine.state_dict()


def save_checkpoint(engine: Engine, checkpoints: Path, step: int) -> Path:
    size = sum(engine.checkpoint_bytes())
    saved = checkpoint.begin(engine, checkpoints, step, world(), state={}, facts={}, size_bytes=size)
    checkpoint.publish(saved, world(), keep=2, say=print)
    return saved.final


def save(folder: Path, name: str, values: dict[str, Any]) -> None:
    if dist.get_rank() == 0:
        torch.save(values, folder / f"{name}-{dist.get_world_size()}.pt")


def _mine(
    pairs: list[PackedBatch], micro_batches: int, image_token_id: int, rank: int | None = None
) -> list[PackedBatch]:
    """This rank's share (or that of `rank`) of the step's pairs, cut into `micro_batches` rows."""
    own = pairs[dist.get_rank() if rank is None else rank :: dist.get_world_size()]
    return [merge(own[i::micro_batches], image_token_id) for i in range(micro_batches)]


# -- scenarios -----------------------------------------------------------------------------------------------------

NUM_PAIRS = 8


def everything(folder: Path) -> None:
    """All of the below in one process, since starting it takes longer than they do."""
    for scenario in (zero_stages, gradients, image_patterns, freezing, mixed_precision):
        scenario(folder)


def zero_stages(folder: Path) -> None:
    """Five steps for each stage, optimizer, and tied or untied embeddings: weights and measured norms."""
    for tied in (False, True):
        for name in ("sgd", "adamw"):
            for stage in (0, 1, 2, 3):
                engine, image = build(
                    folder / f"llava-{'tied' if tied else 'untied'}",
                    stage,
                    optim_config(name, max_grad_norm=MAX_GRAD_NORM),
                )
                metrics = []
                for step in range(5):
                    pairs = [pair(100 * step + i, image, with_image=i % 3 != 1) for i in range(NUM_PAIRS)]
                    metrics.append(run_step(engine, _mine(pairs, 2, image), NUM_PAIRS, step))
                case = f"stage{stage}-{name}-{'tied' if tied else 'untied'}"
                save(folder, case, {"weights": weights(engine), "metrics": metrics, "facts": engine.facts()})


def gradients(folder: Path) -> None:
    """The gradient of one global batch, cut in many ways; also with other chunk counts in the head on each rank."""
    for stage in (0, 1, 2, 3):
        engine, image = build(folder / "llava-tied", stage, optim_config("sgd"))
        pairs = [pair(i, image, with_image=i % 3 != 1) for i in range(NUM_PAIRS)]
        for micro_batches, chunk in ((1, None), (2, None), (4, None), (1, 6400)):
            logprobs.CHUNK_LOGITS = chunk * (1 + 3 * dist.get_rank()) if chunk else 2**25
            run_step(engine, _mine(pairs, micro_batches, image), NUM_PAIRS, 0, update=False)
            found = {}
            for parameter_name, parameter in engine.model.named_parameters():
                grad = parameter.grad if stage == 0 else safe_get_full_grad(parameter)
                found[parameter_name] = grad.detach().clone()
            save(folder, f"gradient-stage{stage}-{micro_batches}-{chunk}", found)
            _drop_gradients(engine, stage)
    logprobs.CHUNK_LOGITS = 2**25


def _drop_gradients(engine: Engine, stage: int) -> None:
    """End the step at a rate of zero: the weights stay, the gradients go."""
    for group in engine._engine.optimizer.param_groups:
        group["lr"] = 0.0
    engine._engine.step()


def image_patterns(folder: Path) -> None:
    """Steps with images on both ranks, on one, on none, in either place of the accumulation, and without any."""
    patterns = [  # [step][rank][micro-batch]: does the row hold an image
        [[True, False], [True, True]],
        [[False, False], [False, False]],
        [[True, False], [False, False]],
        [[False, True], [True, False]],
        [[False, False], [False, False]],
        [[True], [False]],  # one micro-batch a rank
        [[False], [True]],
        [[False], [False]],
    ]
    for name in ("sgd", "adamw"):
        for stage in (0, 2, 3):
            engine, image = build(folder / "llava-untied", stage, optim_config(name))
            towers = [_tower(engine)]
            for step, pattern in enumerate(patterns):
                flat = [flag for rank in pattern for flag in rank]  # the same pairs on one rank or on two
                share = len(flat) // dist.get_world_size()
                first = dist.get_rank() * share
                rows = [pair(10 * step + i, image, with_image=flat[i]) for i in range(first, first + share)]
                run_step(engine, rows, len(flat), step)
                towers.append(_tower(engine))
            save(folder, f"pattern-stage{stage}-{name}", {"towers": towers, "weights": weights(engine)})


def _tower(engine: Engine) -> dict[str, Tensor]:
    return {name: value for name, value in engine.state_dict().items() if name.startswith("vision_tower.")}


def freezing(folder: Path) -> None:
    """Each component frozen, and all but one, with each way of recomputing activations."""
    components = ("vision_tower", "projector", "language_model")
    for recompute in ("none", "selective", "full"):
        for frozen in [(c,) for c in components] + [tuple(o for o in components if o != c) for c in components]:
            optim = optim_config("adamw", frozen)
            engine, image = build(folder / "llava-untied", 3, optim, recompute=recompute)
            before, received = weights(engine), _watch_gradients(engine)
            pairs = [pair(i, image, with_image=True) for i in range(4)]
            run_step(engine, _mine(pairs, 1, image), 4, 0)
            after = weights(engine)
            trainable = [name for name, p in engine.model.named_parameters() if p.requires_grad]
            case = {
                "before": before,
                "after": after,
                "received": sorted(received),
                "trainable": trainable,
                "frozen": list(frozen),
            }
            save(folder, f"frozen-{'+'.join(frozen)}-{recompute}", case)


def _watch_gradients(engine: Engine) -> set[str]:
    """A set that fills with the names of the parameters that get a gradient."""
    received: set[str] = set()
    for name, parameter in engine.model.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda grad, name=name: received.add(name))
    return received


def mixed_precision(folder: Path) -> None:
    """bf16 weights on ZeRO 1 to 3 and in plain torch: the same three steps over the same rows."""
    for stage in (1, 2, 3):
        engine, image = build(folder / "llava-tied", stage, optim_config("adamw"), bf16=True)
        pairs = [pair(i, image, with_image=i != 1) for i in range(4)]
        metrics = [run_step(engine, _mine(pairs, 2, image), 4, step) for step in range(3)]
        save(folder, f"bf16-stage{stage}", {"metrics": metrics, "facts": engine.facts()})
    rows = [row for rank in range(dist.get_world_size()) for row in _mine(pairs, 2, image, rank)]
    save(folder, "bf16-plain", {"metrics": plain_steps(folder / "llava-tied", rows, 4, num_steps=3)})


def plain_steps(llava: Path, rows: list[PackedBatch], num_pairs: int, *, num_steps: int) -> list[dict[str, float]]:
    """What `norms` gives, with mixed precision by hand: bf16 weights and gradients, fp32 sums, masters and AdamW."""
    optim = optim_config("adamw")
    model, _ = build_plain(llava, torch.bfloat16)
    pairs = [(p, p.detach().float()) for p in model.parameters()]  # (weight, master)
    components = {name: set(model.get_submodule(name).parameters()) for name in ADAM_RATES}
    groups = {name: [master for p, master in pairs if p in own] for name, own in components.items()}
    adamw = torch.optim.AdamW(
        [{"params": own, "lr": ADAM_RATES[name]} for name, own in groups.items()],
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=0.0,
    )
    steps = []
    for _ in range(num_steps):
        for _, master in pairs:
            master.grad = torch.zeros_like(master)
        for row in rows:
            model.zero_grad()
            _loss(model, row, num_pairs).backward()
            for weight, master in pairs:
                master.grad += weight.grad
        norms = {name: _norm([master.grad for master in own]) for name, own in groups.items()}
        before = {name: [master.clone() for master in own] for name, own in groups.items()}
        whole = torch.nn.utils.clip_grad_norm_([master for _, master in pairs], optim.max_grad_norm)
        adamw.step()
        for weight, master in pairs:
            weight.data.copy_(master)
        metrics = {"grad_norm": float(whole)} | {f"grad_norm/{name}": norm for name, norm in norms.items()}
        for name, own in groups.items():
            moved = _norm([new - old for new, old in zip(own, before[name], strict=True)])
            metrics[f"update_ratio/{name}"] = moved / _norm(own)
        steps.append(metrics)
    return steps


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([tensor.double().norm() for tensor in tensors]).norm())


def build_plain(llava: Path, dtype: torch.dtype = torch.float32) -> tuple[MLLM, int]:
    """The model alone, in this process, without an engine."""
    config = Config(output_dir="unused", init_from=str(llava))
    sources = resolve_sources(config)
    processor = build_processor(sources.model, config.data)
    model = build_mllm(
        sources,
        processor,
        seed=0,
        dtype=dtype,
        loading=contextlib.nullcontext,
        gather=lambda _: contextlib.nullcontext(),
    )
    return model.train(), processor.image_token_id
