"""What decides whether a job is submitted again; the scripts around it run in tests/slurm/ on a real SLURM."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.slurm.job import AGAIN, FAILED, OK, USAGE_ERROR, Run, begin, count_idle, end, judge, main, read_line
from pivot.config import REPOSITORY

SETTINGS = """
output_dir: {folder}/run
init_from: somewhere
data: {{train: set}}
objective: {{dpo: {{}}}}
optim: {{vision_tower: {{lr: 1e-4}}, projector: {{lr: 1e-3}}, language_model: {{lr: 1e-4}}}}
train: {{global_batch_size: 4, max_steps: 1}}
"""
DONE = {"status": "done", "step": 9}
PREEMPTED = {"status": "preempted", "step": 9}
LOST = {"status": "failed", "reason": "RuntimeError: a rank is gone"}
MISTAKE = {"status": "failed", "reason": "ConfigError: optim.lr: found -1"}


@pytest.mark.parametrize(
    ("status", "unchanged", "code", "verdict"),
    [
        (DONE, False, 0, OK),
        (DONE, False, 1, OK),  # the launcher was lost at the end
        (DONE, True, 0, OK),  # it was finished before
        (DONE, True, 1, AGAIN),  # a run that was made longer, and did not get to its first word
        (PREEMPTED, False, 0, AGAIN),
        (PREEMPTED, True, 2, FAILED),  # an older preemption: this start was refused
        (PREEMPTED, True, 1, AGAIN),
        ({"status": "running"}, False, 0, AGAIN),  # DeepSpeed's launcher returns 0 where its child was killed
        (LOST, False, 1, AGAIN),
        (MISTAKE, False, 2, FAILED),
        (MISTAKE, False, 0, FAILED),
        (MISTAKE, True, 137, AGAIN),  # it was mended, and then a rank died
        ({}, True, 2, FAILED),
        ({}, True, 137, AGAIN),
    ],
)
def test_the_status_decides_and_not_the_exit_code(
    status: dict[str, object], unchanged: bool, code: int, verdict: int
) -> None:
    assert judge(status, unchanged=unchanged, code=code)[0] == verdict


def leave(folder: Path, saved: int, status: dict[str, object]) -> None:
    """What a start leaves in its run folder."""
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"id": "x", "saved": saved}))
    (folder / "status").write_text(json.dumps(status))


def test_a_run_that_somebody_stopped_by_its_file_does_not_come_back(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    begin(run, "7", limit=3)
    leave(run.folder, 9, PREEMPTED | {"reason": f"stopped by the file {tmp_path}/run/stop on rank 0"})
    assert end(run, "7", 3, code=0) == FAILED
    begin(run, "7", limit=3)
    leave(run.folder, 12, PREEMPTED | {"step": 12, "reason": "stopped by SIGUSR2"})
    assert end(run, "7", 3, code=0) == AGAIN


def test_only_starts_that_save_nothing_count(tmp_path: Path) -> None:
    """Twenty preemptions with a step each are fine. Then nothing is saved: the third such start is the last."""
    run = Run(tmp_path / "run")
    for step in range(1, 21):
        assert begin(run, "7", limit=3) == OK
        leave(run.folder, step, {"status": "preempted", "step": step})
        assert end(run, "7", 3, code=0) == AGAIN
    verdicts = []
    for _ in range(3):
        assert begin(run, "7", limit=3) == OK
        leave(run.folder, 20, LOST)
        verdicts.append(end(run, "7", 3, code=1))
    assert verdicts == [AGAIN, AGAIN, FAILED]


def test_starts_that_slurm_makes_by_itself_are_limited_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A node is lost each time: the job's script is killed and never asks what follows."""
    run = Run(tmp_path / "run")
    assert [begin(run, "7", limit=3) for _ in range(4)] == [OK, OK, OK, FAILED]
    assert "3 starts in a row saved nothing behind step 0" in capsys.readouterr().err
    assert begin(run, "8", limit=3) == OK, "a new job begins to count anew"


def test_a_mistake_that_is_made_again_is_not_taken_for_the_old_one(tmp_path: Path) -> None:
    """The words in RUN/status are the same; that they were written anew tells."""
    run = Run(tmp_path / "run")
    leave(run.folder, 0, MISTAKE)
    begin(run, "7", limit=3)
    assert end(run, "7", 3, code=1) == AGAIN
    leave(run.folder, 0, MISTAKE)
    os.utime(run.folder / "status", ns=(0, run.status_at + 10**9))  # a file system's clock may be coarse
    assert end(run, "7", 3, code=1) == FAILED


