"""Memory as control groups leave it: of a container, of a job of SLURM, of a machine without any."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pivot.system import host_memory
from pivot.system.host_memory import available_bytes, total_bytes

GIB = 2**30
MACHINE = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(host_memory, "ROOT", tmp_path)
    write(tmp_path, {"proc/meminfo": f"MemTotal: 9 kB\nMemAvailable: {2 * GIB // 1024} kB\n"})
    return tmp_path


def write(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


def test_without_groups_it_is_the_machine_s(root: Path) -> None:
    assert (total_bytes(), available_bytes()) == (MACHINE, 2 * GIB)


def test_where_nothing_is_told_all_of_it(root: Path) -> None:
    (root / "proc/meminfo").unlink()
    assert available_bytes() == MACHINE


def test_the_tightest_group_around_it_counts(root: Path) -> None:
    """As SLURM nests them: the job's limit holds for the task below it. Pages of files are given up when asked for:
    1 GiB less 0.75 taken, of which 0.5 are files."""
    job = "sys/fs/cgroup/system.slice/job_7"
    write(
        root,
        {
            "proc/self/cgroup": "0::/system.slice/job_7/step_0\n",
            f"{job}/step_0/memory.max": "max\n",
            f"{job}/memory.max": f"{GIB}\n",
            f"{job}/memory.current": f"{3 * GIB // 4}\n",
            f"{job}/memory.stat": f"anon 5\ninactive_file {GIB // 2}\nactive_file 7\n",
            "sys/fs/cgroup/memory.max": f"{8 * GIB}\n",
            "sys/fs/cgroup/memory.current": "0\n",
        },
    )
    assert (total_bytes(), available_bytes()) == (GIB, 0.75 * GIB)


def test_version_1_in_a_container_that_sees_the_host_s_path(root: Path) -> None:
    write(
        root,
        {
            "proc/self/cgroup": "4:memory:/docker/abc\n1:cpu:/\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GIB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {GIB // 2}\n",
        },
    )
    assert (total_bytes(), available_bytes()) == (GIB, 0.0)


def test_no_limit_of_version_1_is_a_huge_one(root: Path) -> None:
    write(
        root,
        {
            "proc/self/cgroup": "4:memory:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{2 * GIB}\n",
        },
    )
    assert (total_bytes(), available_bytes()) == (MACHINE, 2 * GIB)
