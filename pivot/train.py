"""The one place where the parts meet: data, model, engine, reference, checkpoints, self-check, steps, export.

train(load_config("run.yaml", ["optim.lr=1e-6"], "dpo"))
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pivot
from pivot import checkpoint, distributed
from pivot.batch import CHOSEN, REJECTED, PackedBatch
from pivot.config import COMPONENTS, Config, ConfigError
from pivot.data.loader import Loader
from pivot.data.plan import Plan, StepPlan
from pivot.data.shards import ShardSet
from pivot.distributed import StopSignal, World
from pivot.engine import Engine, gathered, sharded_loading
from pivot.evaluate import evaluator, outcomes
from pivot.inputs import Inputs, Say, build_plan, first_screen, open_inputs
from pivot.metrics import RunLog, StepMetrics, Timer
from pivot.models.attention import TREE_ATTENTION
from pivot.models.build import Sources, build_mllm, weights_fingerprint
from pivot.models.mllm import MLLM
from pivot.models.parts import write_model
from pivot.reference import ReferenceCache, reference_fingerprint
from pivot.report import write_report
from pivot.run import RunFolder
from pivot.schedule import learning_rate_factor
from pivot.selfcheck import FP32_MARGIN, REPACKED_PAIRS, REPACKING_FACTOR, GradientWatch, require_zero_margins

VERSIONS = ("torch", "transformers", "deepspeed", "open_clip_torch", "webdataset")  # that the log names
DONE, PREEMPTED = "done", "preempted"
MAX_SKIPPED_IN_A_ROW = 3  # steps without an update: the loss or a gradient is not finite


def train(config: Config, *, check_only: bool = False) -> str:
    """Run `config` to its end, going on from its own checkpoint where there is one. Collective.

    Returns DONE, or PREEMPTED when a signal asked to stop and the same command goes on. With `check_only`, settings and
    data are checked and shown and no weight is loaded. Raises ValueError for what the
    user can mend, RuntimeError for what the machine did.
    """
    world = distributed.start(config.train.timeout_s)
    say: Say = partial(print, flush=True) if world.is_main else _silent
    inputs = open_inputs(config, world, say)
    say(first_screen(config, inputs, world))
    if check_only:
        return DONE
    folder = RunFolder(config.output_dir)
    before: dict[str, Any] = {}
    with distributed.shared_failure(f"opening {folder.path}"):
        if world.is_main:
            before = folder.claim(config)
    before = distributed.broadcast(before)
    status: dict[str, Any] = {"status": "failed", "reason": "it ended without a word"}
    try:
        if before.get("status") == DONE and before["step"] >= inputs.total_steps:
            say(f"this run is finished: {before['step']} steps done, export in {folder.export}")
            status = before
        else:
            status = Trainer(config, folder, inputs, world).run()
    except BaseException as error:
        status["reason"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        if world.is_main:
            folder.set_status(**status)
    return status["status"]


def _silent(text: str) -> None:
    pass


# -- the run -------------------------------------------------------------------------------------------------------


class Trainer:
    """One process's part in a run."""

    def __init__(self, config: Config, folder: RunFolder, inputs: Inputs, world: World) -> None:
        self.config, self.folder, self.inputs, self.world = config, folder, inputs, world
        self.log = RunLog(
            folder.path, total_steps=inputs.total_steps, is_main=world.is_main, tensorboard=config.log.tensorboard
        )
        self.say: Say = self.log.say
        self.objective = inputs.objective
        self.model = self._build_model(inputs.sources)
        self.engine = self._build_engine()
        self.reference, self.held_out_reference = self._open_references()
        self.step, self.masked = self._restore()

    def _build_model(self, sources: Sources) -> MLLM:
        model = build_mllm(
            sources,
            self.inputs.processor,
            seed=self.config.train.seed,
            dtype=self.inputs.dtype,
            loading=lambda: sharded_loading(self.inputs.deepspeed),
            gather=gathered,
        )
        if self.config.train.activation_checkpointing:
            model.enable_activation_checkpointing()
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

    # -- reference ---------------------------------------------------------------------------------------------

    def _open_references(self) -> tuple[ReferenceCache | None, ReferenceCache | None]:
        """Of the training and of the held-out set, as far as they are needed."""
        inputs, held_out = self.inputs, self.inputs.held_out
        if not self.objective.needs_reference:
            return None, None
        every_pair = {"limit": int(inputs.plan.kept.sum()), "mixture": None}
        plan = self._plan(**every_pair, window_shards=1, roles=(CHOSEN, REJECTED))
        train = self._open_reference(inputs.shards, inputs.cache_dir, plan)
        if held_out is None:
            return train, None
        return train, self._open_reference(held_out.shards, held_out.cache_dir, held_out.plan)

    def _open_reference(self, shards: ShardSet, cache_dir: Path, plan: Plan) -> ReferenceCache:
        """The cache of reference log-probs, completed now: the engine still holds the weights the run starts from."""
        inputs, sources = self.inputs, self.inputs.reference
        fingerprint = reference_fingerprint(
            weights=distributed.broadcast(weights_fingerprint(sources, seed=self.config.train.seed)),
            processor=inputs.processor.fingerprint,
            facts={"dtype": str(inputs.dtype), "attention": TREE_ATTENTION},
        )
        cache = ReferenceCache(cache_dir, fingerprint, shards)
        missing = distributed.broadcast(cache.first_missing(plan))
        if missing is not None:
            started = time.monotonic()
            score = self._score if sources is inputs.sources else self._build_scorer(sources)
            loader = self._loader(plan, shards=shards, first_step=missing)
            cache.fill(loader, score, self.world, self.say)
            self.say(f"reference log-probs are in {cache.folder} ({time.monotonic() - started:.0f} s, once)")
        return cache

    def _score(self, batch: PackedBatch) -> Tensor:
        """float32[C] under the engine's weights as they stand."""
        batch = batch.to(self.world.device)
        return batch.completion_logps(self.engine(batch))

    def _build_scorer(self, sources: Sources) -> Callable[[PackedBatch], Tensor]:
        """Another reference: a plain model on this rank's device, gone when the scoring is done."""
        model = build_mllm(
            sources,
            self.inputs.processor,
            seed=self.config.train.seed,
            dtype=self.inputs.dtype,
            loading=contextlib.nullcontext,
            gather=lambda _: contextlib.nullcontext(),
        ).to(self.world.device)

        def score(batch: PackedBatch) -> Tensor:
            batch = batch.to(self.world.device)
            return batch.completion_logps(model(batch))

        return score

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
        for name, now in self._shape_of_state().items():
            if found.manifest[name] != now:
                raise ConfigError(
                    f"{found.folder}: written with {name} {found.manifest[name]}, this run has {now}; "
                    f"start it with the same {name} to go on"
                )
        step = self.inputs.plan.check_state(found.state["plan"])
        checkpoint.load(self.engine, found, self.world)
        self.objective.load_state_dict(found.state["objective"])
        self.say(f"start      step {step}, resumed from {found.folder}")
        return step, int(found.state["plan"]["masked"])

    def _shape_of_state(self) -> dict[str, Any]:
        """What DeepSpeed's shards are cut by."""
        return {"world_size": self.world.size, "zero_stage": self.engine.stage, "dtype": str(self.inputs.dtype)}

    def _save(self) -> None:
        plan = self.inputs.plan
        path = checkpoint.save(
            self.engine,
            self.folder.checkpoints,
            self.step,
            self.world,
            state={"plan": plan.state(self.step, self.masked), "objective": self.objective.state_dict()},
            facts=self._shape_of_state() | {"plan_fingerprint": plan.fingerprint, "pivot": pivot.__version__},
            size_bytes=self.engine.checkpoint_bytes(),
            keep=self.config.checkpoint.keep,
        )
        self.say(f"saved      {path}")

    # -- the loop ----------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train what is left, then export; the status: done, or preempted when a signal came (the state is saved)."""
        total = self.inputs.total_steps
        self._log_start()
        stop = StopSignal()
        tolerance = self._margin_tolerance() if self.step == 0 else None
        if self.step == 0:
            self._evaluate()
        timer, skipped = Timer(self.world), 0
        loader = self._loader(self.inputs.plan, first_step=self.step, bad_samples_dir=self.folder.path)
        for step_plan, micro_batches in loader if self.step < total else ():
            metrics = self._train_step(step_plan, micro_batches, loader, timer, tolerance)
            self.step = step_plan.step + 1
            self.masked += int(metrics.get("masked", 0))
            skipped = skipped + 1 if metrics["skipped_steps"] or not math.isfinite(metrics["loss"]) else 0
            if self.step % self.config.log.every_steps == 0 or self.step == total:
                self.log.step(
                    self.step, metrics | timer.read() | {"epoch": self.step / self.inputs.plan.steps_per_epoch}
                )
            if skipped >= MAX_SKIPPED_IN_A_ROW:
                raise RuntimeError(f"{skipped} steps in a row had a loss or gradient that is not finite; see log.jsonl")
            stopping = distributed.any_rank(stop.received is not None, self.world.device)
            every = self.config.checkpoint.every_steps
            if stopping or self.step == total or (every and self.step % every == 0):
                self._save()
            if stopping and self.step < total:
                self.say(f"stopped at step {self.step} on a signal; the same command goes on")
                return {"status": PREEMPTED, "step": self.step}
            if self.step == total:
                break
            if self.config.evaluate.every_steps and self.step % self.config.evaluate.every_steps == 0:
                self._evaluate()
                timer.read()  # the rates are those of training
        self._evaluate()
        self._export()
        self.log.event("end", step=self.step)
        self._report()
        self.log.close()
        return {"status": DONE, "step": self.step}

    def _train_step(
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
        sums, waited, tokens, masked = (
            StepMetrics(self.world, step_plan.counts),
            loader.data_wait_s,
            0,
            loader.num_masked,
        )
        first = self.step == 0
        watch = GradientWatch(self.model) if first else None
        margins: list[Tensor] = []
        for number, host_batch in enumerate(micro_batches):
            reference = self.reference.lookup(host_batch).to(self.world.device) if self.reference else None
            batch = host_batch.to(self.world.device)
            token_logps = self.engine(batch)
            outcome = self.objective(token_logps, batch, reference)
            terms = [weight * t.total / step_plan.counts.denominator(t.unit) for weight, t in outcome.loss.values()]
            loss = torch.stack(terms).sum()
            self.engine.backward(loss, last=number == step_plan.num_micro_batches - 1)
            sums.add(outcome, loss)
            tokens += batch.num_tokens
            if first and tolerance is not None and reference is not None:
                margins.append(_margins(batch, token_logps.detach(), reference))
        if watch is not None:
            watch.require_all()
        if margins and tolerance is not None and self.config.objective.dpo is not None:
            require_zero_margins(self.config.objective.dpo.beta * torch.cat(margins), tolerance, self.world)
        measure = (self.step + 1) % self.config.log.every_steps == 0
        metrics = sums.reduce() | self.engine.step(self.step, measure=measure)
        self.objective.after_step(metrics)
        timer.add(wait_s=loader.data_wait_s - waited, pairs=step_plan.counts.pair, tokens=tokens)
        return metrics | {"masked": sum(distributed.gather(loader.num_masked - masked))}

    def _margin_tolerance(self) -> float | None:
        """How far a first margin may be from 0: rounding in fp32, in bf16 a multiple of what repacking changes.

        None where the run does not start from its reference.
        """
        dpo = self.config.objective.dpo
        if self.reference is None or dpo is None or dpo.reference is not None:
            return None
        if self.inputs.dtype == torch.float32:
            return FP32_MARGIN
        lengths = self.inputs.plan.lengths
        longest = int((lengths.prompt + lengths.chosen + lengths.rejected)[self.inputs.plan.kept].max())
        limit = min(REPACKED_PAIRS, self.inputs.plan.num_pairs)
        plan = self._plan(limit=limit, global_batch_size=limit, max_tokens_per_micro_batch=longest)
        worst = torch.zeros(())
        for _, micro_batches in self._loader(plan):
            for batch in micro_batches:
                with torch.no_grad():
                    change = (self._score(batch).cpu() - self.reference.lookup(batch)) * batch.completion_weight
                worst = torch.maximum(worst, change.abs().max())
        noise = dpo.beta * max(distributed.gather(float(worst)))
        return max(FP32_MARGIN, REPACKING_FACTOR * 2 * noise)  # a margin is a difference of two completions

    def _plan(self, **changes: Any) -> Plan:
        return build_plan(
            self.config, self.inputs.shards, self.inputs.processor, self.inputs.cache_dir, self.world, **changes
        )

    def _loader(
        self,
        plan: Plan,
        *,
        shards: ShardSet | None = None,
        first_step: int = 0,
        bad_samples_dir: Path | None = None,
    ) -> Loader:
        return Loader(
            shards or self.inputs.shards,
            plan,
            self.inputs.processor,
            rank=self.world.rank,
            first_step=first_step,
            workers=self.config.data.workers,
            bad_samples_dir=bad_samples_dir,
            pin_memory=self.world.device.type == "cuda",
        )

    def _evaluate(self) -> None:
        """A row of held-out numbers in the log, sample answers and outcomes beside it; nothing without data.eval."""
        if self.inputs.held_out is None:
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

    def _log_start(self) -> None:
        counts = {
            name: sum(getattr(p, "ds_numel", p.numel()) for p in self.model.get_submodule(name).parameters())
            for name in COMPONENTS
        }
        facts = {
            "world_size": self.world.size,
            "attention": TREE_ATTENTION,
            "dtype": str(self.inputs.dtype),
            "device": str(self.world.device),
            "step": self.step,
            "total_steps": self.inputs.total_steps,
            "num_parameters": counts,
            "vision_tower": repr(self.model.vision_tower),
            "num_pairs": self.inputs.plan.num_pairs,
            "exclusions": self.inputs.plan.exclusions,
            "plan_fingerprint": self.inputs.plan.fingerprint,
            "versions": {"pivot": pivot.__version__} | {name: version(name) for name in VERSIONS},
        }
        self.log.event("start", **(facts | self.engine.facts()))

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


def _margins(batch: PackedBatch, token_logps: Tensor, reference: Tensor) -> Tensor:
    """float32[P]: (policy - reference) of chosen minus the same of rejected, 0 for masked pairs."""
    change = batch.completion_logps(token_logps) - reference
    return (change[batch.by_role[CHOSEN]] - change[batch.by_role[REJECTED]]) * batch.pair_weight()