def test_the_first_start_of_a_job_is_not_idle(tmp_path: Path) -> None:
    """Also where an earlier job saved."""
    run = Run(tmp_path / "run")
    leave(run.folder, 40, PREEMPTED)
    assert count_idle(run.last_start("7"), run.saved) == 0
    begin(run, "7", limit=3)
    assert count_idle(run.last_start("7"), run.saved) == 1
    leave(run.folder, 41, PREEMPTED)
    assert count_idle(run.last_start("7"), run.saved) == 0


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"job": "7"}', "\0"])
def test_a_damaged_note_counts_as_none(tmp_path: Path, damage: str) -> None:
    (tmp_path / "slurm.json").write_text(damage)
    assert begin(Run(tmp_path), "7", limit=1) == OK


def test_a_line_of_a_sweep_is_split_as_a_shell_does_and_nothing_is_run(tmp_path: Path) -> None:
    grid = tmp_path / "grid"
    lines = ["# rates", "output_dir='runs/a b' optim.lr=1e-6", "", 'output_dir=runs/$(touch\\ canary) note="; `ls`"']
    grid.write_text("\n".join(lines))
    assert read_line(str(grid), 1) == ["output_dir=runs/a b", "optim.lr=1e-6"]
    assert read_line(str(grid), 2) == ["output_dir=runs/$(touch canary)", "note=; `ls`"]


@pytest.mark.parametrize(
    ("line", "number", "sentence"),
    [
        ("output_dir=a", 2, "has 1 line(s), but the array a task 2; give --array=1-1"),
        ("output_dir=a lr", 1, "line 1 holds 'lr', expected key=value words"),
        ("optim.lr=1", 1, "line 1 has no output_dir="),
        ("output_dir='a", 1, "No closing quotation"),
    ],
)
def test_a_line_that_cannot_be_is_refused(
    tmp_path: Path, line: str, number: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "grid").write_text(line)
    assert main(["line", str(tmp_path / "grid"), str(number)]) == USAGE_ERROR
    assert sentence in capsys.readouterr().err


def test_the_command_line_finds_the_run_as_training_does(tmp_path: Path) -> None:
    """`output_dir` of the YAML, then of an override with a blank; a wrong key is refused before a rank starts."""
    (tmp_path / "run.yaml").write_text(SETTINGS.format(folder=tmp_path))
    words = ["launch/train_dpo.py", str(tmp_path / "run.yaml")]

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "launch/slurm/job.py", *arguments]
        environment = os.environ | {"SLURM_JOB_ID": "7"}
        return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)

    assert call("begin", *words).returncode == OK
    assert json.loads((tmp_path / "run/slurm.json").read_text())["job"] == "7"
    assert call("begin", *words, f"output_dir={tmp_path}/a run").returncode == OK
    leave(tmp_path / "a run", 1, DONE)
    assert call("end", "0", *words, f"output_dir={tmp_path}/a run").returncode == OK
    refused = call("begin", *words, "optim.lrr=1")
    assert refused.returncode == USAGE_ERROR and "optim.lrr" in refused.stderr
    assert call("end", "0", *words, "--check").returncode == OK
    assert call("end", "2", *words, "--check").returncode == FAILED
    refused = call("begin", "launch/evaluate.py", "x")
    assert refused.returncode == USAGE_ERROR and "expected launch/train_dpo.py CONFIG" in refused.stderr


def test_each_job_script_opens_with_its_site_lines_and_no_command_before_them() -> None:
    """sbatch reads no option behind the first command; and all scripts come back, append, and hear a signal in time."""
    scripts = sorted((REPOSITORY / "launch/slurm").glob("*.sbatch"))
    assert len(scripts) == 5
    for script in scripts:
        lines = script.read_text().splitlines()
        commands = [number for number, line in enumerate(lines) if line and not line.startswith("#")]
        options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
        assert lines[0] == "#!/bin/bash" and max(options) < min(commands), script
        text = "\n".join(lines[number] for number in options)
        for option in ("--requeue", "--open-mode=append", "--output=", r"--signal=B:USR2@\d+", "--time="):
            assert re.search(option, text), (script, option)
        assert lines[min(commands)].startswith('PYTHON="${PYTHON:-.venv/bin/python}"')
        assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
