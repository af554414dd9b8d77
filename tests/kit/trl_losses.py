"""The value that TRL gives to a preference loss."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from pivot.objectives.losses import NumTokens


def trl_loss(loss_types: dict[str, float], scores, lengths: NumTokens, beta: float, smoothing: float = 0.0):
    """(loss, metrics) of TRL's DPOTrainer._compute_loss, run unchanged on a trainer without weights.

    The model is a stand-in that returns the log-probs it is given; everything behind it is TRL's code.
    """
    trainer_module = pytest.importorskip("trl.trainer.dpo_trainer")
    trainer = object.__new__(trainer_module.DPOTrainer)
    trainer.__dict__ |= {
        "model": SimpleNamespace(training=True),
        "accelerator": SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        "_metrics": {"train": defaultdict(list)},
        "loss_types": list(loss_types),
        "loss_weights": list(loss_types.values()),
        "beta": beta,
        "label_smoothing": smoothing,
        "f_divergence_type": "reverse_kl",
        "ld_alpha": None,
        "use_weighting": False,
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    policy = torch.cat(scores[:2])
    counts = torch.cat(list(lengths))
    width = int(counts.max())
    mask = torch.arange(width)[None, :] < counts[:, None]
    per_token = torch.where(mask, (policy / counts)[:, None], 0.0)
    completion_mask = torch.cat([torch.zeros(len(counts), 1, dtype=torch.int64), mask.long()], dim=1)  # a prompt token
    zeros = torch.zeros_like(per_token)
    outputs = SimpleNamespace(log_probs=per_token, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    inputs = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
        "ref_chosen_logps": scores[2],
        "ref_rejected_logps": scores[3],
    }
    loss = trainer._compute_loss(lambda **_: outputs, inputs, return_outputs=False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}
