"""A checkpoint as a model: what the run would have exported, had it ended there. One process, no GPU, no engine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from pivot.config_load import load_saved
from pivot.engine.files import SavedShards, unknown_classes
from pivot.models.build import build_mllm, resolve_sources
from pivot.models.mllm import MLLM
from pivot.models.parts import write_model
from pivot.processor import build_processor
from pivot.run import checkpoint
from pivot.run.checkpoint import Checkpoint
from pivot.system import distributed
from pivot.system.distributed import World
from pivot.system.files import UNFINISHED


def export_checkpoint(path: Path, out: Path, say: Callable[[str], None]) -> int:
    """Write the model of RUN's newest sound checkpoint, or of the one that `path` is, to `out`; gives its step.

    The parts that a run does not train, and what lies behind the feature layer, are read where the run began. Raises
    ValueError where `path` is neither, where `out` holds something (but for what an export that was killed left there),
    and for files that training never writes.
    """
    run = path if (path / "config.yaml").is_file() else path.parent.parent
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{path}: no run and no checkpoint of one; expected RUN or RUN/checkpoints/step-...")
    if out.exists() and any(out.iterdir()) and not (out / UNFINISHED).is_dir():
        raise ValueError(f"--out: {out} is not empty; give another folder")
    config = load_saved(run / "config.yaml")
    world = distributed.start(config.train.timeout_s)
    newest = _open(run, path, world, say)
    say(f"checkpoint {newest.folder}, step {newest.step}")
    sources = resolve_sources(config)
    processor = build_processor(sources.model, config.data, encoder=sources.encoder)
    model = build_mllm(
        sources,
        processor,
        seed=config.train.seed,
        dtype=getattr(torch, newest.manifest["dtype"].removeprefix("torch.")),
        loading=nullcontext,
        gather=lambda _: nullcontext(),
    )
    write_model(out, model, _fill_in(model, newest.folder), processor)
    return newest.step


def _open(run: Path, path: Path, world: World, say: Callable[[str], None]) -> Checkpoint:
    folder = run / "checkpoints"
    sound = checkpoint.find(folder, world, say) if path == run else checkpoint.open_one(path, world)
    if sound is None:
        raise ValueError(f"{folder}: holds no checkpoint; the run has not saved one yet")
    for file in sorted(sound.folder.rglob("*.pt")):
        unknown = unknown_classes(file)
        if unknown:
            raise ValueError(
                f"{file} holds {', '.join(unknown)}, which training never writes there, and was not loaded"
            )
    return sound


def _fill_in(model: MLLM, folder: Path) -> dict[str, Tensor]:
    """The model's whole state dict: the checkpoint's weights in the run's precision, buffers as they were built."""
    saved = SavedShards(folder)
    first_name = {parameter: name for name, parameter in model.named_parameters()}  # a tied head has its embedding's
    state = dict(model.state_dict())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        weights = saved.read_weights(first_name[parameter], parameter.dtype)
        if weights is not None:
            state[name] = weights.view(parameter.shape)
    return state
