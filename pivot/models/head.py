"""Hidden states -> float32 log-probabilities of chosen targets, without ever holding their logits.

Letters: N targets, D hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# One chunk's logits in fp32 take 4 bytes each: 2**25 is 128 MiB, and 220 rows of a 152k vocabulary are still a matrix
# product that fills a GPU. Peak memory of the head is a few such chunks, whatever the length and the vocabulary.
CHUNK_LOGITS = 2**25


# Exponentials of logits that are no more than this are kept for backward, not computed twice: 16 MiB at the most.
KEPT_LOGITS = 2**22


class _TokenLogps(torch.autograd.Function):
    """log softmax(hidden @ weight.T + bias)[target], recomputing the logits chunk by chunk in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target_ids: Tensor,
        adds_in_place: bool,
    ) -> Tensor:
        ctx.leaf = weight if adds_in_place else None  # what is saved may come back as another tensor, without `.grad`
        logps = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        normalizer = torch.empty_like(logps)  # log sum exp, so that backward need not reduce again
        for rows in _chunks(hidden.shape[0], weight.shape[0]):
            logits = F.linear(hidden[rows], weight, bias).float()  # [chunk, V]
            chosen, highest = logits.gather(1, target_ids[rows, None]), logits.amax(1, keepdim=True)
            powers = logits.sub_(highest).exp_()  # in place: one chunk is held, and each exponential taken once
            total = powers.sum(1, keepdim=True)
            normalizer[rows] = (highest + total.log())[:, 0]
            logps[rows] = chosen[:, 0] - normalizer[rows]
        kept = (powers, total) if hidden.shape[0] and keeps_logits(hidden.shape[0], weight.shape[0]) else (None, None)
        ctx.save_for_backward(hidden, weight, bias, target_ids, normalizer, *kept)
        return logps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        (grad_logps,) = grads
        hidden, weight, bias, target_ids, normalizer, powers, total = ctx.saved_tensors
        need_hidden, need_weight, need_bias, *_ = ctx.needs_input_grad
        # Blocks of words, not of rows: each word's gradient is then one matrix product over all targets, written where
        # it belongs. Blocks of rows would need a second gradient of the head, in fp32, to add up in.
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device) if need_hidden else None
        so_far = ctx.leaf.grad if ctx.leaf is not None and need_weight else None
        if so_far is not None:
            ctx.leaf.grad = None  # autograd takes the sum over as it is; with a gradient there it would add and copy
        grad_weight = so_far if so_far is not None else torch.empty_like(weight) if need_weight else None
        grad_bias = torch.empty_like(bias) if need_bias else None
        for words in _chunks(weight.shape[0], hidden.shape[0]):
            # d logp / d logits = onehot(target) - softmax
            if powers is None:
                some_bias = None if bias is None else bias[words]
                logits = F.linear(hidden, weight[words], some_bias).float()  # [N, words]
                grad_logits = logits.sub_(normalizer[:, None]).exp_().mul_(-grad_logps[:, None])
            else:
                grad_logits = powers.mul_(-grad_logps[:, None] / total)  # in place: a second backward is an error
            inside = (target_ids >= words.start) & (target_ids < words.stop)
            column = (target_ids - words.start).clamp(0, words.stop - words.start - 1)
            grad_logits.scatter_add_(1, column[:, None], torch.where(inside, grad_logps, 0.0)[:, None])
            if grad_bias is not None:
                grad_bias[words] = grad_logits.sum(0)
            grad_logits = grad_logits.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden += grad_logits @ weight[words]
            if grad_weight is not None:
                block = grad_weight[words]
                torch.addmm(block, grad_logits.T, hidden, beta=0 if so_far is None else 1, out=block)
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias, None, None


def keeps_logits(num_targets: int, vocabulary: int) -> bool:
    """Whether backward finds the logits of so few targets, rather than computing them again."""
    return num_targets * vocabulary <= min(KEPT_LOGITS, CHUNK_LOGITS)


def _chunks(length: int, across: int) -> list[slice]:
    """`length` in pieces such that a piece times `across` is no more than CHUNK_LOGITS."""
    size = max(1, CHUNK_LOGITS // max(1, across))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_ids: Tensor,
    *,
    adds_in_place: bool = False,
) -> Tensor:
    """float32[N] log-probs of `target_ids` int64[N] from hidden [N, D], weight [V, D], bias [V] or None.

    With `adds_in_place` backward adds to a `weight.grad` where it lies, so that a step's later micro-batches need no
    second gradient of the head's size. Not for `torch.autograd.grad`, which would find the earlier sum in its result.
    """
    return _TokenLogps.apply(hidden, weight, bias, target_ids, adds_in_place)


class LMHead(nn.Linear):
    """A vocabulary head that also scores targets: `head(hidden)` gives logits, `head(hidden, target_ids)` log-probs.

    One module call scores all chunks. Under ZeRO-3 a weight is gathered per module call, so ranks whose chunk counts
    differ would otherwise wait for each other in different collectives.
    """

    adds_in_place = False  # see `token_logps`: for an engine that leaves gradients in `.grad` until the step

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> LMHead:
        """The same head around the same parameters, so that tied embeddings stay tied."""
        with torch.device("meta"):
            head = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        head.weight = linear.weight
        head.bias = linear.bias
        return head

    def forward(self, input: Tensor, target_ids: Tensor | None = None) -> Tensor:
        if target_ids is None:
            return super().forward(input)
        return token_logps(input, self.weight, self.bias, target_ids, adds_in_place=self.adds_in_place)
