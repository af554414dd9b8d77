"""What a run says before its first step: data, steps, rates, memory and work, in a few lines."""

from __future__ import annotations

import socket
from functools import cache, partial

from torch import Tensor

from pivot.batch import SAMPLE
from pivot.config import COMPONENTS, Config, ConfigError
from pivot.data.loader import PREFETCH
from pivot.data.plan import Plan
from pivot.startup import memory
from pivot.startup.activations import build_fullest_row, measure_activations
from pivot.startup.flops import describe_flops
from pivot.startup.inputs import Inputs
from pivot.system import distributed
from pivot.system.distributed import World, num_local_ranks
from pivot.versions import describe_untested

MACHINE = "machine"


def _describe_memory(config: Config, inputs: Inputs, world: World) -> list[str]:
    """What the run takes of the least that a rank has of its device and of its machine. Collective.

    Rank 0 works it out for all, since measuring the activations of 7B takes seconds. ConfigError on every rank where it
    cannot fit on one.
    """
    ranks = distributed.gather((*memory.available_memory(world), socket.gethostname()))
    lines, refusal = [""], ""
    with distributed.shared_failure("working out what memory the run takes"):
        if world.is_main:
            device, host = min(rank[0] for rank in ranks), min(rank[1] for rank in ranks)
            device_name = _name("GPU" if world.device.type == "cuda" else MACHINE, 0, ranks)
            setup = _memory_setup(config, inputs, world)
            try:
                lines = memory.describe_memory(setup, device, host, device_name, _name(MACHINE, 1, ranks))
            except ConfigError as error:
                refusal = str(error)
    lines, refusal = distributed.broadcast((lines, refusal))
    if refusal:
        raise ConfigError(refusal)
    return lines


def _memory_setup(config: Config, inputs: Inputs, world: World) -> memory.Setup:
    trained = config.optim.trained()
    row = build_fullest_row(inputs.plan, inputs.processor.geometry)
    measure = partial(measure_activations, inputs.skeleton, trained, inputs.dtype, row, inputs.attention.name)
    row_bytes = sum(value.nbytes for value in vars(row).values() if isinstance(value, Tensor))
    return memory.Setup(
        skeleton=inputs.skeleton,
        trained=trained,
        optimizer=config.optim.name,
        dtype=inputs.dtype,
        world_size=world.size,
        zero=inputs.deepspeed["zero_optimization"],
        checkpointing=config.train.activation_checkpointing,
        activations=cache(measure),
        local_ranks=num_local_ranks(world),
        read_ahead=config.data.workers * PREFETCH * row_bytes,
        copies=config.checkpoint.asynchronous,
    )


def _name(kind: str, place: int, ranks: list[tuple[float, float, str]]) -> str:
    """`kind` of memory, and whose it is where the ranks do not all have as much at `place`."""
    least = min(ranks, key=lambda rank: rank[place])
    return kind if len({rank[place] for rank in ranks}) == 1 else f"{kind} of {least[2]}"


def _list_exclusions(plan: Plan) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in plan.exclusions.items()) or "none"


def first_screen(config: Config, inputs: Inputs, world: World) -> str:
    """What is about to run, in a few lines. Collective."""
    plan, step, unit = inputs.plan, inputs.plan.step(0), inputs.objective.unit_name
    each, total = step.cost / step.counts[SAMPLE], step.cost * inputs.total_steps
    excluded = _list_exclusions(plan)
    rates = ", ".join(f"{name} {config.optim.component(name).lr or 'frozen'}" for name in COMPONENTS)
    stage = inputs.deepspeed["zero_optimization"].get("stage", 0)
    geometry = inputs.processor.geometry
    train = ", ".join(source.path for source in inputs.data.sources)
    held_out = "none (data.eval is absent)"
    if inputs.held_out is not None:
        held_out = f"{config.data.eval}: {inputs.held_out.num_pairs} samples, {len(inputs.held_out.questions)} answers"
        held_out += f"; excluded: {_list_exclusions(inputs.held_out.plan)}"
    untested = describe_untested()
    return "\n".join(
        [
            *([untested] if untested else []),
            f"data       {train}: {plan.num_pairs} of {len(inputs.data.shards)} samples; excluded: {excluded}",
            f"held out   {held_out}",
            *inputs.processor.notes,
            f"features   {inputs.skeleton.vision_tower.describe_features()}",
            *([f"positions  {inputs.warning}"] if inputs.warning else []),
            f"images     {geometry.size} x {geometry.size} px, {geometry.num_tokens} tokens each; in "
            f"{plan.num_with_images} of {int(plan.kept.sum())} samples",
            f"steps      {inputs.total_steps} of {config.train.global_batch_size} {unit} "
            f"({inputs.total_steps / plan.steps_per_epoch:.2f} epochs)",
            f"rates      {rates}",
            f"ranks      {world.size} on {world.device.type}, ZeRO stage {stage}, {str(inputs.dtype).split('.')[1]}",
            *_describe_memory(config, inputs, world),
            f"work       {describe_flops(each)} a {unit.removesuffix('s')}, {describe_flops(total)} in all",
            f"output     {config.output_dir}",
        ]
    )
