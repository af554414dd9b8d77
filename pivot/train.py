"""The one place where the parts meet: data, model, engine, reference, checkpoints, self-check, steps, export.

train(load_config("run.yaml", ["optim.lr=1e-6"], "dpo"))
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pivot
from pivot.batch import PackedBatch
from pivot.config import Config, ConfigError
from pivot.data.loader import Loader
from pivot.data.plan import Plan, StepPlan
from pivot.engine import Engine, gathered, learning_rate_factor, sharded_loading
from pivot.evaluate import evaluator, outcomes
from pivot.metrics import StepMetrics, Timer, peak_memory_gib, send
from pivot.models.build import Sources, build_mllm
from pivot.models.mllm import MLLM
from pivot.models.parts import write_model
from pivot.report import write_report
from pivot.run import checkpoint
from pivot.run.folder import DONE, FAILED, PREEMPTED, RunFolder, require_own_checkpoint, settings_digests
from pivot.run.log import RunLog
from pivot.run.profile import Tracer
from pivot.run.spent import Clock, Spent, compare, describe
from pivot.startup.facts import start_facts
from pivot.startup.flops import build_counter, measure_matmul_tflops
from pivot.startup.inputs import Inputs, Say, open_inputs, open_loader
from pivot.startup.references import open_references
from pivot.startup.screen import first_screen
from pivot.startup.selfcheck import REPACKED_PAIRS, GradientWatch, margin_tolerance, require_zero_margins, start_margins
from pivot.step import run_micro_batch
from pivot.system import distributed
from pivot.system.distributed import StopSignal, World
from pivot.system.redact import tell

MAX_SKIPPED_IN_A_ROW = 3  # steps without an update: the loss or a gradient is not finite


def train(config: Config, *, check_only: bool = False) -> str:
    """Run `config` to its end, going on from its own checkpoint where there is one. Collective.

    Returns DONE, or PREEMPTED when a signal asked to stop and the same command goes on. With `check_only`, settings and
    data are checked and shown and no weight is loaded. Raises ValueError for what the
    user can mend, RuntimeError for what the machine did.
    """
    world = distributed.start(config.train.timeout_s)
    say: Say = tell if world.is_main else _silent
    folder = RunFolder(config.output_dir)
    with distributed.shared_failure(f"opening {folder.path}"):
        if world.is_main:
            folder.check(config)  # before minutes of reading data
    inputs = open_inputs(config, world, say)
    say(first_screen(config, inputs, world))
    if check_only:
        return DONE
    finished: int | None = None
    with distributed.shared_failure(f"opening {folder.path}"):
        if world.is_main:
            finished = folder.claim(config, inputs.total_steps, say)
    finished, folder.id = distributed.broadcast((finished, folder.id))
    if finished is not None:
        say(f"this run is finished: {finished} steps done, export in {folder.export}")
        return DONE
    status: dict[str, Any] = {"status": FAILED, "reason": "it ended without a word"}
    try:
        status = Trainer(config, folder, inputs, world).run()
    except BaseException as error:
        status["reason"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        if world.is_main:
            folder.set_status(**status)
            folder.release()
    return status["status"]


def _silent(text: str) -> None:
    pass


# -- the run -------------------------------------------------------------------------------------------------------


class Trainer:
    """One process's part in a run."""

    def __init__(self, config: Config, folder: RunFolder, inputs: Inputs, world: World) -> None:
        self.config, self.folder, self.inputs, self.world = config, folder, inputs, world
        self.say: Say = tell if world.is_main else _silent
        self.spent = Spent()
        self.clock = Clock(self.spent, world)
        self.objective = inputs.objective
        self.model = self._build_model(inputs.sources)
        self.engine = self._build_engine()
        # Now, while the engine still holds the weights that the run starts from.
        references = open_references(config, inputs, world, self.say, start_weights=self._score)
        self.reference, self.held_out_reference = references.train, references.held_out
        again = config.train.activation_checkpointing == "full"  # what selective computes again is no matrix product
        self.counter = build_counter(inputs.skeleton, config.optim.trained(), activation_checkpointing=again)
        self.step, self.masked = self._restore()
        self.log = RunLog(
            folder.path,
            first_step=self.step,
            total_steps=inputs.total_steps,
            is_main=world.is_main,
            tensorboard=config.log.tensorboard,
        )
        self.stop: StopSignal | None = None
        self.stopping = False
        self.waited_s = 0.0  # of the loader's data_wait_s, what is in the log

    def _build_model(self, sources: Sources) -> MLLM:
        model = build_mllm(
            sources,
            self.inputs.processor,
            seed=self.config.train.seed,
            dtype=self.inputs.dtype,
            loading=lambda: sharded_loading(self.inputs.deepspeed),
            gather=gathered,
            attention=self.inputs.attention.name,
        )
        model.enable_activation_checkpointing(self.config.train.activation_checkpointing)
        return model.train()

    def _build_engine(self) -> Engine:
        optim = self.config.optim
        schedule = partial(
            learning_rate_factor,
            total_steps=self.inputs.total_steps,
            warmup_ratio=optim.warmup_ratio,
            schedule=optim.schedule,
        )
        engine = Engine(self.model, self.inputs.deepspeed, optim, schedule, self.world)
        self.model.language_model.lm_head.adds_in_place = engine.sums_in_grad
        return engine

    def _score(self, batch: PackedBatch) -> Tensor:
        """float32[N] under the engine's weights as they stand, of a batch on the host."""
        return self.engine(batch.to(self.world.device))

    # -- state -------------------------------------------------------------------------------------------------

    def _restore(self) -> tuple[int, int]:
        """(steps done, samples masked): from this run's own newest checkpoint, else from the start; said either way."""
        found = None
        if self.config.checkpoint.resume != "none":
            found = checkpoint.find(self.folder.checkpoints, self.world, self.say)
        if found is None:
            if self.config.checkpoint.resume == "required":
                raise ConfigError(f"checkpoint.resume: required, but {self.folder.checkpoints} holds no checkpoint")
            start = f"init_from {self.config.init_from}" if self.config.init_from else "model.*"
            self.say(f"start      step 0, weights from {start}")
            return 0, 0
        require_own_checkpoint(found.folder, found.manifest, self.config, self.folder.id)
        for name, now in self._shape_of_state().items():
            if found.manifest[name] != now:
                raise ConfigError(
                    f"{found.folder}: written with {name} {found.manifest[name]}, this run has {now}; "
                    f"start it with the same {name} to go on"
                )
        step = self.inputs.plan.check_state(found.state["plan"])
        checkpoint.load(self.engine, found, self.world)
        self.objective.load_state_dict(found.state["objective"])
        self.spent.add(**found.state.get("spent", {}))  # absent from checkpoints before 0.3
        self.say(f"start      step {step}, resumed from {found.folder}")
        return step, int(found.state["plan"]["masked"])

    def _shape_of_state(self) -> dict[str, Any]:
        """What DeepSpeed's shards are cut by."""
        return {"world_size": self.world.size, "zero_stage": self.engine.stage, "dtype": str(self.inputs.dtype)}

    def _save(self) -> None:
        """RuntimeError where the state is not finite: no run comes back from that, so every checkpoint stays."""
        if not self.engine.is_finite():
            raise RuntimeError(
                f"after step {self.step} the weights or the optimizer's moments are not finite, so nothing was saved "
                f"and {self.folder.checkpoints} stays as it was; lower the learning rates, or set optim.max_grad_norm "
                "above 0, in a new output_dir"
            )
        plan = self.inputs.plan
        path = checkpoint.save(
            self.engine,
            self.folder.checkpoints,
            self.step,
            self.world,
            state={
                "plan": plan.state(self.step, self.masked),
                "objective": self.objective.state_dict(),
                "spent": asdict(self.clock.read()),
            },
            facts=self._shape_of_state()
            | {
                "run": self.folder.id,
                "settings": settings_digests(self.config, self.folder.id),
                "plan_fingerprint": plan.fingerprint,
                "pivot": pivot.__version__,
            },
            size_bytes=self.engine.checkpoint_bytes(),
            keep=self.config.checkpoint.keep,
            say=self.say,
        )
        if self.world.is_main:
            self.folder.note_saved(self.step)
        self.say(f"saved      {path}")

    def _require_space(self) -> None:
        """Room for the checkpoints to come, now rather than in hours: one more than is kept lies there at a time."""
        if self.world.is_main:
            section, there = self.config.checkpoint, len(checkpoint.published(self.folder.checkpoints))
            left = self.inputs.total_steps - self.step
            to_come = math.ceil(left / section.every_steps) if section.every_steps else min(left, 1)
            number = min(to_come, section.keep + 1 - there)
            checkpoint.require_space(self.folder.checkpoints, self.engine.checkpoint_bytes(), max(number, 0))

    # -- the loop ----------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train what is left, then export; the status: done, or preempted when a signal came (the state is saved)."""
        total = self.inputs.total_steps
        with distributed.shared_failure(f"looking for room in {self.folder.checkpoints}"):
            self._require_space()
        tflops = distributed.gather(measure_matmul_tflops(self.world.device, self.inputs.dtype))
        facts = start_facts(self.inputs, self.world) | self.engine.facts()
        self.log.event("start", step=self.step, matmul_tflops=sum(tflops) / len(tflops), **facts)
        self.stop = StopSignal()
        tolerance = self._margin_tolerance() if self.step == 0 else None
        if self.step < total and self._evaluates(self.step):
            self._evaluate()
        timer, skipped = Timer(sum(tflops)), 0
        tracer = Tracer(self.folder.path / "profile", self.config.log.profile_steps, self.world, self.say)
        loader = self.loader(self.inputs.plan, first_step=self.step, bad_samples_dir=self.folder.path)
        for step_plan, micro_batches in loader if self.step < total else ():
            tracer.before_step()
            metrics = self.train_step(step_plan, micro_batches, loader, timer, tolerance)
            self.step = step_plan.step + 1
            self.masked += int(metrics["masked"])
            skipped = skipped + 1 if metrics["skipped_steps"] or not math.isfinite(metrics["loss"]) else 0
            if self.step % self.config.log.every_steps == 0 or self.step == total:
                self.log.step(
                    self.step, metrics | timer.read() | {"epoch": self.step / self.inputs.plan.steps_per_epoch}
                )
            if skipped >= MAX_SKIPPED_IN_A_ROW:
                raise RuntimeError(f"{skipped} steps in a row had a loss or gradient that is not finite; see log.jsonl")
            every = self.config.checkpoint.every_steps
            if self.stopping or self.step == total or (every and self.step % every == 0):
                self._save()
            if self.stopping and self.step < total:
                tracer.stop()
                self.say(f"stopped at step {self.step} on a signal; the same command goes on")
                return {"status": PREEMPTED, "step": self.step}
            if self.step == total:
                break
            if self._evaluates(self.step):
                self._evaluate()
                timer.read()  # the rates are those of training
        tracer.stop()
        self._evaluate()
        self._export()
        self._log_end()
        self._report()
        self.log.close()
        return {"status": DONE, "step": self.step}

    def train_step(
        self,
        step_plan: StepPlan,
        micro_batches: Iterator[PackedBatch],
        loader: Loader,
        timer: Timer,
        tolerance: float | None,
    ) -> dict[str, float]:
        """One optimizer step over the whole global batch; its metrics, the same on every rank.

        In the run's first step every parameter must get a gradient, and with a `tolerance` every margin be zero.
        """
        sums = StepMetrics(self.world, step_plan.counts)
        masked, device = loader.num_masked, self.world.device
        first = self.step == 0
        watch = GradientWatch(self.model) if first else None
        margins: list[Tensor] = []
        for number, host_batch in enumerate(micro_batches):
            reference = send(self.reference.lookup(host_batch), device) if self.reference else None
            batch = host_batch.to(device)
            last = number == step_plan.num_micro_batches - 1
            token_logps = run_micro_batch(self.engine, self.objective, batch, reference, sums, last=last)
            sums.count(tokens=batch.num_tokens, flops=self.counter.useful(host_batch))
            sums.count(hardware_flops=self.counter.hardware(host_batch))
            if first and tolerance is not None and reference is not None:
                margins.append(start_margins(batch, token_logps, reference))
        if watch is not None:
            watch.require_all()
        if margins and tolerance is not None and self.config.objective.dpo is not None:
            require_zero_margins(self.config.objective.dpo.beta * torch.cat(margins), tolerance, self.world)
        metrics = self.engine.step(self.step, measure=(self.step + 1) % self.config.log.every_steps == 0)
        sums.include(self.engine.squares())
        sums.count(masked=loader.num_masked - masked, stop=self.stop is not None and self.stop.received is not None)
        # Since the step before: the loader waits for a step's first micro-batch before it hands the step over.
        sums.highest(wait_s=loader.data_wait_s - self.waited_s, peak_memory_gib=peak_memory_gib(device))
        self.waited_s = loader.data_wait_s
        found = sums.reduce()
        self.stopping = found.pop("stop") > 0  # on one rank is on all: they leave the loop together
        work: dict[str, float] = {"pairs": step_plan.counts.pair}
        work |= {name: found.pop(name) for name in ("tokens", "flops", "hardware_flops")}
        self.spent.add(**work)
        room = self.world.size * step_plan.num_micro_batches * self.config.train.max_tokens_per_micro_batch
        timer.add(room=room, **work, **{name: found.pop(name) for name in ("wait_s", "peak_memory_gib")})
        squares = {name: found.pop(name) for name in list(found) if name.startswith("square/")}
        metrics = found | metrics | self.engine.norms(squares)
        if not metrics["skipped_steps"]:
            self.objective.after_step(metrics)
        return metrics

    def _margin_tolerance(self) -> float | None:
        """See selfcheck.py; None where the run does not start from its reference."""
        dpo, plan = self.config.objective.dpo, self.inputs.plan
        if self.reference is None or dpo is None or dpo.reference is not None:
            return None
        lengths, limit = plan.lengths, min(REPACKED_PAIRS, plan.num_pairs)
        longest = int((lengths.prompt + lengths.chosen + lengths.rejected)[plan.kept].max())
        repacked = self.inputs.another_plan(
            limit=limit, global_batch_size=limit, max_tokens_per_micro_batch=longest, image_trees=False
        )
        return margin_tolerance(self.inputs.dtype, dpo.beta, self.loader(repacked), self._score, self.reference)

    def loader(self, plan: Plan, *, first_step: int = 0, bad_samples_dir: Path | None = None) -> Loader:
        return open_loader(
            self.config, self.inputs, self.world, plan, first_step=first_step, bad_samples_dir=bad_samples_dir
        )

    def _evaluates(self, step: int) -> bool:
        """Whether the held-out set is scored after `step` steps, the last one aside."""
        every = self.config.evaluate.every_steps
        return step == 0 or (every > 0 and step % every == 0)

    def _evaluate(self) -> None:
        """A row of held-out numbers in the log, sample answers and outcomes beside it; nothing without data.eval, or
        where the start before this one got as far."""
        if self.inputs.held_out is None or distributed.broadcast(self.log.has_evaluation(self.step)):
            return
        found = evaluator.evaluate(
            self.inputs.held_out,
            self.inputs.processor,
            self.model,
            self.engine,
            self.world,
            objective=self.objective,
            reference=self.held_out_reference,
            max_new_tokens=self.config.evaluate.max_new_tokens,
            max_tokens=self.config.train.max_tokens_per_micro_batch,
            workers=self.config.data.workers,
            whole_weights=self.engine.whole_weights,
        )
        if self.world.is_main:
            outcomes.keep(found.answers, found.outcomes, self.folder.path, self.step)
        facts = {"intervals": found.intervals, "skipped": found.skipped, "seconds": found.seconds}
        self.log.evaluation(self.step, found.metrics, **facts)
        self.say(f"evaluated  step {self.step}  {evaluator.describe(found)}")

    # -- what a run leaves behind ------------------------------------------------------------------------------

    def _log_end(self) -> None:
        spent = self.clock.read()
        row = spent.row() | {"compare": compare(spent, self.config.log.compare)}
        self.log.event("end", step=self.step, **row)
        self.say(f"spent      {describe(row, 'samples' if self.config.objective.sft is not None else 'pairs')}")

    def _export(self) -> None:
        """The trained model as an HF folder, read back and compared by rank 0."""
        state = self.engine.state_dict()
        with distributed.shared_failure("exporting"):
            if self.world.is_main:
                write_model(self.folder.export, self.model, state, self.inputs.processor)
                self.say(f"exported   {self.folder.export}")

    def _report(self) -> None:
        """The page for people. What it cannot show must not take a finished run down."""
        if not self.world.is_main:
            return
        self.folder.set_status(DONE, step=self.step)  # the page shows it
        try:
            self.say(f"report     {write_report(self.folder.path)}")
        except Exception as error:
            self.say(f"no report ({type(error).__name__}: {error}); try python launch/report.py {self.folder.path}")
