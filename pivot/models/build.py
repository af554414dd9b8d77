"""The whole MLLM from a run's settings: from an HF LLaVA folder, from parts, or from bare configurations."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from pivot.config import COMPONENTS, Config, ModelConfig
from pivot.geometry import OPEN_CLIP, read_vision_config
from pivot.models.convert import is_llava, load_llava, require_same_features
from pivot.models.language import build_language_model, fit_vocabulary
from pivot.models.mllm import MLLM
from pivot.models.parts import is_parts, load_projector, part_paths, require_agreement
from pivot.models.projector import Projector
from pivot.models.vision import build_vision_tower
from pivot.pretrained import read_config, read_text_config
from pivot.processor import Processor

# Two configurations describe the same network when these agree.
_SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "patch_size", "vocab_size")


@dataclass(frozen=True)
class Sources:
    """Where each component's weights come from; `model` is complete, its paths filled in."""

    model: ModelConfig
    init_from: str | None
    taken: tuple[str, ...]  # the components that come from `init_from`

    @property
    def from_parts(self) -> bool:
        return self.init_from is not None and is_parts(self.init_from)

    @property
    def whole_llava(self) -> bool:
        return self.init_from is not None and not self.from_parts and is_llava(self.init_from)


def settle_sources(config: Config) -> Sources:
    """Fill in the paths that `init_from` stands for. Raises ValueError where it and `model` disagree."""
    model = copy.deepcopy(config.model)
    if config.init_from is None:
        return Sources(model, None, ())
    _require_folder(config.init_from)
    taken = tuple(config.init_parts or COMPONENTS)
    if is_parts(config.init_from):
        return _settle_parts(model, config.init_from, taken)
    if not is_llava(config.init_from) and taken not in (("vision_tower",), ("language_model",)):
        raise ValueError(
            f"init_from: {config.init_from} is not an HF LLaVA folder, so it holds one part; "
            "say which with init_parts=[vision_tower] or init_parts=[language_model]"
        )
    for name in ("vision_tower", "language_model"):
        section = getattr(model, name)
        if name in taken:
            if section.path is not None and section.path != config.init_from:
                _require_same_shape(name, section.path, config.init_from)
            section.path = config.init_from
    if is_llava(config.init_from) and "projector" in taken:
        require_same_features(config.init_from, model)
    return Sources(model, config.init_from, taken)


def _settle_parts(model: ModelConfig, init_from: str, taken: tuple[str, ...]) -> Sources:
    if "projector" in taken:
        require_agreement(init_from, model)
    for name, path in part_paths(init_from).items():
        if name in taken:
            getattr(model, name).path = path
    return Sources(model, init_from, taken)


def _require_folder(path: str) -> None:
    # "a/b" may be a hub id; anything that is plainly a path must exist, or transformers would ask the hub for it.
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if looks_local and not Path(path).is_dir():
        raise ValueError(f"init_from: no folder {path}; expected an HF folder, for example a run's export/")


def _require_same_shape(name: str, path: str, init_from: str) -> None:
    if path.startswith(OPEN_CLIP):
        raise ValueError(f"model.{name}.path: {path} and init_from: {init_from} both name it; leave one out")
    read: Callable[[str], Any] = read_vision_config if name == "vision_tower" else read_text_config
    ours, theirs = read(path), read(init_from)
    for field in _SHAPE:
        found, expected = getattr(ours, field, None), getattr(theirs, field, None)
        if found != expected:
            raise ValueError(
                f"model.{name}.path: {path} has {field} {found}, but init_from {init_from} has {expected}; "
                f"leave the path out, or take other init_parts"
            )


def build_mllm(
    sources: Sources,
    processor: Processor,
    *,
    seed: int,
    dtype: torch.dtype,
    loading: Callable[[], AbstractContextManager],
    gather: Callable[[list[nn.Parameter]], AbstractContextManager],
    attention: str = "sdpa",
) -> MLLM:
    """The model, on the CPU, parts without weights drawn from `seed` (the same on every rank).

    `loading` wraps what reads weights (ZeRO-3 partitions them there); `gather` gives whole values of such. `attention`
    names the back end of the prefix trees.
    """
    model, taken = sources.model, sources.taken
    torch.manual_seed(seed)
    parts: dict[str, Any] = {}
    with loading():
        if sources.whole_llava:
            assert sources.init_from is not None
            loaded = load_llava(sources.init_from, model, dtype=dtype, gather=gather, parts=taken)
            parts = {name: getattr(loaded, name) for name in taken}
        if "vision_tower" not in parts:
            parts["vision_tower"] = build_vision_tower(model.vision_tower, dtype=dtype, gather=gather)
        if "language_model" not in parts:
            assert model.language_model.path is not None
            parts["language_model"] = build_language_model(model.language_model.path, dtype=dtype)
        fit_vocabulary(parts["language_model"], len(processor.tokenizer))
    if "projector" not in parts:
        width, hidden = parts["vision_tower"].width, parts["language_model"].config.hidden_size
        parts["projector"] = Projector(model.projector, width, hidden, dtype=dtype)
        if sources.from_parts and "projector" in taken:
            assert sources.init_from is not None
            load_projector(sources.init_from, parts["projector"], dtype)
    mllm = MLLM(parts["vision_tower"], parts["projector"], parts["language_model"])
    mllm.use_attention(attention)
    return mllm


def weights_fingerprint(sources: Sources, *, seed: int) -> str:
    """sha256 of what decides the starting weights: the files, and for drawn parts their configuration and the seed."""
    model, tower = sources.model, sources.model.vision_tower
    facts: list[Any] = [sorted(sources.taken), model.projector, tower.layer, tower.post_norm, tower.cls]
    for path in (tower.path, model.language_model.path, sources.init_from):
        facts.append(None if path is None else _source_digest(path))
    if "projector" not in sources.taken or any(_is_drawn(path) for path in (tower.path, model.language_model.path)):
        facts += [seed, torch.__version__, transformers.__version__]  # they decide which numbers are drawn
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _is_drawn(path: str | None) -> bool:
    assert path is not None
    return path.endswith(".json") or (path.startswith(OPEN_CLIP) and "@" not in path)


def _source_digest(path: str) -> str:
    if path.startswith(OPEN_CLIP):
        return path
    if Path(path).is_file():
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if not Path(path).is_dir():  # a hub id, pinned by the commit that was resolved
        return f"{path}@{getattr(read_config(path, 'init_from'), '_commit_hash', None)}"
    digest = hashlib.sha256()
    for file in sorted(Path(path).glob("*")):
        if file.suffix in (".safetensors", ".bin", ".json"):
            with file.open("rb") as content:
                digest.update(file.name.encode() + hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()
