"""What a run uses up, over all of its resumes, and how that compares to what the user names."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from pivot.config import CompareConfig
from pivot.system.distributed import World


@dataclass
class Spent:
    """Sums since the run's first step. Work that a crash threw away counts in the hours of its process alone."""

    gpu_hours: float = 0.0  # wall clock x GPUs, from the loading of weights: scoring and evaluation count, too
    core_hours: float = 0.0  # wall clock x threads, where it ran on CPUs
    pairs: int = 0  # SFT: samples
    tokens: int = 0  # of the rows, image tokens among them
    flops: float = 0.0  # useful ones: see flops.py
    save_s: float = 0.0  # of the wall clock, that training waited for its checkpoints

    def add(self, **amounts: float) -> None:
        for name, amount in amounts.items():
            setattr(self, name, getattr(self, name) + type(getattr(self, name))(amount))

    def resume_from(self, saved: dict[str, float]) -> None:
        """Add what a checkpoint holds: nothing before 0.3, and for a while also `hardware_flops`, which is left out."""
        known = {field.name for field in fields(self)}
        self.add(**{name: amount for name, amount in saved.items() if name in known})

    def row(self) -> dict[str, float]:
        """For the log: all but the hours of the kind of device that was not used."""
        return {name: value for name, value in asdict(self).items() if value or not name.endswith("_hours")}


class Clock:
    """Turns the time that passes into device-hours of `spent`; read it before the sums are saved or shown."""

    def __init__(self, spent: Spent, world: World) -> None:
        self._spent, self._last = spent, time.monotonic()
        on_gpu = world.device.type == "cuda"
        self._name = "gpu_hours" if on_gpu else "core_hours"
        self._devices = world.size * (1 if on_gpu else torch.get_num_threads())

    def read(self) -> Spent:
        now = time.monotonic()
        self._spent.add(**{self._name: (now - self._last) / 3600 * self._devices})
        self._last = now
        return self._spent


def compare_spent(spent: Spent, section: CompareConfig | None) -> dict[str, Any]:
    """{name, flops, samples, gpu_hours}: the run's part of each number that the user gave, 0.01 for a hundredth."""
    if section is None:
        return {}
    own = {"flops": spent.flops, "samples": spent.pairs, "gpu_hours": spent.gpu_hours}
    given = {name: getattr(section, name) for name in own}
    ratios = {name: own[name] / value for name, value in given.items() if value is not None}
    if not spent.gpu_hours:
        ratios.pop("gpu_hours", None)  # core-hours are no part of GPU-hours
    return {"name": section.name, **ratios}


def describe_spent(row: dict[str, Any], kind: str) -> str:
    """The log's `end` row in one line; `kind`: pairs or samples."""
    hours = [f"{row[name]:.3g} {label}" for name, label in _HOURS.items() if row.get(name)]
    amounts = [f"{_short(row['pairs'])} {kind}", f"{_short(row['tokens'])} tokens", f"{row['flops']:.3g} useful FLOP"]
    saving = [f"{row['save_s']:.3g} s of waiting for checkpoints"] if row.get("save_s") else []
    line = ", ".join([*hours, *amounts, *saving])
    compared = row.get("compare") or {}
    parts = [f"{_part(compared[name])} of its {label}" for name, label in _COMPARED.items() if name in compared]
    return f"{line}; beside {compared['name']}: {', '.join(parts)}" if parts else line


_HOURS = {"gpu_hours": "GPU-hours", "core_hours": "core-hours"}
_COMPARED = {"flops": "FLOPs", "samples": "samples", "gpu_hours": "GPU-hours"}


def _part(ratio: float) -> str:
    return f"1/{1 / ratio:,.0f}" if 0 < ratio < 0.1 else f"{ratio:.3g} times" if ratio > 1 else f"{100 * ratio:.3g} %"


def _short(count: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:,.0f}"
