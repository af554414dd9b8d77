"""Runs code on a GPU that is not there: tensors say `cuda` and have shapes and types, but no values.

Torch's fake tensors (docs.pytorch.org, "Fake tensor") raise where tensors of two devices, or of types that do not go
together, meet, and where a branch or a shape depends on values. A copy between the host and the GPU they allow;
`forbid_waits` refuses those that would make the host wait.

None of this shows: numbers; backward (autograd asks the driver for the device's stream); what a kernel refuses
(alignment, head sizes, architectures); streams, and with them memory that is used again too early; collectives; what
DeepSpeed does. Those need a card: the tests marked `gpu`, and `benchmarks/gpu.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.kit.syncs import Synchronised, forbid_syncs

GPU = torch.device("cuda", 0)


def _pin_memory(tensor: Tensor) -> Tensor:
    assert tensor.device.type == "cpu", "only the host's memory can be page-locked"
    copy = tensor.clone()
    copy.page_locked = True  # type: ignore[attr-defined]
    return copy


@contextlib.contextmanager
def fake_gpu() -> Iterator[None]:
    """In here no operation computes. Real tensors may come in; they lie on the host until they are moved.

    torch 2.15 asks what card it is before it picks a kernel of variable-length attention: an A100.
    """
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a real weight cannot become a fake one in place
    try:
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            mock.patch.object(Tensor, "pin_memory", _pin_memory),
            mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (8, 0)),
        ):
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution"}


class _Card(TorchDispatchMode):
    """What a card does and fake tensors do not: wait for copies, but for some from page-locked memory; refuse types."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        result = func(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            source = args[1 if name == "copy_" else 0]
            non_blocking = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            free = not source.numel() or (non_blocking and getattr(source, "page_locked", False))
            if source.device.type != result.device.type and not free:
                raise Synchronised(f"aten::{name} from {source.device.type} to {result.device.type} waits")
        elif len(places := {value.device.type for value in tree_leaves((args, kwargs)) if _has_place(value)}) > 1:
            # Most raise on a card, too; indexing fetches its indices from the host, and waits.
            raise RuntimeError(f"aten::{name} of tensors on {' and '.join(sorted(places))}")
        if name in PRODUCTS and len({value.dtype for value in args if isinstance(value, Tensor)}) > 1:
            raise RuntimeError(f"aten::{name} of tensors of several types")
        return result


def _has_place(value: Any) -> bool:
    """A number on the host goes with tensors of any device."""
    return isinstance(value, Tensor) and value.dim() > 0


@contextlib.contextmanager
def forbid_waits() -> Iterator[None]:
    """Raise Synchronised where the host would wait for the GPU: for a value, a shape, or a copy either way."""
    with forbid_syncs(), _Card():
        yield
