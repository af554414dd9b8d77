"""What a run says before its first step: data, steps, rates, memory and work, in a few lines."""

from __future__ import annotations

from functools import cache, partial

from pivot.batch import SAMPLE
from pivot.config import COMPONENTS, Config
from pivot.data.plan import Plan
from pivot.startup import memory
from pivot.startup.activations import build_fullest_row, measure_activations
from pivot.startup.flops import describe_flops
from pivot.startup.inputs import Inputs
from pivot.system.distributed import World
from pivot.versions import describe_untested


def _memory_setup(config: Config, inputs: Inputs, world: World) -> memory.Setup:
    trained = config.optim.trained()
    row = build_fullest_row(inputs.plan, inputs.processor.geometry)
    measure = partial(measure_activations, inputs.skeleton, trained, inputs.dtype, row, inputs.attention.name)
    return memory.Setup(
        skeleton=inputs.skeleton,
        trained=trained,
        optimizer=config.optim.name,
        dtype=inputs.dtype,
        world_size=world.size,
        zero=inputs.deepspeed["zero_optimization"],
        checkpointing=config.train.activation_checkpointing,
        activations=cache(measure),
    )


def _list_exclusions(plan: Plan) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in plan.exclusions.items()) or "none"


def first_screen(config: Config, inputs: Inputs, world: World) -> str:
    """What is about to run, in a few lines."""
    plan, step, unit = inputs.plan, inputs.plan.step(0), inputs.objective.unit_name
    place = "GPU" if world.device.type == "cuda" else "machine"
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
            *([f"positions  {inputs.warning}"] if inputs.warning else []),
            f"images     {geometry.size} x {geometry.size} px, {geometry.num_tokens} tokens each; in "
            f"{plan.num_with_images} of {int(plan.kept.sum())} samples",
            f"steps      {inputs.total_steps} of {config.train.global_batch_size} {unit} "
            f"({inputs.total_steps / plan.steps_per_epoch:.2f} epochs)",
            f"rates      {rates}",
            f"ranks      {world.size} on {world.device.type}, ZeRO stage {stage}, {str(inputs.dtype).split('.')[1]}",
            *memory.describe_memory(_memory_setup(config, inputs, world), *memory.available_memory(world), place),
            f"work       {describe_flops(each)} a {unit.removesuffix('s')}, {describe_flops(total)} in all",
            f"output     {config.output_dir}",
        ]
    )
