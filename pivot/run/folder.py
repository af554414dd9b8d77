"""The run directory: who may write into it, whether a start goes on from what is there, and how a run ended.

config.yaml  run.json  log.jsonl  checkpoints/  export/  status (status.py)
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pivot.config import KEYS, Config, ConfigError, flatten
from pivot.config_load import load_saved, to_yaml
from pivot.models.parts import is_model
from pivot.run.checkpoint import MANIFEST, VISIBLE_WITHIN_S, published, step_of, sweep
from pivot.run.status import DONE, RUNNING, RunStatus, is_status, last_sign
from pivot.system.files import read_object, write_atomically, write_json
from pivot.system.lock import FileLock, Held
from pivot.system.redact import redact_values

# What may lie in a folder that is no run yet: our own first files, and what job schedulers, launchers, file systems and
# dying processes leave behind. Everything else may be somebody's work.
_OWN = ("lock", "cache", "run.json", "stop", "save", "stacks*", "*.part")
_LITTER = ("*.out", "*.err", "*.log", "log", "logs", "slurm*", "core", "core.*", ".*", "lost+found", "Thumbs.db")
# Errors that another output_dir mends, unlike those of a disk that is full or broken.
_MENDABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}
_MENDABLE |= {errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}


class RunFolder:
    """`output_dir` of one run, held by one process at a time (rank 0's)."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.export = self.path / "export"
        self.id = ""  # of the run, drawn at its first start; "" for one that was begun before runs had ids
        self._lock = FileLock(self.path / "lock")
        self.status = RunStatus(self.path, self._lock)

    def check(self, config: Config) -> None:
        """ConfigError where `output_dir` cannot become or go on being this run's folder; nothing is changed."""
        with _in_words(self.path):
            inside = self._list()
            for name, folder in (("checkpoints", True), ("export", True), ("log.jsonl", False), ("status", False)):
                path = self.path / name
                if os.path.lexists(path) and path.is_dir() != folder:
                    expected = "a folder" if folder else "a file"
                    raise ConfigError(f"output_dir: {path} is not {expected}; move it away, or choose another")
        left = [name for name in inside if not any(fnmatch(name, pattern) for pattern in _OWN + _LITTER)]
        if config.checkpoint.resume == "none" and left:
            raise ConfigError(
                f"output_dir: {self.path} is not empty ({left[0]}) and checkpoint.resume is none; choose another"
            )
        if left and not (self.path / "config.yaml").is_file():
            raise ConfigError(
                f"output_dir: {self.path} holds files but no config.yaml, so it is no run ({left[0]}); choose another"
            )
        if config.checkpoint.resume == "required" and not published(self.checkpoints):
            raise ConfigError(f"checkpoint.resume: required, but {self.checkpoints} holds no checkpoint to go on from")

    def _list(self) -> list[str]:
        """The names in the folder, [] where it has yet to be made. OSError where it cannot be read, written or made."""
        if os.path.lexists(self.path):
            names = sorted(os.listdir(self.path))
            place = self.path
        else:
            names = []
            place = next(parent for parent in self.path.absolute().parents if os.path.lexists(parent))
            os.listdir(place)
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))
        return names

    def claim(self, config: Config, total_steps: int, say: Callable[[str], None]) -> int | None:
        """Take the folder as `checkpoint.resume` says; the steps of a run that is finished and exported, else None.

        Raises ConfigError when the folder is another run's or holds something else, when checkpoints that it should
        hold are not there, and when a second process is writing there. But for the lock, nothing is changed then.
        """
        self.check(config)
        with _in_words(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        known, status, folders = (
            read_object(self.path / "run.json"),
            self._read_status(say),
            published(self.checkpoints),
        )
        saved, exported = self._find_saved(known, status), is_model(self.export)
        if (self.path / "config.yaml").is_file() and (folders or saved or exported):  # else nothing can be mixed up
            require_same_run(self._read_settings(), config)
        steps = status.get("step") if status.get("status") == DONE and exported else None
        finished = steps if isinstance(steps, int) and steps >= total_steps else None
        if saved and not folders and finished is None:
            raise ConfigError(
                f"output_dir: {self.checkpoints} holds no checkpoint, but {saved}; put the checkpoints back to go on, "
                "or choose another output_dir to begin anew"
            )
        self._name_run(known, folders)
        write_atomically(self.path / "config.yaml", to_yaml(config))
        self._sweep(say)
        self.status.forget_requests(say)
        if finished is None:
            self.status.begin()
        return finished

    def require_shared(self, rank: int) -> None:
        """ConfigError unless this rank sees what rank 0 has written here, and may write beside it: else that would be
        found behind the first checkpoint."""
        deadline = time.monotonic() + VISIBLE_WITHIN_S
        while read_object(self.path / "run.json").get("id") != self.id:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"output_dir: rank {rank} does not see what rank 0 wrote into {self.path}; give a folder on a disk "
                    "that all machines share"
                )
            time.sleep(0.1)
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise ConfigError(
                f"output_dir: {self.path} cannot be written by rank {rank}; mount it there as on rank 0's machine, or "
                "choose another"
            )

    def _read_status(self, say: Callable[[str], None]) -> dict[str, Any]:
        path = self.path / "status"
        status = read_object(path)
        if path.is_file() and not is_status(status):
            say(f"warning: {path} is damaged and is not used; the checkpoints say where to go on")
            return {}
        if status.get("status") == RUNNING:  # whoever wrote that has let go of the lock
            say(f"status     the start before this one ended and left no reason; {last_sign(status)}".rstrip("; "))
        return status

    def newest_step(self) -> int:
        """The step of the newest checkpoint that is published; 0 where there is none."""
        folders = published(self.checkpoints)
        return step_of(folders[-1]) if folders else 0

    def _find_saved(self, known: dict[str, Any], status: dict[str, Any]) -> str:
        """What says that the run has saved a checkpoint; "" where nothing does."""
        if (self.checkpoints / "latest").exists():
            return f"{self.checkpoints / 'latest'} names one"
        for name, value in (("run.json", known.get("saved")), ("status", status.get("step"))):
            if isinstance(value, int) and value > 0:
                return f"{self.path / name} tells of step {value}"
        return ""

    def _read_settings(self) -> Config:
        path = self.path / "config.yaml"
        try:
            return load_saved(path)
        except ConfigError as error:
            raise ConfigError(
                f"output_dir: {path} cannot be read, so nothing tells whether this is the same run ({error}); write it "
                "from the YAML that the run was started with, or choose another output_dir"
            ) from error

    def _name_run(self, known: dict[str, Any], folders: list[Path]) -> None:
        """Read the run's id, or take it from its newest checkpoint, or draw it."""
        if isinstance(known.get("id"), str):
            self.id = known["id"]
            return
        self.id = str(read_object(folders[-1] / MANIFEST).get("run", "")) if folders else secrets.token_hex(8)
        write_json(self.path / "run.json", {"id": self.id})

    def note_saved(self, step: int) -> None:
        """Remember outside of checkpoints/ that it holds something: a run whose checkpoints are gone must not begin
        again in silence."""
        write_json(self.path / "run.json", {"id": self.id, "saved": step})

    def _sweep(self, say: Callable[[str], None]) -> None:
        """Remove what a killed process left half-written: this one holds the lock, so nobody writes there."""
        for folder in (self.path, self.checkpoints):
            for part in folder.glob("*.*[0-9].part"):
                with contextlib.suppress(OSError):
                    part.unlink()
        sweep(self.checkpoints, say)
        stacks, before = self.path / "stacks", self.path / "stacks-before"
        if stacks.exists():  # of a start that hung; in this one they would mean that a rank waits
            shutil.rmtree(before, ignore_errors=True)
            stacks.rename(before)

    def _take_lock(self) -> None:
        try:
            self._lock.take()
        except Held as held:
            sign = last_sign(read_object(self.path / "status"))
            raise ConfigError(
                f"output_dir: {self.path} is being written by {held}{f' ({sign})' if sign else ''}; wait for it to "
                "end, or choose another output_dir"
            ) from held

    def release(self) -> None:
        """Let another process have it."""
        self.status.close()
        self._lock.release()


