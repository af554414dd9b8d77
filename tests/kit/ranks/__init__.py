"""Tests on real ranks: processes over gloo, a wall limit, and no mock of DeepSpeed.

`run_ranks("tests.kit.ranks.scenarios:zero_stages", 2, folder)` starts two processes that each call
`zero_stages(folder)`. Importing torch, transformers and deepspeed takes a process about ten seconds, so a scenario
runs many small cases and leaves its numbers in `folder`; the tests in `tests/ranks/` compare them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from pivot.system.process import free_port

ROOT = Path(__file__).resolve().parents[3]
COLLECTIVE_TIMEOUT_S = 180.0  # a hang shows as this; on a busy machine ranks may well start a minute apart


def run_ranks(scenario: str, num_ranks: int, folder: Path, *, limit_s: float = 600.0) -> None:
    """Run `module:function` on `num_ranks` ranks; AssertionError with the ranks' output when one fails or hangs."""
    folder.mkdir(parents=True, exist_ok=True)
    processes, port = [], free_port()
    for rank in range(num_ranks):
        log = (folder / f"{scenario.partition(':')[2]}-rank{rank}.log").open("w+")
        command = [sys.executable, "-m", "tests.kit.ranks", scenario, str(folder)]
        environment = rank_environment(rank, num_ranks, port=port)
        processes.append((subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log), log))
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline and any(process.poll() is None for process, _ in processes):
        if any(process.poll() not in (None, 0) for process, _ in processes):
            break
        time.sleep(0.1)
    codes = [process.poll() for process, _ in processes]
    for process, _ in processes:
        process.kill()
        process.wait()
    texts = []
    for rank, (_, log) in enumerate(processes):
        log.seek(0)
        texts.append(f"--- rank {rank}: exit {codes[rank]}\n{log.read()[-6000:]}")
        log.close()
    assert codes == [0] * num_ranks, f"{scenario} on {num_ranks} ranks (exit None: still running)\n" + "\n".join(texts)


def rank_environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    names |= {"LOCAL_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    fixed = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return os.environ | fixed | {name: str(value) for name, value in names.items()}
