"""The shipped job scripts on a real SLURM of two nodes: `make test-slurm`, a few minutes.

Everything lies in a folder whose name holds blanks, quotes and a semicolon: each argument must arrive whole.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pivot.config import REPOSITORY
from pivot.data.shards import ShardSet
from tests.kit.sets import make_set
from tests.kit.slurm import NODES, Cluster, missing_program, running_cluster, wait_until
from tests.kit.tiny import tiny_llava

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
STEPS = 400
RUN = """
output_dir: "???"
init_from: "???"
deepspeed: ds_configs/zero3.json
data: {train: "???", cache_dir: "???", workers: 1}
objective: {dpo: {}}
optim: {vision_tower: {lr: 2e-4}, projector: {lr: 1e-3}, language_model: {lr: 5e-4}}
train: {global_batch_size: 6, max_steps: 400, max_tokens_per_micro_batch: 400, seed: 3, timeout_s: 120}
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if missing := missing_program():
        pytest.skip(f"{missing} is not here: install Debian's slurm-wlm and munge, or their like, to run these tests")
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs") / 'it\'s one; touch canary "here"'
    folder.mkdir()
    tiny_llava(folder / "llava")
    make_set(folder)
    (folder / "run.yaml").write_text(RUN)
    return folder


class Job:
    """One submitted job of two nodes with a rank each."""

    def __init__(self, cluster: Cluster, folder: Path, script: str, *words: str, options: tuple[str, ...] = ()) -> None:
        self.cluster, self._output = cluster, cluster.folder / f"{script}-%A.out"
        resources = ("--nodes=2", "--cpus-per-task=1", "--mem=100", "--time=20", "--signal=B:USR2@60")
        if script != "pack":
            resources += ("--gpus-per-node=1", "--ntasks-per-node=1")
        command = ["sbatch", "--parsable", *resources, *options, f"--output={self._output}"]
        variables = {"PYTHON": sys.executable, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        found = cluster.run(*command, f"launch/slurm/{script}.sbatch", *words, cwd=REPOSITORY, **variables)
        self.number = found.strip()

    @property
    def output(self) -> str:
        path = Path(str(self._output).replace("%A", self.number))
        return path.read_text(errors="replace") if path.is_file() else ""

    def story(self) -> str:
        """Its end, for a message: what it printed, and what SLURM says."""
        return f"{self.output[-8000:]}\n{self.cluster.log(self.number)}"

    def wait(self, *states: str, restarts: int | None = None, task: str = "") -> dict[str, str]:
        """What SLURM says of the job once it is in one of the states, or was submitted again so often."""

        def look() -> dict[str, str] | None:
            seen = self.cluster.job(self.number + task)
            again = seen["JobState"] == "PENDING" and seen["Restarts"] == str(restarts)
            return seen if again or seen["JobState"] in states else None

        try:
            return wait_until(look, 300.0)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.cluster.job(self.number + task)}\n{self.story()}") from error

    def wait_for_requeue(self, restarts: int, task: str = "") -> None:
        seen = self.wait("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", restarts=restarts, task=task)
        assert seen["JobState"] == "PENDING", self.story()

    def signal(self, task: str = "") -> None:
        """As SLURM does by --signal=B:USR2@...: to the batch script alone."""
        self.cluster.run("scancel", "--batch", "--signal=USR2", self.number + task)


def settings(folder: Path, run: str, *more: str) -> tuple[str, ...]:
    words = (f"output_dir={folder / run}", f"init_from={folder / 'llava'}", f"data.train={folder / 'set'}")
    return (str(folder / "run.yaml"), *words, f"data.cache_dir={folder / 'cache'}", *more)


def train(cluster: Cluster, folder: Path, script: str, run: str, *more: str, options: tuple[str, ...] = ()) -> Job:
    return Job(cluster, folder, script, "launch/train_dpo.py", *settings(folder, run, *more), options=options)


def steps(run: Path) -> list[int]:
    path = run / "log.jsonl"
    rows = [json.loads(row) for row in path.read_text().splitlines() if row] if path.is_file() else []
    return [row["step"] for row in rows if "event" not in row]


def status(run: Path) -> dict[str, object]:
    return json.loads((run / "status").read_text())


def wait_for_steps(job: Job, run: Path, count: int) -> None:
    try:
        wait_until(lambda: len(steps(run)) >= count, 240.0)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{job.story()}") from error


def test_one_task_a_node_is_signalled_saves_goes_on_and_ends(cluster: Cluster, folder: Path) -> None:
    """DeepSpeed's launcher on each node. Every step is in the log once, behind the resume those that were missing."""
    run = folder / "one task a node"
    job = train(cluster, folder, "deepspeed", run.name)
    wait_for_steps(job, run, 5)
    job.signal()
    job.wait_for_requeue(restarts=1)
    saved = status(run)
    assert saved["status"] == "preempted" and 5 <= int(str(saved["step"])) < STEPS
    cluster.start_now(job.number)
    assert job.wait("COMPLETED", "FAILED")["JobState"] == "COMPLETED", job.story()
    assert (status(run)["status"], status(run)["step"]) == ("done", STEPS)
    assert steps(run) == list(range(1, STEPS + 1))
    assert f"start      step {saved['step']}, resumed from" in job.output
    assert not list(REPOSITORY.glob("canary*")) and not list(folder.parent.glob("canary*"))
    print(job.output)


