"""The value that TRL gives to a preference loss, and to KTO's."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from pivot.objectives.losses import NumTokens
from tests.kit.single_answers import Answer


def trl_loss(
    loss_types: dict[str, float],
    scores,
    lengths: NumTokens,
    beta: float,
    smoothing: float = 0.0,
    divergence: str = "reverse_kl",
    alpha: float = 0.5,
    tau: float = 0.05,
):
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
        "f_divergence_type": divergence,
        "f_alpha_divergence_coef": alpha,
        "args": SimpleNamespace(discopop_tau=tau),
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


def trl_kto_loss(answers: list[Answer], beta: float, weights: tuple[float, float], loss_type: str = "kto"):
    """(loss, metrics) of TRL's KTOTrainer._compute_loss, run unchanged on a trainer without weights."""
    trainer_module = pytest.importorskip("trl.trainer.kto_trainer")
    trainer = object.__new__(trainer_module.KTOTrainer)
    trainer.__dict__ |= {
        "model": SimpleNamespace(training=True),
        "accelerator": SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x),
        "_metrics": {"train": defaultdict(list)},
        "loss_type": loss_type,
        "calculate_KL": loss_type == "kto",
        "beta": beta,
        "desirable_weight": weights[0],
        "undesirable_weight": weights[1],
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    own, other = ([getattr(answer, name) for answer in answers] for name in ("logps", "other_logps"))
    outputs = {number: _padded(logps) for number, logps in enumerate((own, other))}
    inputs = {
        "label": torch.tensor([answer.desirable for answer in answers]),
        "ref_logps": torch.tensor([answer.reference for answer in answers]),
        "ref_KL_logps": torch.tensor([answer.other_reference for answer in answers]),
    }
    for number, prefix in enumerate(("", "KL_")):  # token ids that say which of the two is meant
        mask = torch.nn.functional.pad((outputs[number] != 0).long(), (1, 0))  # a prompt token
        inputs |= {f"{prefix}input_ids": torch.full_like(mask, number), f"{prefix}completion_mask": mask}
        inputs[f"{prefix}attention_mask"] = torch.ones_like(mask)

    def model(*, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        logps = outputs[int(input_ids[0, 0])]
        return SimpleNamespace(log_probs=logps, entropy=torch.zeros_like(logps), mean_logits=torch.zeros_like(logps))

    loss = trainer._compute_loss(model, inputs, return_outputs=False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def _padded(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
