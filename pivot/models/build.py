"""The whole MLLM from a run's settings: from an HF LLaVA folder, from parts, or from bare configurations."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from pivot.config import COMPONENTS, Config, ModelConfig
from pivot.encoders.facts import Encoder
from pivot.encoders.library import LIBRARIES, require_same_network, resolve_encoder
from pivot.encoders.tower import build_vision_tower
from pivot.models.language import build_language_model, fit_vocabulary
from pivot.models.llava import is_llava, load_llava, require_agreement, require_same_features
from pivot.models.mllm import MLLM
from pivot.models.parts import is_parts, load_projector, part_paths, recorded_model
from pivot.models.projector import Projector
from pivot.pretrained import digest_weights, draws_weights, read_text_config
from pivot.processor import Processor
from pivot.system.distributed import check_preemption

# Two configurations describe the same language model when these agree.
_SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")


@dataclass(frozen=True)
class WeightSources:
    """Where each component's weights come from; `model` is complete, its paths filled in."""

    model: ModelConfig
    init_from: str | None
    taken: tuple[str, ...]  # the components that come from `init_from`

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder that `model.vision_tower` names; its configuration is read at the first use."""
        return resolve_encoder(self.model.vision_tower)

    @cached_property
    def from_parts(self) -> bool:
        return self.init_from is not None and is_parts(self.init_from)

    @cached_property
    def whole_llava(self) -> bool:
        return self.init_from is not None and not self.from_parts and is_llava(self.init_from)


def resolve_sources(config: Config) -> WeightSources:
    """Fill in the paths that `init_from` stands for. Raises ValueError where it and `model` disagree."""
    model = copy.deepcopy(config.model)
    if config.init_from is None:
        return WeightSources(model, None, ())
    _require_folder(config.init_from)
    sources = WeightSources(model, config.init_from, tuple(config.init_parts or COMPONENTS))
    if sources.from_parts:
        _fill_in_parts(sources, config.init_from)
    else:
        _fill_in_folder(sources, config.init_from)
    return sources


def _fill_in_parts(sources: WeightSources, init_from: str) -> None:
    if "projector" in sources.taken:
        require_agreement(init_from, recorded_model(init_from), sources.model)
    for name, path in part_paths(init_from).items():
        if name in sources.taken:
            getattr(sources.model, name).path = path


def _fill_in_folder(sources: WeightSources, init_from: str) -> None:
    """Of an HF folder: a LLaVA, or an encoder or language model alone."""
    model, taken = sources.model, sources.taken
    if not sources.whole_llava and taken not in (("vision_tower",), ("language_model",)):
        raise ValueError(
            f"init_from: {init_from} is not an HF LLaVA folder, so it holds one part; "
            "say which with init_parts=[vision_tower] or init_parts=[language_model]"
        )
    for name, require_same in (("vision_tower", require_same_network), ("language_model", _require_same_shape)):
        section = getattr(model, name)
        if name in taken:
            if section.path is not None and section.path != init_from:
                require_same(section.path, init_from)
            section.path = init_from
    if sources.whole_llava and "projector" in taken:
        require_same_features(init_from, model)


def _require_folder(path: str) -> None:
    # "a/b" may be a hub id; anything that is plainly a path must exist, or transformers would ask the hub for it.
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if looks_local and not Path(path).is_dir():
        raise ValueError(f"init_from: no folder {path}; expected an HF folder, for example a run's export/")


def _require_same_shape(path: str, init_from: str) -> None:
    asked, given = read_text_config(path), read_text_config(init_from)
    for field in _SHAPE:
        wanted, holds = getattr(asked, field, None), getattr(given, field, None)
        if wanted != holds:
            raise ValueError(
                f"model.language_model.path: {path} has {field} {wanted}, but init_from {init_from} has {holds}; "
                f"leave the path out, or take other init_parts"
            )


def build_mllm(
    sources: WeightSources,
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
            encoder = sources.encoder if "vision_tower" in taken else None
            loaded = load_llava(sources.init_from, model, dtype=dtype, gather=gather, parts=taken, encoder=encoder)
            parts = {name: getattr(loaded, name) for name in taken}
        check_preemption()
        if "vision_tower" not in parts:
            parts["vision_tower"] = build_vision_tower(sources.encoder, dtype=dtype, gather=gather)
            check_preemption()
        if "language_model" not in parts:
            assert model.language_model.path is not None
            parts["language_model"] = build_language_model(model.language_model.path, dtype=dtype)
        _seed_behind_reading(sources, seed)
        fit_vocabulary(parts["language_model"], len(processor.tokenizer))
    if "projector" not in parts:
        _seed_behind_reading(sources, seed)
        width, hidden = parts["vision_tower"].width, parts["language_model"].config.hidden_size
        parts["projector"] = Projector(model.projector, width, hidden, dtype=dtype)
        if sources.from_parts and "projector" in taken:
            assert sources.init_from is not None
            load_projector(sources.init_from, parts["projector"], dtype)
    mllm = MLLM(parts["vision_tower"], parts["projector"], parts["language_model"])
    mllm.use_attention(attention)
    return mllm


def _draws_all(sources: WeightSources) -> bool:
    """Whether both the encoder and the language model are drawn, not read."""
    assert sources.model.language_model.path is not None
    drawn = LIBRARIES[sources.encoder.library].draws_weights(sources.encoder.path)
    return drawn and draws_weights(sources.model.language_model.path)


def _seed_behind_reading(sources: WeightSources, seed: int) -> None:
    """Seed again where weights were read: how many numbers that draws depends on the ZeRO stage."""
    if not _draws_all(sources):
        torch.manual_seed(seed)


def weights_fingerprint(sources: WeightSources, *, seed: int) -> str:
    """sha256 of what decides the starting weights: the files, and for drawn parts their configuration and the seed."""
    model, tower = sources.model, sources.model.vision_tower
    library = LIBRARIES[sources.encoder.library]
    text = model.language_model.path
    assert text is not None
    facts: list[Any] = [sorted(sources.taken), model.projector, tower.layer, tower.post_norm, tower.cls]
    facts += [tower.registers] if tower.registers != "drop" else []  # so that older caches keep their names
    facts += [library.digest_weights(sources.encoder.path), digest_weights(text)]
    facts.append(None if sources.init_from is None else digest_weights(sources.init_from))
    drawn = library.draws_weights(sources.encoder.path) or draws_weights(text)
    if "projector" not in sources.taken or drawn:
        facts += [seed, torch.__version__, transformers.__version__]  # they decide which numbers are drawn
        facts += [] if _draws_all(sources) else ["seeded behind reading"]  # before, another projector was drawn
    return hashlib.sha256(repr(facts).encode()).hexdigest()
