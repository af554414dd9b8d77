"""Finds where the host would wait for the device: reads of values, copies to the host, shapes that depend on values.

A CPU waits for nothing, so what would wait on a GPU is refused by name: `with forbid_syncs(): ...`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__")
WAITING = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2", "unique_dim"}


class Synchronised(AssertionError):
    """A value was read on the host."""


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in WAITING or any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
            raise Synchronised(f"aten::{name} waits for the device")
        if name == "repeat_interleave" and func._overloadname == "Tensor" and not (kwargs or {}).get("output_size"):
            raise Synchronised("repeat_interleave by a tensor waits for the device")
        return func(*args, **kwargs or {})


def _refused(name: str) -> Callable[..., Any]:
    def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise Synchronised(f"Tensor.{name} waits for the device")

    return read


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    # The word, not the device: `x.to(y.device)` says "cpu" here too, where y lies there.
    if any(isinstance(value, str) and value == "cpu" for value in (*args, *kwargs.values())):
        raise Synchronised("Tensor.to waits for the device")
    return torch._C.TensorBase.to(tensor, *args, **kwargs)


@contextlib.contextmanager
def forbid_syncs() -> Iterator[None]:
    """Raise Synchronised, at the line that did it, for anything that would make the host wait; backward included.

    The methods are replaced rather than watched by a function mode: such a mode is off inside backward.
    """
    methods = {name: _refused(name) for name in READS} | {"to": _to}
    with mock.patch.multiple(torch.Tensor, **methods), _Operators():
        yield
