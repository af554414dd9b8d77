"""The demo chain's screens, from made-up runs: what is said before, after, and when a stage did not come to its end."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("launch_demo", ROOT / "launch" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_run(folder, *evaluations):
    folder.mkdir(parents=True)
    rows = [{"event": "start"}, *({"event": "eval", "eval/loss": 1.0} | found for found in evaluations)]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_the_table_shows_every_arm(demo, tmp_path, capsys):
    name, vqa = "eval/preference_accuracy", "eval/vqa_accuracy"
    write_run(tmp_path / "align", {name: 0.5, vqa: 0.0}, {name: 0.51, vqa: 0.01})
    write_run(tmp_path / "sft", {name: 0.51, vqa: 0.01}, {name: 0.9, vqa: 0.8})
    last = {name: 0.95, vqa: 0.85, "eval/rewards/accuracies": 0.88, "eval/rewards/margins": 1.2}
    more = {"intervals": {name: [0.95, 0.94, 0.96]}, "eval/vqa_accuracy_blind": 0.19, "eval/num_questions": 1600}
    write_run(tmp_path / "dpo", {name: 0.9, vqa: 0.8}, last | more)
    times = [{"stage": "sft", "seconds": 100.0}, {"stage": "sft", "seconds": 20.0}]
    (tmp_path / "times.jsonl").write_text("\n".join(map(json.dumps, times)))
    assert demo.main(["table", "dpo", str(tmp_path)]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["without", "looking", "0.500", "0.190"] in shown
    assert ["untrained", "0.500", "0.000"] in shown
    assert ["after", "align", "0.510", "0.010"] in shown
    assert ["after", "sft", "0.900", "0.800", "120"] in shown  # the seconds of both calls
    assert ["after", "dpo", "0.950", "[0.940,", "0.960]", "0.850", "0.880", "1.200"] in shown


def test_the_first_screen_says_what_is_left(demo, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PYTHON", "python")  # an environment of the user's: nothing is installed
    assert demo.main(["start", "dpo", str(tmp_path)]) == 0
    whole = capsys.readouterr().out
    assert "scenes.png" in whole and whole.count("done") == 1
    (tmp_path / "align.done").touch()
    assert demo.main(["start", "dpo", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("done") == 2
    (tmp_path / "dpo.done").touch()
    assert demo.main(["start", "dpo", str(tmp_path)]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("code", "status", "expected"), [(0, "done", 0), (0, "preempted", 130), (1, "failed", 1)])
def test_a_stage_is_done_only_when_it_says_so(demo, tmp_path, monkeypatch, code, status, expected):
    """A run that was told to stop ends with code 0, too: its status tells them apart."""
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "status").write_text(json.dumps({"status": status}))
    script = f"import sys; sys.exit({code})"
    monkeypatch.setattr(demo, "count_processes", lambda: 2)
    run = demo._run
    monkeypatch.setattr(demo, "_run", lambda command, environment: run([sys.executable, "-c", script], environment))
    assert demo.main(["stage", "sft", str(tmp_path)]) == expected
    assert (tmp_path / "sft.done").is_file() == (expected == 0)


def test_another_folder_and_seed_are_handed_to_the_run(demo, monkeypatch):
    monkeypatch.setenv("SEED", "0")
    assert demo._settings("dpo", Path("runs/demo")) == []
    monkeypatch.setenv("SEED", "3")
    found = demo._settings("sft", Path("runs/other"))
    assert found == [
        "output_dir=runs/other/sft",
        "data.train=runs/other/data/questions",
        "data.eval=runs/other/data/eval",
        "init_from=runs/other/align/export",
        "train.seed=3",
    ]
