"""What the launcher says of this process's place among the ranks: variables of the environment, complete or refused."""

from __future__ import annotations

import sys
from collections.abc import MutableMapping

from pivot.system.process import free_port

Environment = MutableMapping[str, str]

# What mpirun's kinds call a process's size, rank and rank on its machine.
_MPI = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
)
_SLURM = ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
# srun sets these, and a batch script lacks them, though its SLURM_NTASKS and SLURM_PROCID are there.
_IN_SRUN = ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS", "SLURM_SRUN_COMM_HOST")


def complete_environment(environment: Environment) -> None:
    """See that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are there; a process that nobody launched is alone.

    Raises ValueError when some are missing or contradict each other, or when srun or mpirun started several processes
    that would each take itself for the only one.
    """
    if "RANK" not in environment:
        if _number(environment, "WORLD_SIZE", 1) > 1:
            raise ValueError(f"WORLD_SIZE is {environment['WORLD_SIZE']}, but RANK is absent; {_EXPORT}")
        _refuse_tasks(environment)
        environment.update(RANK="0", WORLD_SIZE="1")
        environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        return
    if "WORLD_SIZE" not in environment:
        raise ValueError(f"RANK is {environment['RANK']}, but WORLD_SIZE is absent; {_EXPORT}")
    rank, size = _number(environment, "RANK", 0), _number(environment, "WORLD_SIZE", 1)
    if not rank < size:
        raise ValueError(f"RANK is {rank} and WORLD_SIZE {size}, expected a RANK from 0 to {size - 1}; {_EXPORT}")
    if size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not environment.get(name):
                raise ValueError(f"WORLD_SIZE is {size}, but {name} is absent; {_EXPORT}")
    environment.setdefault("MASTER_ADDR", "127.0.0.1")
    environment.setdefault("MASTER_PORT", str(free_port()))


_EXPORT = (
    "start the script with deepspeed or torchrun, which set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR (the host of "
    "rank 0) and MASTER_PORT, or export all five; unset them to train alone"
)


def _number(environment: Environment, name: str, default: int) -> int:
    value = environment.get(name, str(default))
    if not value.isdecimal():
        raise ValueError(f"{name}: found {value!r}, expected a whole number; {_EXPORT}")
    return int(value)


def _refuse_tasks(environment: Environment) -> None:
    """ValueError for one of several processes that no launcher of ours told its rank."""
    for names in _MPI:
        if names[0] in environment:
            _refuse_several("mpirun", environment[names[0]], names)
            return
    if "SLURM_PROCID" not in environment or _is_batch_script(environment):
        return
    _refuse_several("srun", environment.get("SLURM_STEP_NUM_TASKS") or environment.get(_SLURM[0], "1"), _SLURM)


def _is_batch_script(environment: Environment) -> bool:
    """Whether this is the one process of a job before any srun."""
    return (
        "SLURM_JOB_ID" in environment
        and environment["SLURM_PROCID"] == "0"
        and not any(name in environment for name in _IN_SRUN)
    )


def _refuse_several(launcher: str, num_tasks: str, names: tuple[str, str, str]) -> None:
    if num_tasks in ("", "0", "1"):
        return
    size, rank, local_rank = names
    host = '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)' if launcher == "srun" else "HOST_OF_RANK_0"
    variables = f"RANK=${rank} LOCAL_RANK=${local_rank} WORLD_SIZE=${size} MASTER_ADDR={host} MASTER_PORT=29500"
    raise ValueError(
        f"{launcher} started {num_tasks} processes without RANK, so each would train alone and write the same folder; "
        f"start them with {launcher} bash -c '{variables} python {sys.argv[0]} ...', or a single one with "
        f"{launcher} -n 1"
    )
