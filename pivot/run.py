"""The run directory: who may write into it, whether a start goes on from what is there, and how a run ended.

config.yaml  log.jsonl  checkpoints/  export/  status
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import socket
from pathlib import Path
from typing import IO, Any

from pivot.checkpoint import published
from pivot.config import Config, ConfigError
from pivot.config_load import load_config, to_yaml
from pivot.files import write_atomically

# What a resume may change: nothing here decides which numbers a step computes.
_FREE_ON_RESUME = (
    "output_dir",
    "deepspeed",
    "log",
    "checkpoint",
    "evaluate",
    "data.eval",
    "data.train",  # the plan compares the data's fingerprint, so a set may move
    "data.workers",
    "data.cache_dir",
    "objective.dpo.reference_per_token",
    "data.shard_cache",
    "data.shard_cache_gb",
    "data.allow_pipe",
    "train.max_tokens_per_micro_batch",
    "train.activation_checkpointing",
    "train.attention",
    "train.timeout_s",
)


class RunFolder:
    """`output_dir` of one run, held by one process at a time (rank 0's)."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.export = self.path / "export"
        self._lock: IO[str] | None = None

    def claim(self, config: Config) -> dict[str, Any]:
        """Take the lock and settle whether the folder may be used, as `checkpoint.resume` says; write config.yaml.

        Returns the status that the run had before, {} for a new one.
        Raises ConfigError when the folder is another run's or holds something else, when nothing is there to resume
        and something was required, and when a second process is writing there. Nothing is changed in that case.
        """
        config_file = self.path / "config.yaml"
        inside = [p.name for p in self.path.iterdir() if p.name not in ("lock", "cache")] if self.path.is_dir() else []
        if config.checkpoint.resume == "none" and inside:
            raise ConfigError(f"output_dir: {self.path} is not empty and checkpoint.resume is none; choose another")
        if inside and not config_file.is_file():
            raise ConfigError(
                f"output_dir: {self.path} holds files but no config.yaml, so it is no run; choose another"
            )
        if config.checkpoint.resume == "required" and not (self.checkpoints / "latest").is_file():
            raise ConfigError(f"checkpoint.resume: required, but {self.checkpoints} holds no checkpoint to go on from")
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        if config_file.is_file() and published(self.checkpoints):  # without a checkpoint there is nothing to mix up
            require_same_run(load_config(config_file), config)
        write_atomically(config_file, to_yaml(config))
        status = self.path / "status"
        before = json.loads(status.read_text()) if status.is_file() else {}
        self.set_status("running")
        return before

    def _take_lock(self) -> None:
        # The kernel lets go of it when the process dies, so there is no stale lock to handle.
        self._lock = (self.path / "lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.seek(0)
            raise ConfigError(f"output_dir: {self.path} is being written by {self._lock.read().strip()}") from error
        self._lock.truncate(0)
        job = os.environ.get("SLURM_JOB_ID")
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}" + (f", job {job}" if job else ""))
        self._lock.flush()

    def set_status(self, status: str, **facts: Any) -> None:
        """running, done, preempted or failed: what a job script tests, since launchers lose exit codes."""
        write_atomically(self.path / "status", json.dumps({"status": status} | facts) + "\n")


def require_same_run(before: Config, now: Config) -> None:
    """ConfigError that lists every setting that changed and must not (see _FREE_ON_RESUME)."""
    old, new = _flatten(before), _flatten(now)
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    changed = [key for key in changed if not any(key == free or key.startswith(f"{free}.") for free in _FREE_ON_RESUME)]
    if "train.max_steps" in changed and _only_longer(before, now):
        changed.remove("train.max_steps")
    if changed:
        listed = "; ".join(f"{key} was {old.get(key)}, is {new.get(key)}" for key in changed)
        raise ConfigError(
            f"output_dir: {now.output_dir} holds a run with other settings ({listed}); "
            "set them back to go on, or choose another output_dir"
        )


def _only_longer(before: Config, now: Config) -> bool:
    """More steps change nothing that was done, but only where the rate does not depend on the total."""
    old, new = before.train.max_steps, now.train.max_steps
    constant = now.optim.schedule == "constant" and now.optim.warmup_ratio == 0.0
    return constant and old is not None and new is not None and new > old


def _flatten(section: Any, prefix: str = "") -> dict[str, Any]:
    if not dataclasses.is_dataclass(section):
        return {prefix: section}
    flat: dict[str, Any] = {}
    for spec in dataclasses.fields(section):
        flat |= _flatten(getattr(section, spec.name), f"{prefix}.{spec.name}" if prefix else spec.name)
    return flat