def test_one_task_a_gpu_meets_its_time_limit_goes_on_and_ends(cluster: Cluster, folder: Path) -> None:
    """No launcher; SLURM itself sends the signal, before the limit. The weights are those of the other style."""
    run = folder / "one task a gpu"
    job = train(cluster, folder, "srun", run.name, options=("--time=2", "--signal=B:USR2@119"))
    job.wait_for_requeue(restarts=1)
    assert "got USR2" in job.output
    saved = status(run)
    assert saved["status"] == "preempted" and 0 < int(str(saved["step"])) < STEPS
    cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=20")
    cluster.start_now(job.number)
    assert job.wait("COMPLETED", "FAILED")["JobState"] == "COMPLETED", job.story()
    assert (status(run)["status"], status(run)["step"]) == ("done", STEPS)
    assert steps(run) == list(range(1, STEPS + 1))
    found, expected = (load_file(folder / name / "export/model.safetensors") for name in (run.name, "one task a node"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_cancelled_job_saves_and_does_not_come_back(cluster: Cluster, folder: Path) -> None:
    run = folder / "cancelled"
    job = train(cluster, folder, "srun", run.name)
    wait_for_steps(job, run, 2)
    cluster.run("scancel", job.number)
    assert job.wait("CANCELLED", restarts=1)["JobState"] == "CANCELLED"
    wait_until(lambda: "not submitted again here, since the job is C" in job.output, 30.0)  # CANCELLED or COMPLETING
    assert status(run)["status"] == "preempted"


@pytest.mark.parametrize("script", ["deepspeed", "srun"])
def test_a_job_that_makes_room_saves_and_goes_on_behind_it(
    cluster: Cluster, folder: Path, tmp_path: Path, script: str
) -> None:
    """A job of higher priority gets the nodes before this one's grace time of two minutes is over."""
    run = folder / f"makes room {script}"
    job = train(cluster, folder, script, run.name, "train.max_steps=60")
    wait_for_steps(job, run, 2)
    other = tmp_path / "other.sh"
    other.write_text("#!/bin/bash\nsleep 2\n")
    cluster.run("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", f"--output={tmp_path}/other", str(other))
    job.wait_for_requeue(restarts=1)
    assert "got USR2" not in job.output and "submitted again" in job.output
    assert status(run)["status"] == "preempted"
    wait_until(lambda: not cluster.run("squeue", "--noheader", "--partition=urgent").strip(), 60.0)
    cluster.start_now(job.number)
    assert job.wait("COMPLETED", "FAILED")["JobState"] == "COMPLETED", job.story()
    assert steps(run) == list(range(1, 61))


def test_slurm_puts_a_job_back_whose_node_is_lost_and_it_goes_on(cluster: Cluster, folder: Path) -> None:
    """No script of ours is asked. The node is only said to be down, so that its ranks may hear a SIGTERM and save."""
    run = folder / "lost node"
    job = train(cluster, folder, "srun", run.name, "train.max_steps=100", "checkpoint.every_steps=10")
    wait_for_steps(job, run, 15)
    cluster.run("scontrol", "update", f"NodeName={NODES[1]}", "State=DOWN", "Reason=test")
    job.wait_for_requeue(restarts=1)
    with contextlib.suppress(AssertionError):  # it may be back already
        cluster.run("scontrol", "update", f"NodeName={NODES[1]}", "State=RESUME")
    cluster.start_now(job.number)
    assert job.wait("COMPLETED", "FAILED")["JobState"] == "COMPLETED", job.story()
    assert (status(run)["status"], status(run)["step"]) == ("done", 100)
    resumed = re.search("start      step ([0-9]+), resumed from", job.output)
    assert resumed is not None and int(resumed[1]) >= 10


@pytest.mark.parametrize("script", ["deepspeed", "srun"])
def test_a_run_goes_on_with_a_node_fewer(cluster: Cluster, folder: Path, script: str) -> None:
    """The same words with --nodes=1: two ranks save, one goes on."""
    run = folder / f"a node fewer {script}"
    job = train(cluster, folder, script, run.name, "train.max_steps=60")
    wait_for_steps(job, run, 5)
    job.signal()
    job.wait_for_requeue(restarts=1)
    cluster.run("scancel", job.number)
    other = train(cluster, folder, script, run.name, "train.max_steps=60", options=("--nodes=1",))
    assert other.wait("COMPLETED", "FAILED")["JobState"] == "COMPLETED", other.story()
    assert "ranks      2 on cpu" in job.output and "ranks      1 on cpu" in other.output
    assert steps(run) == list(range(1, 61))


def test_each_rank_is_told_its_place(cluster: Cluster, folder: Path, tmp_path: Path) -> None:
    """Two nodes with two GPUs each: a made-up Python says who it is, and that the settings are wrong."""
    python = tmp_path / "python"
    place = "$RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $MASTER_ADDR:$MASTER_PORT"
    python.write_text(
        f'#!/bin/bash\n[ "$1" != -u ] || {{ echo "place {place}"; exit 2; }}\nexec "{sys.executable}" "$@"\n'
    )
    python.chmod(0o755)
    options = (f"--export=ALL,PYTHON={python}", "--gpus-per-node=2", "--ntasks-per-node=2")
    job = train(cluster, folder, "srun", "place", options=options)
    job.wait("FAILED", restarts=1)
    meet = f"{NODES[0]}:{20000 + int(job.number)}"
    expected = [f"place {rank}/4 {rank % 2}/2 {meet}" for rank in range(4)]
    assert sorted(line for line in job.output.splitlines() if line.startswith("place ")) == expected


def test_a_run_that_dies_at_once_is_given_up(cluster: Cluster, folder: Path, tmp_path: Path) -> None:
    """Its ranks are killed before they say a word, three times: RUN/status is not there, the exit code all there is."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\n[ "$1" != -u ] || kill -KILL $$\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    job = train(cluster, folder, "srun", "dies", options=(f"--export=ALL,PYTHON={python}",))
    for restart in (1, 2):
        job.wait_for_requeue(restarts=restart)
        cluster.start_now(job.number)
    last = job.wait("FAILED")
    assert last["Restarts"] == "2" and last["ExitCode"] in ("137:0", "143:0")  # as srun saw the last of them
    assert "3 starts in a row saved nothing behind step 0, so it is not started again" in job.output


@pytest.mark.parametrize(
    ("script", "more", "sentence"),
    [
        ("srun", "optim.lrr=1", "optim.lrr"),
        ("srun", "data.exclude=none.json", "the start was refused; mend what its sentence above"),
        ("deepspeed", "data.exclude=none.json", "the start was refused; mend what its sentence above"),
    ],
)
def test_a_run_that_the_user_must_mend_is_not_submitted_again(
    cluster: Cluster, folder: Path, script: str, more: str, sentence: str
) -> None:
    """The first is refused before a rank starts, the others by the ranks."""
    job = train(cluster, folder, script, "refused", more)
    found = job.wait("FAILED", restarts=1)
    assert (found["JobState"], found["Restarts"], found["ExitCode"]) == ("FAILED", "0", "2:0"), job.story()
    assert sentence in job.output


def test_a_sweep_submits_the_task_again_that_was_signalled_and_no_other(
    cluster: Cluster, folder: Path, tmp_path: Path
) -> None:
    grid = tmp_path / "grid of two"
    lines = [f'output_dir="{tmp_path}/line {number}" train.max_steps={limit}' for number, limit in ((1, 2), (2, STEPS))]
    grid.write_text("# a comment\n" + "\n\n".join(lines))
    words = [word for word in settings(folder, "unused") if not word.startswith("output_dir=")]
    options = ("--array=1-2", "--nodes=1")
    job = Job(cluster, folder, "sweep", str(grid), "launch/train_dpo.py", *words, options=options)
    wait_for_steps(job, tmp_path / "line 2", 3)
    job.signal("_2")
    job.wait_for_requeue(restarts=1, task="_2")
    cluster.start_now(f"{job.number}_2")
    first, second = job.wait("COMPLETED", task="_1"), job.wait("COMPLETED", task="_2")
    assert (first["Restarts"], second["Restarts"]) == ("0", "1")
    assert [steps(tmp_path / f"line {number}")[-1] for number in (1, 2)] == [2, STEPS]


def test_two_nodes_pack_one_set(cluster: Cluster, folder: Path, tmp_path: Path) -> None:
    """12 rows a node; joined, they are the samples of a pack on one."""
    out = tmp_path / "a set"
    job = Job(cluster, folder, "pack", str(folder / "source"), str(out), "--name", "joined", "--quiet")
    assert job.wait("COMPLETED", "FAILED")["JobState"] == "COMPLETED", job.story()
    shares = [ShardSet.open(tmp_path / f"a set-shares/of-2/000{number}") for number in (1, 2)]
    joined, whole = ShardSet.open(out), ShardSet.open(folder / "set")
    assert [len(share) for share in shares] == [12, 12]
    found, expected = (sorted(str(one.read(row)) for row in range(len(one))) for one in (joined, whole))
    assert found == [sample.replace("tiny/", "joined/") for sample in expected]


def test_the_reference_is_scored_beforehand_on_both_nodes(cluster: Cluster, folder: Path, tmp_path: Path) -> None:
    """Asked to stop, it comes back too, though it has no RUN/status."""
    job = Job(cluster, folder, "reference", *settings(folder, "unused", f"data.cache_dir={tmp_path}"))
    wait_until(lambda: f"{job.number}.0" in cluster.run("squeue", "--noheader", "--steps"), 60.0)
    job.signal()
    job.wait_for_requeue(restarts=1)
    cluster.start_now(job.number)
    assert job.wait("COMPLETED", "FAILED")["JobState"] == "COMPLETED", job.story()
    assert "ranks      2 on cpu" in job.output and "complete   training set" in job.output
