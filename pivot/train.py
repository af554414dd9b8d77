"""The one place where the parts meet: data, model, engine, reference, checkpoints, self-check, steps, export.

train(load_config("run.yaml", ["optim.lr=1e-6"], "dpo"))
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from pivot.batch import SAMPLE, PackedBatch
from pivot.config import Config
from pivot.data.loader import Loader
from pivot.data.plan import Plan
from pivot.engine import Engine, gathered, learning_rate_factor, sharded_loading
from pivot.evaluate import evaluator, outcomes
from pivot.metrics import StepMetrics, Timer, peak_memory_gib
from pivot.models.build import WeightSources, build_mllm
from pivot.models.mllm import MLLM
from pivot.models.parts import write_model
from pivot.objectives.matching import see_step
from pivot.run.folder import RunFolder
from pivot.run.guard import StepGuard
from pivot.run.log import RunLog
from pivot.run.profile import Tracer
from pivot.run.spent import Clock, compare_spent, describe_spent
from pivot.run.state import Progress, RunState
from pivot.run.status import DONE, PREEMPTED
from pivot.run.stragglers import Stragglers
from pivot.run.weights_and_biases import require_package
from pivot.startup.facts import start_facts
from pivot.startup.flops import build_work_counter, measure_matmul_tflops
from pivot.startup.inputs import Inputs, Say, open_inputs, open_loader
from pivot.startup.references import open_references
from pivot.startup.screen import first_screen
from pivot.startup.selfcheck import GradientWatch, margin_tolerance, require_zero_margins, start_margins
from pivot.step import Step, StepSource, run_micro_batch
from pivot.system import distributed, fault, preemption, watchdog
from pivot.system.distributed import World
from pivot.system.preemption import Preempted
from pivot.system.redact import tell
from pivot.system.watchdog import Watchdog


def train(config: Config, *, check_only: bool = False) -> str:
    """Run `config` to its end, going on from its own checkpoint where there is one. Collective.

    Returns DONE, or PREEMPTED when it was asked to stop and the same command goes on: everything is saved then. With
    `check_only`, settings and data are checked and shown and no weight is loaded. Raises ValueError for what the user
    can mend, RuntimeError for what the machine did.
    """
    with contextlib.nullcontext() if check_only else preemption.listening():
        world = distributed.start(config.train.timeout_s)
        folder = RunFolder(config.output_dir)
        try:
            with distributed.watched(world, config.train.timeout_s) as dog:
                return _run(config, folder, world, check_only, dog)
        except Preempted as asked:
            if world.is_main:
                step = folder.newest_step()
                goes_on = f"at step {step}, which is saved; the same command goes on"
                anew = "before there was anything to save; the same command starts anew"
                tell(f"stopped    by {asked} {goes_on if step else anew}")
                if folder.status.owner:
                    folder.status.end(PREEMPTED, step=step, reason=f"stopped by {asked}")
            return PREEMPTED
        except BaseException as error:
            folder.status.fail(world.rank, error)
            raise
        finally:
            folder.release()


def _run(config: Config, folder: RunFolder, world: World, check_only: bool, dog: Watchdog) -> str:
    say = world.say
    fault.announce(say)
    distributed.check_preemption()
    with distributed.shared_failure(f"opening {folder.path}"):
        if world.is_main:
            require_package(config.log.wandb)
            folder.check(config)  # before minutes of reading data
    inputs = open_inputs(config, world, say)
    say(first_screen(config, inputs, world))
    if check_only:
        return DONE
    distributed.check_preemption()
    finished: int | None = None
    with distributed.shared_failure(f"opening {folder.path}"):
        if world.is_main:
            finished = folder.claim(config, inputs.total_steps, say)
    finished, folder.id, folder.status.owner = distributed.broadcast((finished, folder.id, folder.status.owner))
    if finished is not None:
        say(f"this run is finished: {finished} steps done, export in {folder.export}")
        return DONE
    with distributed.shared_failure(f"opening {folder.path}"):
        folder.require_shared(world.rank)
    dog.write_to(folder.path, partial(folder.status.fail, world.rank), folder.status.has_failed)
    steps = Trainer(config, folder, inputs, world).run()
    if world.is_main:
        folder.status.end(DONE, step=steps)
    return DONE


class Trainer:
    """One process's part in a run."""

    def __init__(self, config: Config, folder: RunFolder, inputs: Inputs, world: World) -> None:
        self.config, self.folder, self.inputs, self.world = config, folder, inputs, world
        self.say: Say = world.say
        self.progress = Progress()
        self.clock = Clock(self.progress.spent, world)
        self.objective = inputs.objective
        distributed.begin("loading the weights")
        self.model = self._build_model(inputs.sources)
        self.engine = self._build_engine()
        distributed.begin("scoring the reference")
        # Now, while the engine still holds the weights that the run starts from.
        references = open_references(config, inputs, world, self.say, start_weights=self._score)
        self.reference, self.held_out_reference = references.train, references.held_out
        self.counter = build_work_counter(inputs.skeleton, config.optim.trained())
        self.state = RunState(config, folder, self.engine, inputs.plan, self.objective, world, self.say)
        watchdog.enter("in loading a checkpoint")
        self.state.restore(self.progress)
        distributed.check_preemption()
        self.saved_step = self.progress.step
        self.log = RunLog(
            folder.path,
            first_step=self.progress.step,
            total_steps=inputs.total_steps,
            is_main=world.is_main,
            tensorboard=config.log.tensorboard,
            wandb=config.log.wandb,
        )
        limits = (config.train.max_skipped_steps, config.log.spike_factor)
        self.guard = StepGuard(folder.path, inputs.data.shards, self.objective, self.log, world, *limits)
        self.stragglers = Stragglers(self.log, self.say)
        self.tracer = Tracer(folder.path / "profile", config.log.profile_steps, world, self.say)
        self.save_asked, self.all_written = False, True
        self.waited_s = 0.0  # of the loader's data_wait_s, what is in the log

    def _build_model(self, sources: WeightSources) -> MLLM:
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
        return Engine(self.model, self.inputs.deepspeed, optim, schedule, self.world)

    def _score(self, batch: PackedBatch) -> Tensor:
        """float32[N] under the engine's weights as they stand, of a batch on the host."""
        return self.engine(batch.to(self.world.device))

    # -- the loop ----------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Train what is left, then export; the steps that are done.

        Raises Preempted on all ranks, with the state saved, once one of them was asked to stop.
        """
        try:
            self._train()
            self._evaluate()
            self._export()
        except Preempted:
            self.tracer.stop()
            if self.progress.step > self.saved_step:
                self._save(at_once=True)
            self.state.publish(self.progress, self.log)
            raise
        finally:
            self.state.abandon()  # behind an error; else all is published
        self._log_end()
        self.log.close()
        return self.progress.step

    def _train(self) -> None:
        progress, total = self.progress, self.inputs.total_steps
        with distributed.shared_failure(f"looking for room in {self.folder.checkpoints}"):
            if self.world.is_main:
                self.state.require_space(progress.step, total)
        timer = Timer(self._log_start())
        tolerance = None
        if progress.step == 0 and self.reference is not None:
            tolerance = margin_tolerance(self.inputs, self.loader, self._score, self.reference)
        if progress.step < total and self._evaluates(progress.step):
            self._evaluate()
        loader = self.loader(self.inputs.plan, first_step=progress.step, bad_samples_dir=self.folder.path)
        for step_plan, micro_batches in distributed.until_asked(islice(loader, total - progress.step)):
            self.tracer.before_step()
            metrics = self.train_step(step_plan, micro_batches, loader, timer, tolerance)
            progress.step = step_plan.step + 1
            watchdog.enter(f"behind step {progress.step}")
            if progress.step % self.config.log.every_steps == 0 or progress.step == total:
                epoch = progress.step / self.inputs.plan.steps_per_epoch
                self.log.step(progress.step, metrics | timer.read() | {"epoch": epoch})
            if self.all_written:
                self.state.publish(self.progress, self.log)
            self.guard.check(progress.step, metrics, progress.recent)
            every = self.config.checkpoint.every_steps
            if self.save_asked or progress.step == total or (every and progress.step % every == 0):
                self._save(at_once=self.save_asked or progress.step == total or self._evaluates(progress.step))
            if progress.step < total and self._evaluates(progress.step):
                self._evaluate()
                timer.read()  # the rates are those of training
            watchdog.take_busy_s()  # rank 0 alone writes: what slows down steps is what counts
        self.tracer.stop()
        self.state.publish(self.progress, self.log)

    def _save(self, *, at_once: bool) -> None:
        watchdog.enter(f"in the save behind step {self.progress.step}")
        self.clock.read()
        self.state.save(self.progress, self.log, at_once=at_once)
        self.saved_step = self.progress.step
        if self.save_asked and self.world.is_main:
            self.folder.status.forget_save()
            self.say(f"saved      as the file {self.folder.path / 'save'} asked, which is removed")
        self.save_asked = False

    def train_step(
        self,
        step_plan: Step,
        micro_batches: Iterator[PackedBatch],
        loader: StepSource,
        timer: Timer,
        tolerance: float | None,
    ) -> dict[str, float]:
        """One optimizer step over the whole global batch; its metrics, the same on every rank.

        In the run's first step every parameter must get a gradient, and with a `tolerance` every margin be zero.
        """
        watchdog.enter(f"in step {self.progress.step + 1}")
        fault.inject(self.world.rank, self.progress.step + 1)
        sums, device = StepMetrics(self.world), self.world.device
        num_masked, first = loader.num_masked, self.progress.step == 0
        watch = GradientWatch(self.model) if first else None
        margins: list[Tensor] = []
        if self.reference is not None:
            micro_batches = self.reference.add_to(micro_batches)
        if self.objective.matching is not None:
            micro_batches = iter(see_step(self.engine, self.objective.matching, micro_batches, self.world))
        for number, host_batch in enumerate(micro_batches):
            batch, last = host_batch.to(device), number == step_plan.num_micro_batches - 1
            logps = run_micro_batch(self.engine, self.objective, batch, step_plan.counts, sums, last=last)
            self.guard.keep(host_batch, logps, sums.losses[-1])
            sums.add({"tokens": batch.num_tokens, "flops": self.counter.useful(host_batch)})
            if first and tolerance is not None and self.objective.margin_scale is not None:
                margins.append(self.objective.margin_scale * start_margins(batch, logps))
        if watch is not None:
            watch.require_all()
        if margins and tolerance is not None:
            require_zero_margins(torch.cat(margins), tolerance, self.world)
        updated = self.engine.step(
            self.progress.step, measure=(self.progress.step + 1) % self.config.log.every_steps == 0
        )
        # Since the step before: the loader waits for a step's first micro-batch before it hands the step over.
        sums.add({"wait_s": loader.data_wait_s - self.waited_s, "peak_memory_gib": peak_memory_gib(device)})
        self.waited_s = loader.data_wait_s
        sums.add({"masked": loader.num_masked - num_masked})
        sums.add({"save": self.world.is_main and self.folder.status.asks_to_save(), "writing": self.state.is_writing})
        sums.add({"busy_s": watchdog.take_busy_s()})
        learned, told = sums.reduce()
        self.stragglers.add(self.progress.step + 1, sums.of_each_rank("busy_s"))
        self.save_asked, self.all_written = told["save"] > 0, told["writing"] == 0
        self._count_work(step_plan, told, timer)
        metrics = learned | {"masked": told["masked"]} | updated
        if not metrics["skipped_steps"]:
            self.objective.after_step(metrics)
        return metrics

    def _count_work(self, step_plan: Step, told: dict[str, float], timer: Timer) -> None:
        """Add a step's work, summed over the ranks, to what the run has spent and to the rates of the log."""
        work: dict[str, float] = {"pairs": step_plan.counts[SAMPLE]}
        work |= {name: told[name] for name in ("tokens", "flops")}
        self.progress.spent.add(**work)
        self.progress.masked += int(told["masked"])
        room = self.world.size * step_plan.num_micro_batches * self.config.train.max_tokens_per_micro_batch
        timer.add(room=room, **work, wait_s=told["wait_s"], peak_memory_gib=told["peak_memory_gib"])

    def loader(self, plan: Plan, *, first_step: int = 0, bad_samples_dir: Path | None = None) -> Loader:
        return open_loader(
            self.config, self.inputs, self.world, plan, first_step=first_step, bad_samples_dir=bad_samples_dir
        )

    # -- held-out numbers --------------------------------------------------------------------------------------

    def _evaluates(self, step: int) -> bool:
        """Whether the held-out set is scored after `step` steps, the last one aside."""
        every = self.config.evaluate.every_steps
        return step == 0 or (every > 0 and step % every == 0)

    def _evaluate(self) -> None:
        """A row of held-out numbers in the log, sample answers and outcomes beside it; nothing without data.eval, or
        where the start before this one got as far."""
        step = self.progress.step
        if self.inputs.held_out is None or distributed.broadcast(self.log.has_evaluation(step)):
            return
        self.state.publish(self.progress, self.log)
        distributed.begin(f"the evaluation behind step {step}")
        evaluation = evaluator.evaluate(
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
            outcomes.keep(evaluation.answers, evaluation.outcomes, self.folder.path, step)
        facts = {"intervals": evaluation.intervals, "skipped": evaluation.skipped, "seconds": evaluation.seconds}
        self.log.evaluation(step, evaluation.metrics, **facts)
        self.say(f"evaluated  step {step}  {evaluator.describe(evaluation)}")

    # -- what a run leaves behind ------------------------------------------------------------------------------

    def _log_start(self) -> float:
        """The log's first row; gives what all ranks together multiply at, in TFLOP/s."""
        tflops = distributed.gather(measure_matmul_tflops(self.world.device, self.inputs.dtype))
        facts = start_facts(self.inputs, self.world) | self.engine.facts()
        self.log.event("start", step=self.progress.step, matmul_tflops=sum(tflops) / len(tflops), **facts)
        return sum(tflops)

    def _log_end(self) -> None:
        spent = self.clock.read()
        row = spent.row() | {"compare": compare_spent(spent, self.config.log.compare)}
        self.log.event("end", step=self.progress.step, **row)
        self.say(f"spent      {describe_spent(row, self.objective.unit_name)}")

    def _export(self) -> None:
        """The trained model as an HF folder, read back and compared by rank 0."""
        distributed.begin("the export")
        state = self.engine.state_dict()
        with distributed.shared_failure("exporting"):
            if self.world.is_main:
                write_model(self.folder.export, self.model, state, self.inputs.processor)
                self.say(f"exported   {self.folder.export}")
