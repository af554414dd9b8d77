"""Who is alone, who is a rank, and who was started by something that told no rank."""

from __future__ import annotations

import pytest

from pivot.system.launcher import complete_environment

STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}
BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_GTIDS": "0"}
OMPI = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
RANK = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "1"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"},  # a shell of salloc
        BATCH | {"SLURM_PROCID": "0"},  # a batch script of two tasks, before any srun
        STEP | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"},  # srun -n 1
        STEP | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # salloc's own step keeps the job's number of tasks
        OMPI | {"OMPI_COMM_WORLD_SIZE": "1"} | STEP | {"SLURM_PROCID": "1"},  # mpirun -n 1, whose daemons srun started
    ],
)
def test_a_lone_process_is_a_world_of_one(environment: dict[str, str]) -> None:
    complete_environment(environment)
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")
    assert environment["MASTER_PORT"].isdecimal()


@pytest.mark.parametrize("around", [{}, STEP | {"SLURM_PROCID": "1"}, OMPI | {"OMPI_COMM_WORLD_SIZE": "2"}])
def test_a_rank_that_was_told_so_stays_as_it_is(around: dict[str, str]) -> None:
    environment = around | RANK
    complete_environment(environment)
    assert environment == around | RANK


def test_a_world_of_one_needs_no_meeting_place() -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "1"}
    complete_environment(environment)
    assert environment["MASTER_ADDR"] == "127.0.0.1" and environment["MASTER_PORT"].isdecimal()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (STEP | {"SLURM_PROCID": "0"}, "srun started 2 processes without RANK.*srun bash -c 'RANK=.SLURM_PROCID LOCAL"),
        (STEP | {"SLURM_PROCID": "1"}, "srun started 2 processes"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, "srun started 2 processes"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "srun started 2 processes"),
        (BATCH | {"SLURM_PROCID": "1"}, "srun started 2 processes"),
        (OMPI | {"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun started 4 processes.*RANK=.OMPI_COMM_WORLD_RANK"),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "mpirun started 2 processes.*RANK=.PMI_RANK.*WORLD_SIZE=.PMI_SIZE"),
        ({"MV2_COMM_WORLD_SIZE": "2"}, "mpirun started 2 processes"),
        ({"RANK": "0"}, "RANK is 0, but WORLD_SIZE is absent; start the script with"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is absent"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}, "WORLD_SIZE is 2, but MASTER_ADDR is absent"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node1"}, "WORLD_SIZE is 2, but MASTER_PORT is absent"),
        (RANK | {"MASTER_ADDR": ""}, "MASTER_ADDR is absent"),
        (RANK | {"RANK": "2"}, "RANK is 2 and WORLD_SIZE 2, expected a RANK from 0 to 1"),
        (RANK | {"RANK": "one"}, "RANK: found 'one', expected a whole number"),
        (RANK | {"WORLD_SIZE": "-1"}, "WORLD_SIZE: found '-1', expected a whole number"),
    ],
)
def test_what_would_train_alone_or_hang_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        complete_environment(environment)
