"""From encoder features to the language model's embeddings; names and maths as in HF LLaVA."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Projector(nn.Module):
    """`mlp2x_gelu`: linear_1, exact GELU, linear_2. `linear`: linear_1 alone."""

    def __init__(self, kind: str, in_width: int, out_width: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if kind not in ("mlp2x_gelu", "linear"):
            raise ValueError(f"model.projector: found '{kind}', expected mlp2x_gelu or linear")
        self.kind = kind
        self.linear_1 = nn.Linear(in_width, out_width, dtype=dtype)
        if kind == "mlp2x_gelu":
            self.act = nn.GELU()
            self.linear_2 = nn.Linear(out_width, out_width, dtype=dtype)

    def forward(self, features: Tensor) -> Tensor:
        """[..., in_width] -> [..., out_width]"""
        hidden = self.linear_1(features)
        return self.linear_2(self.act(hidden)) if self.kind == "mlp2x_gelu" else hidden
