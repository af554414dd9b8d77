"""The demo chain's screens, from made-up runs: what is said before, after, and when a stage did not come to its end."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from launch.stopping import run_until_stopped
from pivot.evaluate import outcomes
from pivot.evaluate.vqa import VQA

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def local(demo):
    return sys.modules["local"]  # as demo.py imported it


@pytest.fixture(scope="module")
def demo():
    sys.path.insert(0, str(ROOT / "launch"))  # as for a script
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


def test_the_table_says_what_dpo_changed(demo, tmp_path, capsys):
    """200 questions, one an image: DPO mends 15 of SFT's 20 wrong answers and breaks 5: +10 of 200 = +0.050.

    Variance of the mean with G / (G - 1): (20 - 200 * 0.05**2) / 200**2 * 200 / 199; 1.96 times its root: 0.043.
    """
    rows, wrong = np.arange(200), {"sft": range(20), "dpo": [*range(5), *range(100, 105)]}
    for name, step in (("sft", 800), ("dpo", 180)):
        write_run(tmp_path / name, {"step": 0}, {"step": step})
        right = np.where(np.isin(rows, wrong[name]), 0.0, 1.0)
        outcomes.keep([], {VQA: right, f"{VQA}/row": rows, f"{VQA}/group": rows}, tmp_path / name, step)
    assert demo.main(["table", "dpo", str(tmp_path)]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["less", "sft", "+0.050", "[+0.007,", "+0.093]"] in shown


def test_a_torn_line_of_the_log_does_not_matter(demo, tmp_path, capsys):
    write_run(tmp_path / "sft", {"eval/vqa_accuracy": 0.8})
    with (tmp_path / "sft" / "log.jsonl").open("a") as file:
        file.write('\n{"event": "eval", "eval/lo')  # the disk was full
    assert demo.main(["table", "sft", str(tmp_path)]) == 0
    assert ["after", "sft", "0.800"] in [line.split() for line in capsys.readouterr().out.splitlines()]


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


@pytest.mark.parametrize(
    ("code", "status", "expected"),
    [(0, "done", 0), (0, "preempted", 130), (75, "running", 130), (1, "preempted", 1), (1, "failed", 1)],
)
def test_a_stage_is_done_only_when_it_says_so(demo, local, tmp_path, monkeypatch, code, status, expected):
    """A launcher may lose the code of a run that was told to stop: its status tells. A failure may leave an old one."""
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "status").write_text(json.dumps({"status": status}))
    script = f"import sys; sys.exit({code})"
    monkeypatch.setenv("NPROC", "2")
    monkeypatch.setattr(
        local,
        "run_until_stopped",
        lambda command, environment, folder: run_until_stopped([sys.executable, "-c", script], environment, folder),
    )
    assert demo.main(["stage", "sft", str(tmp_path)]) == expected
    assert (tmp_path / "sft.done").is_file() == (expected == 0)


@pytest.mark.parametrize(
    ("seed", "folder", "changed"),
    [
        ("0", "runs/demo", []),
        ("3", "runs/demo", ["train.seed=3"]),
        (
            "3",
            "elsewhere",
            [
                "output_dir=elsewhere/sft",
                "data.train=elsewhere/data/questions",
                "data.eval=elsewhere/data/eval",
                "init_from=elsewhere/align/export",
                "train.seed=3",
            ],
        ),
    ],
)
def test_another_folder_and_seed_are_handed_to_the_run(
    demo, local, tmp_path, monkeypatch, capsys, seed, folder, changed
):
    """As the command that is shown and run says; the user's own settings come last."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setenv("SEED", seed)
    monkeypatch.setenv("NPROC", "2")
    commands = []
    monkeypatch.setattr(local, "run_until_stopped", lambda command, *_: commands.append(command) or (1, False))
    assert demo.main(["stage", "sft", folder, "train.max_steps=1"]) == 1
    expected = ["launch/train_sft.py", "launch/configs/demo/sft.yaml", *changed, "train.max_steps=1"]
    assert commands[0][-len(expected) :] == expected
    assert "$ deepspeed --num_gpus 2 " + " ".join(expected) + "\n" in capsys.readouterr().out
