"""What a run's checkpoint holds beside DeepSpeed's own files, and going on from it: how far the run has come."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import pivot
from pivot.config import Config, ConfigError
from pivot.data.plan import Plan
from pivot.engine import Engine
from pivot.objectives import Objective
from pivot.run import checkpoint
from pivot.run.checkpoint import Unpublished
from pivot.run.folder import RunFolder, require_own_checkpoint, settings_digests
from pivot.run.guard import Recent
from pivot.run.log import RunLog
from pivot.run.spent import Spent
from pivot.system import distributed, host_memory
from pivot.system.distributed import World

ROOM_FOR_COPIES = 0.8  # of the memory that is free; the rest is for what else grows while they are there


@dataclass
class Progress:
    """How far a run has come; the same on every rank."""

    step: int = 0  # optimizer steps that are done
    masked: int = 0  # samples so far whose bytes were damaged
    spent: Spent = field(default_factory=Spent)
    recent: Recent = field(default_factory=Recent)


class RunState:
    """The parts of a run that a checkpoint holds: the engine's, the plan's, the objective's and the progress."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        engine: Engine,
        plan: Plan,
        objective: Objective,
        world: World,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._folder, self._world, self._say = config, folder, world, say
        self._engine, self._plan, self._objective = engine, plan, objective
        self._saving: Unpublished | None = None  # at most one is on its way
        self._wait_s = 0.0  # that training waited for it so far

    def restore(self, progress: Progress) -> None:
        """Go on from this run's own newest checkpoint, else from the start; said either way. Collective.

        ConfigError for a checkpoint of another run or shape, and where checkpoint.resume requires one.
        """
        resume = self._config.checkpoint.resume
        newest = None
        if resume != "none":
            newest = checkpoint.find(self._folder.checkpoints, self._world, self._say)
        if newest is None:
            if resume == "required":
                raise ConfigError(f"checkpoint.resume: required, but {self._folder.checkpoints} holds no checkpoint")
            start = f"init_from {self._config.init_from}" if self._config.init_from else "model.*"
            self._say(f"start      step 0, weights from {start}")
            return
        require_own_checkpoint(newest.folder, newest.manifest, self._config, self._folder.id)
        shape = self._shape()
        written = {name: newest.manifest[name] for name in shape}
        if written["dtype"] != shape["dtype"]:
            raise ConfigError(
                f"{newest.folder}: written in {written['dtype']}, this run computes in {shape['dtype']}; start it with "
                "the same train.precision to go on"
            )
        reshaped = written != shape
        progress.step = self._plan.check_state(newest.state["plan"])
        progress.masked = int(newest.state["plan"]["masked"])
        checkpoint.load(self._engine, newest, self._world, reshaped=reshaped)
        self._objective.load_state_dict(newest.state["objective"])
        progress.spent.resume_from(newest.state.get("spent", {}))
        progress.recent.resume_from(newest.state.get("recent", {}))
        ranks, stage = written["world_size"], written["zero_stage"]
        before = f" (written by {ranks} ranks under ZeRO-{stage})" if reshaped else ""
        self._say(f"start      step {progress.step}, resumed from {newest.folder}{before}")

    def _shape(self) -> dict[str, Any]:
        """What DeepSpeed's shards are cut by."""
        return {"world_size": self._world.size, "zero_stage": self._engine.stage, "dtype": str(self._engine.dtype)}

    def save(self, progress: Progress, log: RunLog, *, at_once: bool) -> None:
        """Save `progress`, behind the checkpoint that may be on its way. Collective.

        `at_once` it is there when this returns; else it may be on its way then, and `publish` commits it. RuntimeError
        where the state is not finite: no run comes back from that, so every checkpoint stays.
        """
        self.publish(progress, log)
        started = time.monotonic()
        if not self._engine.is_finite():
            raise RuntimeError(
                f"after step {progress.step} the weights or the optimizer's moments are not finite, so nothing was "
                f"saved and {self._folder.checkpoints} stays as it was; lower the learning rates, or set "
                "optim.max_grad_norm above 0, in a new output_dir"
            )
        in_background = self._config.checkpoint.asynchronous and not at_once
        in_background = in_background and self._has_room_for_copies(progress.step)
        self._saving = checkpoint.begin(
            self._engine,
            self._folder.checkpoints,
            progress.step,
            self._world,
            state={
                "plan": self._plan.state(progress.step, progress.masked),
                "objective": self._objective.state_dict(),
                "spent": asdict(progress.spent),
                "recent": asdict(progress.recent),
            },
            facts=self._shape()
            | {
                "run": self._folder.id,
                "settings": settings_digests(self._config, self._folder.id),
                "plan_fingerprint": self._plan.fingerprint,
                "pivot": pivot.__version__,
            },
            size_bytes=sum(self._engine.checkpoint_bytes()),
            in_background=in_background,
            last_words=lambda error: self._folder.status.fail(self._world.rank, error),
        )
        self._wait_s = time.monotonic() - started
        if not in_background:
            self.publish(progress, log)

    @property
    def is_writing(self) -> bool:
        """Whether this rank's files of the checkpoint on its way are not all on the disk."""
        return self._saving is not None and not self._saving.writer.is_done

    def publish(self, progress: Progress, log: RunLog) -> None:
        """Commit the checkpoint that is on its way, if one is, waiting for its files where it must. Collective.

        An error of the disk, on whichever rank, is raised on all, and every checkpoint stays.
        """
        if self._saving is None:
            return
        started = time.monotonic()
        saving, self._saving = self._saving, None
        section, step = self._config.checkpoint, saving.manifest["step"]
        write_s = checkpoint.publish(
            saving, self._world, keep=section.keep, keep_every_steps=section.keep_every_steps, say=self._say
        )
        if self._world.is_main:
            self._folder.note_saved(step)
        self._say(f"saved      {saving.final}")
        wait_s = self._wait_s + time.monotonic() - started
        progress.spent.add(save_s=wait_s)
        gib, copied = sum(self._engine.checkpoint_bytes()) / 2**30, saving.writer.in_background
        log.event("save", step=step, wait_s=wait_s, write_s=write_s, gib=gib, copied=copied)

    def abandon(self) -> None:
        """Leave what is not published half-written, and nobody at work on it."""
        if self._saving is not None:
            self._saving.writer.abandon()

    def _has_room_for_copies(self, step: int) -> bool:
        """Whether every machine's free memory holds its ranks' copies; a line is said where it does not. Collective."""
        alone, shared = self._engine.checkpoint_bytes()
        needed = alone + shared * distributed.num_local_ranks(self._world) / self._world.size
        needed, free = max(
            distributed.gather((needed, host_memory.available_bytes())), key=lambda told: told[0] - told[1]
        )
        if needed <= ROOM_FOR_COPIES * free:
            return True
        self._say(
            f"memory     copies of step {step}'s checkpoint take {needed / 2**30:.2f} GiB of a machine that has "
            f"{free / 2**30:.2f} GiB free; it is written without them, and training waits"
        )
        return False

    def require_space(self, step: int, total: int) -> None:
        """Room for the checkpoints to come behind `step`, now rather than in hours: one more than is kept lies there at
        a time."""
        section, there = self._config.checkpoint, checkpoint.published(self._folder.checkpoints)
        to_come = math.ceil((total - step) / section.every_steps) if section.every_steps else min(total - step, 1)
        newest, for_ever = section.keep + 1, 0
        if section.keep_every_steps is not None:  # of which some are among the newest
            for_ever = total // section.keep_every_steps - step // section.keep_every_steps
            newest -= newest // (section.keep_every_steps // section.every_steps)
            there = [folder for folder in there if checkpoint.step_of(folder) % section.keep_every_steps]
        number = min(to_come, newest + for_ever - len(there))
        checkpoint.require_space(self._folder.checkpoints, sum(self._engine.checkpoint_bytes()), max(number, 0))
