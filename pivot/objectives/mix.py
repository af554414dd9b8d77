"""The settings of `objective.dpo`, checked: the names of the mix, and options that its losses read."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pivot.objectives.losses import LOSSES, OF_THE_MARGIN, options_of
from pivot.objectives.step_losses import STEP_LOSSES

if TYPE_CHECKING:
    from pivot.config import DPOConfig

REVERSE_KL = "reverse_kl"  # the divergence of DPO itself
SFT = "sft"  # the mix's NLL on the chosen completions, per chosen token; the other terms are per pair
ALL_LOSSES = LOSSES | STEP_LOSSES


def read_mix(loss: str | Mapping[str, float]) -> dict[str, float]:
    """name -> weight, of a name or a mix. ValueError for a name that no loss has, and where nothing weighs."""
    mix = {loss: 1.0} if isinstance(loss, str) else {str(name): float(weight) for name, weight in loss.items()}
    known = [*ALL_LOSSES, SFT]
    for name in mix:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"objective.dpo.loss: found '{name}', expected one of {', '.join(known)}{hint}")
    if not any(weight > 0 for weight in mix.values()):
        raise ValueError(f"objective.dpo.loss: found {mix}, expected at least one weight above 0")
    return mix


def check_options(section: DPOConfig, names: set[str]) -> None:
    """ValueError for an option that the losses `names` of a mix do not read, or cannot follow."""
    _refuse_unread_options(section, names)
    _check_divergence(section, names)
    if "exo_pair" in names and section.label_smoothing == 0:
        raise ValueError(
            "objective.dpo.label_smoothing: found 0, with which exo_pair is infinite; set it, the paper's is 0.001"
        )


def _refuse_unread_options(section: DPOConfig, names: set[str]) -> None:
    """ValueError for an option that is not at its default, and that no loss of the mix takes: it would do nothing."""
    takers: dict[str, list[str]] = {}
    for name, loss in ALL_LOSSES.items():
        for option in options_of(loss):
            takers.setdefault(option, []).append(name)
    del takers["beta"]  # the rewards that are shown have it, whatever the loss
    for spec in dataclasses.fields(section):
        value = getattr(section, spec.name)
        if spec.name in takers and value != spec.default and not names & set(takers[spec.name]):
            raise ValueError(
                f"objective.dpo.{spec.name}: found {value}, but {names_text(names)} does not read it; "
                f"remove it, or choose a loss that does: {', '.join(sorted(takers[spec.name]))}"
            )


def _check_divergence(section: DPOConfig, names: set[str]) -> None:
    """ValueError for a divergence that a loss of the mix has no form for, and for an alpha that none reads."""
    kind, coefficient = section.f_divergence_type, section.f_alpha_divergence_coef
    others = sorted(names - OF_THE_MARGIN - {SFT})
    if kind != REVERSE_KL and (others or names == {SFT}):
        raise ValueError(
            f"objective.dpo.f_divergence_type: found {kind}, but {', '.join(others) or SFT} has no form for it; set it "
            f"to {REVERSE_KL}, or choose among the losses of a margin: {', '.join(sorted(OF_THE_MARGIN))}"
        )
    default = type(section)().f_alpha_divergence_coef
    if kind != "alpha_divergence" and coefficient != default:
        raise ValueError(
            f"objective.dpo.f_alpha_divergence_coef: found {coefficient}, but f_divergence_type is {kind}, which has "
            "none; remove it, or set f_divergence_type to alpha_divergence"
        )


def names_text(names: Any) -> str:
    return f"the loss {' + '.join(sorted(names))}"
