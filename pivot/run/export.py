"""A checkpoint as a model: what the run would have exported, had it ended there. One process, no GPU, no engine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from pivot.config import Config
from pivot.config_load import load_saved
from pivot.encoders.export import KNOWN_BY, NOTE, write_encoder, write_note
from pivot.encoders.tower import build_vision_tower
from pivot.engine.files import SavedShards, unknown_classes
from pivot.models.build import build_mllm, resolve_sources
from pivot.models.parts import write_model
from pivot.processor import build_processor
from pivot.run import checkpoint
from pivot.run.checkpoint import Checkpoint
from pivot.system import distributed
from pivot.system.distributed import World
from pivot.system.files import UNFINISHED, filling

_OPTION = {"transformers": "hf", "open_clip": "open_clip", "timm": "timm"}  # a library -> its name in --encoder
ENCODER_OPTIONS = {option: library for library, option in _OPTION.items()}


def export_checkpoint(path: Path, out: Path, say: Callable[[str], None]) -> int:
    """Write the model of RUN's newest sound checkpoint, or of the one that `path` is, to `out`; gives its step.

    The parts that a run does not train, and what lies behind the feature layer, are read where the run began. Raises
    ValueError where `path` is neither, where `out` holds something (but for what an export that was killed left there),
    and for files that training never writes.
    """
    config, newest = _find(path, out, say)
    sources = resolve_sources(config)
    processor = build_processor(sources.model, config.data, encoder=sources.encoder)
    model = build_mllm(
        sources,
        processor,
        seed=config.train.seed,
        dtype=_dtype_of(newest),
        loading=nullcontext,
        gather=lambda _: nullcontext(),
    )
    write_model(out, model, _fill_in(model, newest.folder), processor)
    return newest.step


def export_encoder(path: Path, out: Path, library: str, say: Callable[[str], None]) -> int:
    """Write the encoder alone, as `export_checkpoint` takes it from `path`, in the form of `library`; gives the step.

    No decoder is read. `library` must be the one that the encoder is of: the same network differs between libraries in
    names and in how it treats its positions, its norms and its pooling.
    """
    config, newest = _find(path, out, say)
    sources = resolve_sources(config)
    encoder = sources.encoder
    if encoder.library != library:
        raise ValueError(
            f"--encoder: the encoder {encoder.path} is of {encoder.library}, and pivot does not convert between "
            f"libraries; give --encoder {_OPTION.get(encoder.library, encoder.library)}"
        )
    processor = build_processor(sources.model, config.data, encoder=encoder)
    torch.manual_seed(config.train.seed)  # as in the run, for an encoder that began at random and was never trained
    tower = build_vision_tower(encoder, dtype=_dtype_of(newest))
    state = _fill_in(nn.ModuleDict({"vision_tower": tower}), newest.folder)
    with filling(out, last=KNOWN_BY) as part:
        difference = write_encoder(part, tower, state, processor.geometry)
        note = write_note(part, tower, processor.geometry, place=out)
    image = note["image"]
    say(f"images     {image['size']} px, {image['fit']}, {image['resample']}, mean {image['mean']}, std {image['std']}")
    say(f"set aside  {len(tower.set_aside)} parameters {note['set_aside']['what']}; {NOTE} names them")
    say(f"compared   read back by {encoder.library}: the largest difference of a feature is {difference:g}")
    say(f"to use it  model.vision_tower.path={note['path']}")
    return newest.step


def _find(path: Path, out: Path, say: Callable[[str], None]) -> tuple[Config, Checkpoint]:
    """The settings of the run that `path` is, or is a checkpoint of, and the checkpoint that is meant."""
    run = path if (path / "config.yaml").is_file() else path.parent.parent
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{path}: no run and no checkpoint of one; expected RUN or RUN/checkpoints/step-...")
    if out.exists() and any(out.iterdir()) and not (out / UNFINISHED).is_dir():
        raise ValueError(f"--out: {out} is not empty; give another folder")
    config = load_saved(run / "config.yaml")
    world = distributed.start(config.train.timeout_s)
    newest = _open(run, path, world, say)
    say(f"checkpoint {newest.folder}, step {newest.step}")
    return config, newest


def _dtype_of(saved: Checkpoint) -> torch.dtype:
    return getattr(torch, saved.manifest["dtype"].removeprefix("torch."))


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


def _fill_in(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """The whole state dict of the model, or of parts under their names in it: the checkpoint's weights in the run's
    precision, buffers as they were built."""
    saved = SavedShards(folder)
    first_name = {parameter: name for name, parameter in model.named_parameters()}  # a tied head has its embedding's
    state = dict(model.state_dict())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        weights = saved.read_weights(first_name[parameter], parameter.dtype)
        if weights is not None:
            state[name] = weights.view(parameter.shape)
    return state
