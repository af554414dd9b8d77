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


class _TokenLogps(torch.autograd.Function):
    """log softmax(hidden @ weight.T + bias)[target], recomputing the logits chunk by chunk in backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target_ids: Tensor) -> Tensor:
        logps = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        normalizer = torch.empty_like(logps)  # log sum exp, so that backward need not reduce again
        for rows in _chunks(hidden.shape[0], weight.shape[0]):
            logits = F.linear(hidden[rows], weight, bias).float()  # [chunk, V]
            normalizer[rows] = torch.logsumexp(logits, dim=-1)
            logps[rows] = logits.gather(1, target_ids[rows, None])[:, 0] - normalizer[rows]
        ctx.save_for_backward(hidden, weight, bias, target_ids, normalizer)
        return logps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (grad_logps,) = grads
        hidden, weight, bias, target_ids, normalizer = ctx.saved_tensors
        need_hidden, need_weight, need_bias, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        # Summed in fp32: with bf16 weights, adding hundreds of chunks in bf16 would lose the small ones.
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need_weight else None
        grad_bias = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device) if need_bias else None
        for rows in _chunks(hidden.shape[0], weight.shape[0]):
            logits = F.linear(hidden[rows], weight, bias).float()
            # d logp / d logits = onehot(target) - softmax
            grad_logits = torch.exp(logits - normalizer[rows, None]).mul_(-grad_logps[rows, None])
            grad_logits.scatter_add_(1, target_ids[rows, None], grad_logps[rows, None])
            del logits
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
            grad_logits = grad_logits.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.T @ hidden[rows]
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
            None,
        )


def _chunks(num_rows: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_LOGITS // vocabulary)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def token_logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, target_ids: Tensor) -> Tensor:
    """float32[N] log-probs of `target_ids` int64[N] from hidden [N, D], weight [V, D], bias [V] or None."""
    return _TokenLogps.apply(hidden, weight, bias, target_ids)


class LMHead(nn.Linear):
    """A vocabulary head that also scores targets: `head(hidden)` gives logits, `head(hidden, target_ids)` log-probs.

    One module call scores all chunks. Under ZeRO-3 a weight is gathered per module call, so ranks whose chunk counts
    differ would otherwise wait for each other in different collectives.
    """

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
        return token_logps(input, self.weight, self.bias, target_ids)
