"""Start a training script on this machine under DeepSpeed's launcher: `run_here("train_dpo.py", [CONFIG, ...])`."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from command import AGAIN, FAILED, INTERRUPTED, OK
from stopping import run_until_stopped

ROOT = Path(__file__).resolve().parent.parent
CPU_PROCESSES = 2


def count_processes() -> int:
    """NPROC, else one a GPU, else two on the CPU."""
    if os.environ.get("NPROC", "").strip():
        return int(os.environ["NPROC"])
    import torch

    return torch.cuda.device_count() or CPU_PROCESSES


def has_gpu() -> bool:
    """Whether there is a device that a launcher should see; one that torch cannot use counts, training names it."""
    import torch

    return torch.cuda.is_available() or Path("/dev/nvidia0").exists()


def shown_command(script: str, words: list[str]) -> str:
    """What a person would type for `run_here`."""
    return shlex.join(["deepspeed", "--num_gpus", str(count_processes()), f"launch/{script}", *words])


def run_here(script: str, words: list[str]) -> tuple[int, bool]:
    """The exit code of launch/SCRIPT with `words` (CONFIG key=value ...), and whether a signal stopped it."""
    from pivot.system.process import free_port  # here, so that importing this file needs nothing installed

    processes = count_processes()
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(processes)]
    # Two runs at once need two ports. What the launcher has to say is said here, and by the ranks.
    command += ["--master_port", str(free_port()), "--log_level", "critical", f"launch/{script}", *words]
    threads = max(1, (os.cpu_count() or 1) // processes)
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    if not has_gpu():
        environment = {"DS_ACCELERATOR": "cpu"} | environment  # else each of DeepSpeed's processes says so
    return run_until_stopped(command, environment, ROOT)


def is_done(folder: Path) -> bool:
    """Whether the run in `folder` came to its end."""
    from pivot.run.status import DONE
    from pivot.system.files import read_object

    return read_object(folder / "status").get("status") == DONE


def run_to_end(title: str, script: str, words: list[str], folder: Path) -> int:
    """OK when the run in `folder` is done, now or before. FAILED; or INTERRUPTED or AGAIN when a signal stopped it."""
    if is_done(folder):
        print(f"\n== {title} is done", flush=True)
        return OK
    print(f"\n== {title}\n$ {shown_command(script, words)}", flush=True)
    code, stopped = run_here(script, words)
    if stopped or code == AGAIN:
        print(f"\n{title} was stopped; the same command goes on where it was", file=sys.stderr)
        return INTERRUPTED if stopped else AGAIN
    if code == OK and is_done(folder):
        return OK
    print(f"error: {title} failed; its reason is above and in {folder / 'status'}", file=sys.stderr)
    return FAILED
