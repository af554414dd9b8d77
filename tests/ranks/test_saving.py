"""Laws of saving in the background: the same bytes, committed when all ranks have written, and never half of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from safetensors.torch import load_file

from pivot.config import REPOSITORY
from pivot.run.checkpoint import _describe
from pivot.system.process import free_port
from tests.kit.commands import rank_free_environment
from tests.kit.ranks import rank_environment, run_ranks
from tests.kit.ranks.scenarios_saving import CASES
from tests.kit.ranks.scenarios_train import RUN
from tests.kit.sets import make_set
from tests.kit.tiny import tiny_llava

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # the first test waits for all ranks of the file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saving")
    tiny_llava(folder / "llava")
    make_set(folder)
    run_ranks("tests.kit.ranks.scenarios_saving:everything", 2, folder)
    return folder


def seen(folder: Path, scenario: str) -> list[list[dict[str, Any]]]:
    """Of each start, what the ranks saw."""
    ranks = [json.loads((folder / f"runs-{rank}.json").read_text())[scenario] for rank in (0, 1)]
    return [list(start) for start in zip(*ranks, strict=True)]


def said(folder: Path, scenario: str, rank: int = 0) -> str:
    text = (folder / f"everything-rank{rank}.log").read_text()
    return text.partition(f"--- {scenario}\n")[2].partition("--- ")[0]


def rows(folder: Path, name: str, event: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]
    return [row for row in found if row.get("event") == event]


def steps(*numbers: int) -> list[str]:
    return [f"step-{number:08d}" for number in numbers]


@pytest.mark.parametrize(("stage", "bf16"), CASES)
def test_the_files_are_to_the_byte_those_of_a_save_that_training_waits_for(
    folder: Path, stage: int, bf16: bool
) -> None:
    """Two steps changed every trained weight before the first byte was written."""
    for rank in (0, 1):
        case = json.loads((folder / f"equality-{rank}.json").read_text())[f"{stage}-{bf16}"]
        assert (case["different"], case["early"]) == ([], False)
        assert case["trained"] or rank == 1  # rank 0 alone gathers the weights
        assert case["seconds"] > 0


@pytest.mark.parametrize("name", ["slow", "failed", "raised", "signalled", "evaluated", "kept"])
def test_the_weights_at_the_end_are_those_of_saves_that_training_waits_for(folder: Path, name: str) -> None:
    expected, found = (load_file(folder / run / "export/model.safetensors") for run in ("unbroken", name))
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", ["slow", "raised", "evaluated", "full-memory", "kept"])
def test_each_checkpoint_is_whole_and_that_of_the_run_that_waited(folder: Path, name: str) -> None:
    """As its manifest says, and with the same tensors. Names aside: DeepSpeed numbers the parameters of a process."""
    for step in steps(2, 4, 5):
        found, expected = (folder / run / "checkpoints" / step for run in (name, "unbroken"))
        told = json.loads((found / "manifest.json").read_text())["files"]
        assert sorted(told) == sorted(path.name for path in expected.iterdir() if path.name != "manifest.json")
        for file, facts in told.items():
            assert _describe(found / file) == facts
            if "_states.pt" in file:
                assert tensors(found / file) == tensors(expected / file)


def tensors(path: Path) -> dict[str, bytes]:
    with ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist() if "/data/" in name}


def test_a_rank_that_is_slow_holds_the_commit_up_and_the_next_save(folder: Path) -> None:
    """Steps 3 and 4 are made meanwhile. Rank 0 has written by then, and publishes nothing."""
    (ranks,) = seen(folder, "slow_on_one_rank")
    for rank in ranks:
        assert rank["code"] == 0
        assert rank["steps"] == [[1, []], [2, []], [3, []], [4, []], *rank["steps"][4:]]
        assert rank["steps"][4][1][:1] == steps(2)
        assert rank["published"] == steps(2, 4, 5) and rank["half-written"] == []
        assert rank["most_writing"] == 1, "two saves at a time"
    saves = rows(folder, "slow", "save")
    assert [(row["step"], row["copied"]) for row in saves] == [(2, True), (4, True), (5, False)]
    assert saves[0]["write_s"] > 0 and saves[0]["wait_s"] < 10
    (end,) = rows(folder, "slow", "end")
    assert end["save_s"] == pytest.approx(sum(row["wait_s"] for row in saves))
    assert "s of waiting for checkpoints" in said(folder, "slow_on_one_rank")


def test_a_rank_that_cannot_write_ends_the_run_and_leaves_the_older_checkpoint(folder: Path) -> None:
    first, again = seen(folder, "fails_on_one_rank")
    for rank in first:
        assert rank["code"] == 1 and rank["published"] == steps(2)
        assert rank["status"]["status"] == "failed"
        assert rank["status"]["reason"].startswith("OSError: [Errno 28] No space left on device")
        assert rank["threads"] == []
    words = said(folder, "fails_on_one_rank", 1) or (folder / "everything-rank1.log").read_text()
    assert f"error: rank 1 could not write {folder}/failed/checkpoints/step-00000004.tmp (" in words
    assert "No space left on device; free some, the same command goes on" in words
    assert all(rank["code"] == 0 and rank["steps"][0][0] == 3 for rank in again)


def test_a_signal_meanwhile_loses_nothing(folder: Path) -> None:
    first, again = seen(folder, "signalled")
    for rank in first:
        assert rank["code"] == 75 and rank["published"] == steps(2, 3) and rank["half-written"] == []
        assert rank["status"]["status"] == "preempted" and rank["status"]["step"] == 3
    assert all(rank["code"] == 0 and rank["steps"][0][0] == 4 for rank in again)


def test_an_error_of_training_leaves_nobody_at_work(folder: Path) -> None:
    first, again = seen(folder, "fails_elsewhere")
    for rank in first:
        assert rank["code"] == 1 and rank["status"]["reason"] == "RuntimeError: an error of training"
        assert (rank["published"], rank["half-written"], rank["threads"]) == ([], ["step-00000002.tmp"], [])
    assert all(rank["code"] == 0 and rank["published"] == steps(2, 4, 5) for rank in again)
    assert "damaged" not in said(folder, "fails_elsewhere")


def test_an_evaluation_begins_when_all_is_saved(folder: Path) -> None:
    log = [json.loads(line) for line in (folder / "evaluated/log.jsonl").read_text().splitlines()]
    order = [(row["event"], row["step"]) for row in log if row.get("event") in ("save", "eval")]
    assert order == [("eval", 0), ("save", 2), ("eval", 3), ("save", 4), ("save", 5), ("eval", 5)]


def test_what_people_ask_for_is_there_when_they_are_told(folder: Path) -> None:
    (ranks,) = seen(folder, "asked_for")
    assert all(rank["steps"][:2] == [[1, []], [2, steps(1)]] for rank in ranks)
    words = said(folder, "asked_for")
    assert words.index(f"saved      {folder}/asked/checkpoints/step-00000001") < words.index("asked, which is removed")


def test_without_memory_for_copies_training_waits(folder: Path) -> None:
    (ranks,) = seen(folder, "without_room")
    assert all(rank["steps"][2] == [3, steps(2)] for rank in ranks)
    assert [row["copied"] for row in rows(folder, "full-memory", "save")] == [False] * 3
    words = said(folder, "without_room")
    assert "memory     copies of step 2's checkpoint take 0.00 GiB of a machine that has 0.00 GiB free; it is" in words


def test_every_n_th_is_kept_for_ever(folder: Path) -> None:
    (ranks,) = seen(folder, "kept_for_ever")
    assert all(rank["published"] == steps(2, 4, 5) for rank in ranks)
    assert ranks[0]["asked"][0] == 4  # steps 2, 3, 4 and the one being written


def test_one_process_exports_it(folder: Path, tmp_path: Path) -> None:
    """To the byte what the run's two ranks exported."""
    command = [sys.executable, "launch/export.py", str(folder / "slow"), "--out", str(tmp_path / "out")]
    environment = rank_free_environment() | {"HF_HUB_OFFLINE": "1"}  # as the ranks have it, and transformers notes it
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    own = {path.name: path.read_bytes() for path in (folder / "slow/export").iterdir() if path.is_file()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()} == own


