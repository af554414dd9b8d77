"""What of the machine's memory this process can have: all of it, or what a container or a job of SLURM leaves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
# Version of control groups -> where they are mounted; files with the limit and with what is taken of it; the line of
# memory.stat that says how much of that are pages of files, which the kernel gives up when memory is asked for.
_GROUPS = {
    "2": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "1": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def total_bytes() -> float:
    """The machine's memory, or the limit of the tightest control group around this process."""
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min([total, *(limit for limit, _ in _limits())])


def available_bytes() -> float:
    """What can still be had without swapping; where the system does not tell, `total_bytes`."""
    lines = _read(ROOT / "proc/meminfo").splitlines()
    free = [1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return max(0.0, min([*(free or [total_bytes()]), *(limit - taken for limit, taken in _limits())]))


def _limits() -> Iterator[tuple[float, float]]:
    """(limit, taken) of each control group that this process is in, the innermost first."""
    for line in _read(ROOT / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            mount, limit_file, taken_file, given_up = _GROUPS["1" if controllers else "2"]
            top = ROOT / mount
            own = top / path.lstrip("/")  # in a container it may be the host's path, which is not there
            for group in (own, *own.parents):
                limit = _read(group / limit_file).strip()
                if limit.isdecimal():
                    yield float(limit), _taken(group, taken_file, given_up)
                if group == top:
                    break


def _taken(group: Path, taken_file: str, given_up: str) -> float:
    told = _read(group / "memory.stat").splitlines()
    files = [int(line.split()[1]) for line in told if line.startswith(f"{given_up} ")]
    taken = _read(group / taken_file).strip()
    return float(taken if taken.isdecimal() else 0) - sum(files)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
