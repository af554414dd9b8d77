"""Progress has rate and time to go; --json and -q leave nothing else on stdout."""

import json
import os
import signal

import pytest

from data_tools.__main__ import COMMANDS, main
from data_tools.console import Output, Progress, bytes_text, clock_text, count_text, progress_text
from pivot.system.workers import worker_pool


def test_progress_says_rate_and_time_to_go(capsys):
    """600 of 1,000 rows in 20 s, 100 of which were there before: 25 a second, 16 s for the other 400."""
    now = [0.0]
    progress = Progress("rows", clock=lambda: now[0])
    for now[0], done in ((0.0, 101), (5.0, 300), (20.0, 600)):
        progress(done, 1000, "3 dropped")
    assert capsys.readouterr().err == "600 of 1,000 rows, 25 rows/s, 0:16 to go, 3 dropped\n"


def test_texts():
    assert progress_text(5, None, 2.0, "rows") == "5 rows, 2 rows/s"
    assert (clock_text(3725), clock_text(59.6)) == ("1:02:05", "1:00")
    assert [bytes_text(n) for n in (999, 1500, 250_000, 3.2e9)] == ["999 B", "1.5 kB", "250 kB", "3.2 GB"]
    assert (count_text(1, "shard"), count_text(2000, "shard")) == ("1 shard", "2,000 shards")


def test_what_goes_where(capsys):
    for output in (Output(as_json=True), Output(loudness=0)):
        output.say("hello")
        output.table(("a",), [("b",)])
        output.result({"a": 1})
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"a": 1} and shown.err == ""
    Output(loudness=2).detail("more")
    assert capsys.readouterr().err == "more\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_the_shared_flags(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in ("--dry-run", "--json", "--workers", "--quiet", "--verbose"))


WRONG_NUMBERS = {
    "preview": ["--seed=-1", "--n=0", "--columns=x"],
    "sample": [
        "--seed=-1",
        "--seed=18446744073709551616",
        "--num=-5",
        "--images=-1",
        "--max-words=0",
        "--max-tokens=0",
    ],
    "reshard": ["--seed=-1", "--samples-per-shard=0", "--megabytes-per-shard=0"],
    "split": ["--seed=-1", "--seed=1.5"],
    "simulate": ["--seed=-1", "--global-batch-size=-2", "--world-size=0", "--steps=0", "--first-step=-1"],
    "info": ["--top=-1", "--workers=-1"],
    "lengths": ["--limit=0"],
    "twins": ["--steps=0"],
}


@pytest.mark.parametrize(
    "option", [[name, option] for name, options in WRONG_NUMBERS.items() for option in options], ids=str
)
def test_numbers_that_make_no_sense(option, capsys):
    name, value = option[1].split("=")
    with pytest.raises(SystemExit) as stopped:
        main([*option, "x", "y"])
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    assert f"argument {name}: expected a whole number" in shown and f"found '{value}'" in shown
    assert f"python -m data_tools {option[0]} --help lists what there is" in shown


def test_an_option_that_does_not_exist(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["pack", "x", "--out", "y", "--shufle"])
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    assert "unrecognized arguments: --shufle; python -m data_tools pack --help lists what there is" in shown


@pytest.mark.parametrize(
    "command", [["info"], ["validate"], ["preview"], ["split", "--out", "x"], ["simulate"]], ids=str
)
def test_sets_that_lie_elsewhere(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*command, "https://example.org/set"]) == 2
    assert "https://example.org/set is remote" in capsys.readouterr().err and not list(tmp_path.iterdir())


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_the_machines_fault(capsys, monkeypatch):
    def describe(folder, top):
        with worker_pool(1) as workers:
            return workers.submit(die).result()

    monkeypatch.setattr("data_tools.commands.info.describe", describe)
    assert main(["info", "x"]) == 3
    shown = capsys.readouterr().err.lower()
    assert "a worker process died" in shown and "out of memory?" in shown and "error)" not in shown
    assert "run the same command again" in shown and "it goes on" in shown


def test_commands_that_do_not_exist(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["packk"])
    assert stopped.value.code == 2 and "invalid choice" in capsys.readouterr().err