# -- kills ---------------------------------------------------------------------------------------------------------


def start(folder: Path, *, held_up: str, kill: str, ranks: tuple[int, ...]) -> list[int]:
    """A start of the run `killed`; its thread never writes the checkpoint of the step `held_up`. The exit codes."""
    config = folder / "killed.yaml"
    config.write_text(RUN.format(folder=folder, name="killed"))
    command = [sys.executable, "-m", "tests.kit.ranks.held_up", str(config), "checkpoint.asynchronous=true"]
    port, processes = free_port(), []
    for rank in (0, 1):
        fault = {"PIVOT_FAULT": f"rank={rank},step={kill},kind=sigkill"} if rank in ranks else {}
        environment = rank_environment(rank, 2, port) | {"HELD_UP": held_up} | fault
        with (folder / f"killed-{rank}.out").open("a") as output:
            processes.append(
                subprocess.Popen(
                    command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output, start_new_session=True
                )
            )
    try:
        return [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_kill_between_copy_and_commit_costs_that_checkpoint_alone(folder: Path) -> None:
    """Rank 1, then both, while the checkpoint of step 4 is being written: each time that of step 2 goes on."""
    os.environ.pop("PIVOT_FAULT", None)
    checkpoints = folder / "killed/checkpoints"
    for ranks, codes in (((1,), [1, -signal.SIGKILL]), ((0, 1), [-signal.SIGKILL] * 2)):
        assert start(folder, held_up="4", kill="5", ranks=ranks) == codes
        assert sorted(path.name for path in checkpoints.glob("step-*")) == [*steps(2), "step-00000004.tmp"]
        assert (checkpoints / "latest").read_text() == "step-00000002\n"
    assert start(folder, held_up="0", kill="0", ranks=()) == [0, 0]
    assert (folder / "killed-0.out").read_text().count(f"resumed from {checkpoints / 'step-00000002'}") == 2
    expected, found = (load_file(folder / run / "export/model.safetensors") for run in ("unbroken", "killed"))
    assert all(torch.equal(found[key], value) for key, value in expected.items())
