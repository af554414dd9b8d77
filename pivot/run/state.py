"""What a run's checkpoint holds beside DeepSpeed's own files, and going on from it: how far the run has come."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import pivot
from pivot.config import Config, ConfigError
from pivot.data.plan import Plan
from pivot.engine import Engine
from pivot.objectives import Objective
from pivot.run import checkpoint
from pivot.run.folder import RunFolder, require_own_checkpoint, settings_digests
from pivot.run.guard import Recent
from pivot.run.spent import Spent
from pivot.system.distributed import World


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

    def save(self, progress: Progress) -> None:
        """Commit a checkpoint of `progress`. Collective.

        RuntimeError where the state is not finite: no run comes back from that, so every checkpoint stays.
        """
        if not self._engine.is_finite():
            raise RuntimeError(
                f"after step {progress.step} the weights or the optimizer's moments are not finite, so nothing was "
                f"saved and {self._folder.checkpoints} stays as it was; lower the learning rates, or set "
                "optim.max_grad_norm above 0, in a new output_dir"
            )
        path = checkpoint.save(
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
            size_bytes=self._engine.checkpoint_bytes(),
            keep=self._config.checkpoint.keep,
            say=self._say,
            last_words=lambda error: self._folder.status.fail(self._world.rank, error),
        )
        if self._world.is_main:
            self._folder.note_saved(progress.step)
        self._say(f"saved      {path}")

    def require_space(self, steps_left: int) -> None:
        """Room for the checkpoints to come, now rather than in hours: one more than is kept lies there at a time."""
        section = self._config.checkpoint
        to_come = math.ceil(steps_left / section.every_steps) if section.every_steps else min(steps_left, 1)
        number = min(to_come, section.keep + 1 - len(checkpoint.published(self._folder.checkpoints)))
        checkpoint.require_space(self._folder.checkpoints, self._engine.checkpoint_bytes(), max(number, 0))