@contextlib.contextmanager
def _in_words(path: Path) -> Iterator[None]:
    """What the file system says of `path`, as one sentence where another folder mends it."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL character
        if isinstance(error, OSError) and error.errno not in _MENDABLE:
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"output_dir: {str(path)[:200]} cannot be used ({reason}); give a folder that can be made and written to"
        ) from error


def require_same_run(before: Config, now: Config) -> None:
    """ConfigError that lists every setting that changed and must not (`resume` in pivot/config.py)."""
    old, new = flatten(before), flatten(now)
    changed = [key for key in sorted(old.keys() | new.keys()) if _shown(before, old, key) != _shown(now, new, key)]
    changed = [key for key in changed if not KEYS[key].resume]
    if "train.max_steps" in changed and _only_longer(before, now):
        changed.remove("train.max_steps")
    if changed:
        listed = "; ".join(f"{key} was {_shown(before, old, key)}, is {_shown(now, new, key)}" for key in changed)
        raise ConfigError(
            f"output_dir: {now.output_dir} holds a run with other settings ({listed}); "
            "set them back to go on, or choose another output_dir"
        )


def _shown(config: Config, flat: dict[str, Any], key: str) -> Any:
    """A setting as config.yaml has it: by what it refers to, and without passwords."""
    text = config.texts.get(tuple(key.split(".")))
    return text[0] if text is not None else redact_values(flat.get(key), key)


def settings_digests(config: Config, run_id: str) -> dict[str, str]:
    """For a checkpoint's manifest: a digest of each setting that a resume may not change and that is no default.

    The values themselves may be secrets; the id keeps two runs' digests from telling that they share one. config.yaml
    cannot tell that a variable of the environment has another value now, and a foreign checkpoint has none beside it.
    """
    digests = {}
    for name, value in flatten(config).items():
        key = KEYS[name]
        # Of an absent section there is a digest, too: it tells which objective the run has not.
        if not key.resume and name != "train.max_steps" and (key.section is not None or key.default != value):
            text = json.dumps([run_id, name, value], sort_keys=True, default=str)
            digests[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return digests


def require_own_checkpoint(folder: Path, manifest: dict[str, Any], config: Config, run_id: str) -> None:
    """ConfigError for a checkpoint of another run, or of other settings than this start's."""
    if manifest.get("run", "") != run_id:
        raise ConfigError(
            f"{folder} is a checkpoint of another run; take it out of {folder.parent} to go on with this one"
        )
    if "settings" not in manifest:  # written before checkpoints told them
        return
    before, now = manifest["settings"], settings_digests(config, run_id)
    # An absent section that the manifest does not tell of came with a later version, as another objective does.
    now = {key: digest for key, digest in now.items() if key in before or KEYS[key].section is None}
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        raise ConfigError(
            f"{folder} was written with another value of {', '.join(changed)} (where it refers to the environment, "
            "see there); set it back to go on, or choose another output_dir"
        )


def _only_longer(before: Config, now: Config) -> bool:
    """More steps change nothing that was done, but only where the rate does not depend on the total."""
    old, new = before.train.max_steps, now.train.max_steps
    constant = now.optim.schedule == "constant" and now.optim.warmup_ratio == 0.0
    return constant and old is not None and new is not None and new > old
