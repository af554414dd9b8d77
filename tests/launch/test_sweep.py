"""launch/sweep.py: the grid, its folders, the table over seeds, and a real sweep that goes on."""

from __future__ import annotations

import csv
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pivot.config import REPOSITORY
from pivot.evaluate.intervals import difference_of_means, mean_of_runs
from pivot.report.differences import describe_differences
from pivot.report.sweep import describe, group
from tests.kit.commands import rank_free_environment
from tests.kit.runs import make_run, write_dpo_run

sys.path.insert(0, str(REPOSITORY / "launch"))  # as for a script
import sweep

KEY = "eval/preference_accuracy"


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launch/sweep.py", *words]
    environment = rank_free_environment() | {"DS_ACCELERATOR": "cpu", "NPROC": "1"} | environment
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=500, check=False
    )


def test_every_combination_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    grid = sweep.parse_grid(["optim.lr=1e-6,5e-6", "objective.dpo.loss={sigmoid: 0.8, sft: 0.2},ipo"])
    assert grid["objective.dpo.loss"] == ["{sigmoid: 0.8, sft: 0.2}", "ipo"]
    cells = sweep.make_cells(grid, tmp_path)
    assert [cell.folder.name for cell in cells] == [
        "lr=1e-6,loss=_sigmoid_0.8,_sft_0.2_",
        "lr=1e-6,loss=ipo",
        "lr=5e-6,loss=_sigmoid_0.8,_sft_0.2_",
        "lr=5e-6,loss=ipo",
    ]
    assert cells[3].words() == ["optim.lr=5e-6", "objective.dpo.loss=ipo", f"output_dir={tmp_path}/lr=5e-6,loss=ipo"]


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        (["optim.lr"], "expected KEY=VALUE"),
        (["optim.lr=1,,2"], "expected KEY=VALUE"),
        (["optim.lr=1", "optim.lr=2"], "given twice"),
        (["train.seed=1,1"], "a value stands there twice"),
        (["output_dir=a,b"], "a folder of its own"),
    ],
)
def test_a_grid_that_makes_no_sense_is_a_sentence(texts: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        sweep.parse_grid(texts)


def test_values_that_differ_in_other_letters_alone_would_share_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two runs would have the folder"):
        sweep.make_cells({"data.train": ["a b", "a*b"]}, tmp_path)


def test_the_interval_over_runs_is_students() -> None:
    """Values 1, 2, 3: mean 2, standard error 1/sqrt(3), t(0.975, 2) = 4.30265, so 2 +- 2.48414."""
    interval = mean_of_runs([1.0, 2.0, 3.0])
    assert interval is not None
    assert np.allclose(interval, [2.0, 2.0 - 2.48414, 2.0 + 2.48414], atol=1e-5)
    assert mean_of_runs([1.0]) is None
    paired = difference_of_means([1.0, 2.0, 3.0], [2.0, 3.0, 4.0])
    assert paired == (1.0, 1.0, 1.0)  # the same change in each pair: no spread, however far the runs lie apart


def make_cells(folder: Path, skills: dict[tuple[str, str], float]) -> list[tuple[dict[str, str], Path]]:
    """Made-up finished runs by (lr, seed) with about that preference accuracy at their end."""
    cells = []
    for (lr, seed), skill in skills.items():
        made = folder / f"lr={lr},seed={seed}"
        make_run(made, "dpo", [], held_out="held", skill=(0.5, skill))
        cells.append(({"optim.lr": lr, "train.seed": seed}, made))
    return cells


def test_seeds_of_a_setting_are_one_row_with_the_interval_over_them(tmp_path: Path) -> None:
    skills = {("1", "1"): 0.6, ("1", "2"): 0.62, ("2", "1"): 0.8, ("2", "2"): 0.83}
    cells = make_cells(tmp_path, skills)
    settings = group([*cells, ({"optim.lr": "3", "train.seed": "1"}, tmp_path / "not begun")])
    assert [(setting.name, sorted(setting.runs)) for setting in settings] == [
        ("optim.lr=1", ["1", "2"]),
        ("optim.lr=2", ["1", "2"]),
    ]
    first, second = (setting.results(KEY) for setting in settings)
    table = describe(settings, [KEY])
    change = difference_of_means([first["1"], first["2"]], [second["1"], second["2"]])
    assert change is not None
    assert "{:+.3f} [{:+.3f}, {:+.3f}]".format(*change) in table.splitlines()[3]
    assert "over runs (t)" in table


def test_one_seed_is_said_to_be_one(tmp_path: Path) -> None:
    cells = make_cells(tmp_path, {("1", "1"): 0.6, ("2", "1"): 0.8})
    assert "not what another seed would give" in describe(group(cells), [KEY])


def test_two_runs_are_compared_by_settings_samples_and_steps(tmp_path: Path) -> None:
    (_, one), (_, other) = make_cells(tmp_path, {("1", "1"): 0.6, ("2", "1"): 0.8})
    assert [line for line in describe_differences(one, other) if "not known" not in line] == []
    text = (other / "config.yaml").read_text().replace("global_batch_size: 64", "global_batch_size: 32")
    (other / "config.yaml").write_text(text)
    assert "train.global_batch_size: 64 and 32" in describe_differences(one, other)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_trains_each_run_once_and_goes_on(tmp_path: Path) -> None:
    write_dpo_run(tmp_path)
    words = [str(tmp_path / "run.yaml"), "--grid", "optim.projector.lr=1e-3,1e-4", f"data.eval={tmp_path}/set"]
    words += ["data.image.fit=squash"]
    first = run(*words)
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "run-sweep"
    with (folder / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["optim.projector.lr"] for row in rows] == ["1e-3", "1e-4"]
    assert all(row["status"] == "done" and row[KEY] for row in rows)
    assert (folder / "table.png").stat().st_size > 1000
    written = (folder / "lr=1e-3" / "log.jsonl").stat().st_mtime_ns
    again = run(*words)
    assert again.returncode == 0 and again.stdout.count("is done") == 2
    assert (folder / "lr=1e-3" / "log.jsonl").stat().st_mtime_ns == written
    compared = run("--compare", str(folder / "lr=1e-3"), str(folder / "lr=1e-4"))
    assert compared.returncode == 1
    assert compared.stdout == "optim.projector.lr: 0.001 and 0.0001\n"


def test_slurm_gets_a_line_for_each_run(tmp_path: Path) -> None:
    write_dpo_run(tmp_path)
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > '{tmp_path}/words'\n")
    sbatch.chmod(0o755)
    words = [str(tmp_path / "run.yaml"), "--grid", "train.seed=1,2", "--slurm=--nodes=2 --time=1:00:00"]
    done = run(*words, PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    lines = tmp_path / "run-sweep" / "grid.txt"
    assert [shlex.split(line) for line in lines.read_text().splitlines()] == [
        ["train.seed=1", f"output_dir={tmp_path}/run-sweep/seed=1"],
        ["train.seed=2", f"output_dir={tmp_path}/run-sweep/seed=2"],
    ]
    assert (tmp_path / "words").read_text().splitlines() == [
        "--array=1-2",
        "--nodes=2",
        "--time=1:00:00",
        "launch/slurm/sweep.sbatch",
        str(lines),
        "launch/train_dpo.py",
        str(tmp_path / "run.yaml"),
    ]


def test_a_value_that_no_run_may_have_is_refused_before_the_first_trains(tmp_path: Path) -> None:
    write_dpo_run(tmp_path)
    refused = run(str(tmp_path / "run.yaml"), "--grid", "train.global_batch_size=4,none")
    assert refused.returncode == 2
    assert "train.global_batch_size" in refused.stderr and "Traceback" not in refused.stderr
    assert not (tmp_path / "run-sweep").exists()
