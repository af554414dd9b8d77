"""What a forward and backward pass hold at their peak, measured on the meta device: shapes without memory or numbers.

The run's own model goes through the run's own code, so the measure holds for every encoder, every family and every way
of recomputing. Of kernels it sees what they return and what autograd keeps for them, not their scratch memory.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pivot.batch import PackedBatch
from pivot.data.collate import Completion, Example, collate
from pivot.data.plan import Plan
from pivot.encoders.facts import ImageGeometry
from pivot.models.mllm import MLLM
from pivot.models.skeleton import Skeleton

IMAGE_TOKEN, TEXT_TOKEN = 0, 1  # of a row that has lengths and no contents
META = torch.device("meta")


class LiveMemory(TorchDispatchMode):
    """Count the bytes of the tensors that operations return inside the context, until they are let go.

    A storage counts once, however many tensors view it, and those of `known` tensors (weights) do not count. The
    process's own peak would not do: for the same tensors it was 1.8 times as high with torch 2.11 as with 2.14.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.bytes = self.peak_bytes = 0
        self._storages = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()  # the address of the storage, not of its memory: meta has none
        if size and key not in self._storages:
            self._storages.add(key)
            weakref.finalize(storage, self._let_go, key, size)
            self.bytes += size
            self.peak_bytes = max(self.peak_bytes, self.bytes)

    def _let_go(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.bytes -= size


def measure_activations(
    skeleton: Skeleton,
    trained: Sequence[str],
    dtype: torch.dtype,
    batch: PackedBatch,
    attention: str,
    checkpointing: str,
) -> int:
    """Bytes at the peak of one micro-batch, above its own tensors, the weights and their summed gradients.

    `attention` is the back end of the prefix trees: flash_attn is measured as torch_varlen, which keeps the same
    (queries, gathered keys and values, the output and a float32 a query and head). SDPA is measured as the fused kernel
    of a CPU, wherever it runs: a GPU's kernels keep the same, but for grouped keys, which it copies for each head.
    """
    skeleton = copy.deepcopy(skeleton)  # the model replaces a head and classes of what it is built from
    model = MLLM(skeleton.vision_tower, skeleton.projector, skeleton.language_model).to(dtype).train()
    model.use_attention("sdpa" if attention == "sdpa" else "torch_varlen")
    model.enable_activation_checkpointing(checkpointing)
    for module in model.modules():
        if hasattr(module, "rope_type"):
            vars(module)["rope_type"] = "default"  # others ask how long the row is: a value, which meta has none of
    for name in skeleton.components:
        model.get_submodule(name).requires_grad_(name in trained)
    sums = [p for p in model.parameters() if p.requires_grad]
    for parameter in sums:
        parameter.grad = torch.empty_like(parameter)
    batch = batch.to(META)
    gradients = (p.grad for p in sums if p.grad is not None)
    with LiveMemory(chain(model.parameters(), gradients)) as memory:
        model(batch).sum().backward()
    return memory.peak_bytes


def build_fullest_row(plan: Plan, geometry: ImageGeometry) -> PackedBatch:
    """The first step's micro-batch with the most tokens, as the loader would pack it, without contents."""
    rows = [row for rank in plan.step(0).micro_batches for row in rank]
    tokens = plan.lengths.prompt + plan.lengths.completion_tokens(plan.roles)
    fullest = max(rows, key=lambda row: int(tokens[row].sum()))
    examples = [_empty_example(plan, row, geometry) for row in fullest]
    return collate(examples, geometry, IMAGE_TOKEN, image_trees=plan.settings.image_trees)


def _empty_example(plan: Plan, row: int, geometry: ImageGeometry) -> Example:
    lengths = plan.lengths
    prompt = np.full(lengths.prompt[row], TEXT_TOKEN)
    end = lengths.image_prefix[row]
    prompt[end - lengths.image[row] : end] = IMAGE_TOKEN
    num_images = int(lengths.image[row]) // geometry.num_tokens
    return Example(
        row,
        prompt,
        [Completion(role, np.full(count, TEXT_TOKEN)) for role in plan.roles if (count := getattr(lengths, role)[row])],
        pixels=[torch.zeros(3, geometry.size, geometry.size, dtype=torch.uint8)] * num_images,
        image_ids=[f"{lengths.image_prefix_hash[row]}-{number}" for number in range(num_images)],
    )


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scaled_dot_product_attention by a fused kernel. On the meta device torch would hold the scores of all pairs."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # torch, too, makes numbers of it, which are kept
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


# For tensors of the meta device alone, on which nothing but a measurement runs.
_LIBRARY = torch.library.Library("aten", "IMPL")
_LIBRARY.impl("scaled_dot_product_attention", _attend, "AutogradMeta")
