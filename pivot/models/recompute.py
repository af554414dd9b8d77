"""Selective activation recomputation (arXiv:2205.05198, section 5): what is cheap to compute again is not kept.

A matrix product keeps its input for backward. Where that input is the result of a norm or an activation, whose own
input is kept anyway, or a copy of keys that lie elsewhere, backward computes it again: bit for bit the same, for a few
passes over memory, and a block keeps about half as much.

PyTorch's own `create_selective_checkpoint_contexts` does not do: over DeepSpeed's ZeRO-3 it gave wrong gradients, by up
to 5 % of the largest value, without an error. Elsewhere it keeps 0.89 of what this keeps, for 5 % more time; its other
numbers are in docs/notes.md.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class _Recipe:
    """How to make a tensor again. Whoever would keep the tensor keeps this; it is made once for all of them."""

    def __init__(self, output: Tensor, function: Callable[..., Tensor], inputs: tuple[Any, ...]) -> None:
        self._output, self._version = weakref.ref(output), output._version
        self._function = function
        self._inputs = [_held(value) for value in inputs]
        self._versions = self._read_versions()
        self._num_users = self._num_waiting = 0
        self._made: Tensor | None = None

    def gives(self, tensor: Tensor) -> bool:
        """Whether this makes `tensor`, a view of what lies where the output lay; the output may be gone or changed."""
        output = self._output()
        return output is not None and tensor._version == self._version and tensor.dtype == output.dtype

    def add_user(self) -> None:
        self._num_users += 1
        self._num_waiting += 1

    def make(self) -> Tensor:
        if self._read_versions() != self._versions:
            raise RuntimeError(f"an input of {self._function} was changed in place between forward and backward")
        with torch.no_grad():
            made = self._function(*self._inputs) if self._made is None else self._made
        self._num_waiting = (self._num_waiting - 1) % self._num_users  # round again where backward runs twice
        self._made = made if self._num_waiting else None
        return made

    def _read_versions(self) -> list[int]:
        return [value._version for value in self._inputs if isinstance(value, Tensor)]


def _held(value: Any) -> Any:
    if isinstance(value, nn.Parameter):  # a norm's, so small; ZeRO-3 takes it away behind the module's forward
        return value.detach().clone()
    return value.detach() if isinstance(value, Tensor) else value


_recipes: dict[int, _Recipe] | None = None  # by the storage of the output; None outside `recomputing`


@contextmanager
def recomputing() -> Iterator[None]:
    """In here, results of `cheap` (and of the modules of `recompute_cheap_modules`) are not kept for backward.

    Not around `torch.utils.checkpoint`: a recipe holds its inputs, which checkpointing would let go of.
    """
    global _recipes
    before, _recipes = _recipes, {}
    try:
        with torch.autograd.graph.saved_tensors_hooks(partial(_pack, _recipes), _unpack):
            yield
    finally:
        _recipes = before


def cheap(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """`function(*inputs)`, a new tensor that is cheap to compute again from inputs that backward needs anyway."""
    return _note(function(*inputs), function, inputs)


def recompute_cheap_modules(model: nn.Module) -> None:
    """Let `recomputing` know the LayerNorms and GELUs of `model`, of whichever library."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) or _is_gelu(module):
            module.register_forward_hook(_note_module)


def _is_gelu(module: nn.Module) -> bool:
    """torch, transformers, timm and open_clip have classes of their own: GELUActivation, GELUTanh, QuickGELU ..."""
    is_plain = next(module.parameters(), None) is None and next(module.children(), None) is None
    return is_plain and "gelu" in type(module).__name__.lower()


def _note_module(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    if _recipes is not None and output.requires_grad:
        _note(output, _twin(module).forward, args)


def _twin(module: nn.Module) -> nn.Module:
    """The module as it is now: under ZeRO-3 its weights are gone in backward, and hooks would ask for them."""
    twin = copy.copy(module)
    twin._parameters = {name: None if p is None else _held(p) for name, p in module._parameters.items()}
    return twin


def _note(output: Tensor, function: Callable[..., Tensor], inputs: tuple[Any, ...]) -> Tensor:
    if _recipes is not None and output.requires_grad:
        _recipes[output.untyped_storage()._cdata] = _Recipe(output, function, inputs)
    return output


def _pack(recipes: dict[int, _Recipe], tensor: Tensor) -> Any:
    """A recipe in place of a tensor that has one; what is kept may be a view, so its place in the memory goes along."""
    recipe = recipes.get(tensor.untyped_storage()._cdata)
    if recipe is None or not recipe.gives(tensor):
        return tensor
    recipe.add_user()
    return recipe, tensor.size(), tensor.stride(), tensor.storage_offset()


def _unpack(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    recipe, size, stride, offset = kept
    return recipe.make().as_strided(size, stride, offset)
