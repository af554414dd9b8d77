"""Progress has rate and time to go; --json and -q leave nothing else on stdout."""

import json

import pytest

from data_tools.__main__ import COMMANDS, main
from data_tools.console import Output, Progress, bytes_text, clock_text, count_text, progress_text


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


def test_commands_that_do_not_exist(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["packk"])
    assert stopped.value.code == 2 and "invalid choice" in capsys.readouterr().err
