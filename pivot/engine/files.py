"""DeepSpeed's files: where they go, and parameters by name out of those that any ZeRO stage and number of ranks wrote.

DeepSpeed writes, per rank, one flat piece of each parameter group's fp32 master and of each of its moments:

    *_optim_states.pt   ZeRO-1/2: `param_slice_mappings` says which span of a piece is which parameter's
                        ZeRO-3: a parameter is cut into equal pieces, padded at the end; the piece of a group holds its
                        parameters' one behind the other, in the order of `param_shapes`
    *_model_states.pt   the shapes, and the weights that are not trained

Files are mapped, not read: what is asked for is all that comes into memory. Nothing in them is ever run.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

_OF_DEEPSPEED = [LossScaler, ZeroStageEnum, fragment_address]  # its classes there, plain data all of them
Write = Callable[[Any, Path], None]  # takes what a file shall hold, and its path
_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class _HandingOver(TorchCheckpointEngine):
    """What DeepSpeed writes its files through: each goes to `write` instead of to torch.save."""

    def __init__(self, write: Write) -> None:
        super().__init__()
        self._write = write

    def save(self, state_dict: Any, path: str) -> None:
        self._write(state_dict, Path(path))


@contextlib.contextmanager
def handed_to(write: Write, engine: Any) -> Iterator[None]:
    """Inside, the files of DeepSpeed's `engine` go to `write`; what they hold changes in the next step."""
    usual, engine.checkpoint_engine = engine.checkpoint_engine, _HandingOver(write)
    try:
        yield
    finally:
        engine.checkpoint_engine = usual


@contextlib.contextmanager
def inert_loading() -> Iterator[None]:
    """torch.load builds tensors, plain values and DeepSpeed's few classes, and calls nothing that a file names.

    DeepSpeed asks for weights_only=False wherever it loads; torch lets the environment overrule every caller.
    """
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals(_OF_DEEPSPEED):
            yield
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def unknown_classes(path: Path) -> list[str]:
    """What a file of torch.save names beyond tensors, plain values and DeepSpeed's own; nothing of it is run."""
    try:
        with inert_loading():
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (ValueError, RuntimeError, pickle.UnpicklingError) as error:
        return [f"no file of torch.save ({str(error).splitlines()[0]})"]


MASTER = "master"  # the fp32 weights; moments go by the optimizer's own names


class Span(NamedTuple):
    """Elements [start, start + size) of a rank's piece of a group."""

    rank: int
    group: int
    start: int
    size: int


class SavedShards:
    """The parameters of one checkpoint, of any ZeRO stage; ZeRO-0 keeps its optimizer's state in no shards.

    Raises ValueError where the folder holds nothing of DeepSpeed's, and for files that would have to run something.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._models = [_open(path) for path in sorted(folder.glob("*_model_states.pt"), key=_rank_of)]
        if not self._models:
            raise ValueError(f"{folder}: found no *_model_states.pt; expected a checkpoint that DeepSpeed has written")
        files = sorted(folder.glob("*_optim_states.pt"), key=_rank_of)
        self._ranks = [_open(path)["optimizer_state_dict"] for path in files]
        self._partitioned = bool(self._ranks) and "fp32_flat_groups" in self._ranks[0]
        self._spans = self._find_partitions() if self._partitioned else self._find_slices()

    @property
    def names(self) -> list[str]:
        """The trained parameters, whose masters and moments are in the shards."""
        return list(self._spans)

    @property
    def kinds(self) -> list[str]:
        """MASTER and the moments, such as exp_avg and exp_avg_sq; every group holds the same."""
        state = self._state(self._ranks[0], 0)
        return [MASTER, *(name for name, value in state.items() if torch.is_tensor(value) and value.ndim == 1)]

    def num_updates(self, group: int) -> int:
        """Steps that changed the weights, as the optimizer counted them; skipped ones are none."""
        return int(self._state(self._ranks[0], group).get("step", 0))

    def read(self, name: str, kind: str, own: slice = slice(None)) -> Tensor:
        """float32: the elements `own` of a trained parameter's master or moment, flat; no others come into memory."""
        spans, position, pieces = self._spans[name], 0, []
        start, stop, _ = own.indices(sum(span.size for span in spans))
        for span in spans:
            first, last = max(start - position, 0), min(stop - position, span.size)
            if first < last:
                pieces.append(self._piece(span._replace(start=span.start + first, size=last - first), kind))
            position += span.size
        return torch.cat(pieces) if pieces else torch.zeros(0)

    def holds_weights(self, name: str) -> bool:
        """Whether `read_weights` gives some."""
        untrained = "frozen_param_shapes" if self._partitioned else "module"
        return name in self._spans or name in (self._models[0].get(untrained) or {})

    def read_weights(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """[numel]: a weight in the run's precision, trained or not; None where the shards hold none."""
        if not self._partitioned:
            value = self._models[0]["module"].get(name)
            return None if value is None else value.flatten()
        if name in self._spans:
            return self.read(name, MASTER).to(dtype)
        shape = (self._models[0].get("frozen_param_shapes") or {}).get(name)
        if shape is None:
            return None
        parts = [model["frozen_param_fragments"][name].flatten() for model in self._models]
        return torch.cat(parts)[: math.prod(shape)]  # the last one is padded

    def _find_partitions(self) -> dict[str, list[Span]]:
        num_ranks, spans = len(self._ranks), {}
        for group, shapes in enumerate(self._models[0]["param_shapes"]):
            start = 0
            for name, shape in shapes.items():
                numel = math.prod(shape)
                part = -(-numel // num_ranks)
                sizes = [max(0, min(part, numel - rank * part)) for rank in range(num_ranks)]
                spans[name] = [Span(rank, group, start, size) for rank, size in enumerate(sizes) if size]
                start += part
        return spans

    def _find_slices(self) -> dict[str, list[Span]]:
        spans: dict[str, list[Span]] = {}
        for rank, state in enumerate(self._ranks):
            for group, slices in enumerate(state["param_slice_mappings"]):
                for name, address in slices.items():
                    spans.setdefault(name, []).append(Span(rank, group, address.start, address.numel))
        return spans

    def _piece(self, span: Span, kind: str) -> Tensor:
        state = self._ranks[span.rank]
        if kind == MASTER:
            flat = state["fp32_flat_groups" if self._partitioned else "single_partition_of_fp32_groups"][span.group]
        else:
            flat = self._state(state, span.group)[kind]
        return flat[span.start : span.start + span.size]

    def _state(self, state: dict[str, Any], group: int) -> dict[str, Any]:
        """What the optimizer keeps of a group on a rank; {} for one that keeps nothing."""
        inner = state["optimizer_state_dict" if self._partitioned else "base_optimizer_state"]
        return inner["state"].get(group, {})


def _rank_of(path: Path) -> int:
    rank = re.search(r"pp_rank_(\d+)_", path.name)
    return int(rank[1]) if rank else 0


def _open(path: Path) -> dict[str, Any]:
    with inert_loading():
        return torch.load(path, map_location="cpu", mmap=True)
