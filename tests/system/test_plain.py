"""Control characters from data, files and servers are written out before a terminal sees them."""

import io
import json

import pytest

from data_tools.__main__ import main
from data_tools.console import Output, Progress
from launch.command import tell_error
from pivot.config import ConfigError
from pivot.system.plain import plain
from pivot.system.redact import tell

EVIL = "a\x1b[2J\x1b]0;title\x07b\rc\x9b31m\u202ed\x00\x7f\ud800"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Gr\u00fc\u00dfe \u4f60\u597d \U0001f600\n\ttab", "Gr\u00fc\u00dfe \u4f60\u597d \U0001f600\n\ttab"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("over\rwritten\x08", "over\\rwritten\\x08"),
        ("\x9b2J \u202etxt.exe", "\\x9b2J \\u202etxt.exe"),
        ("\ud800", "\\ud800"),
    ],
)
def test_controls_are_written_out(text, expected):
    assert plain(text) == expected


def safe(text):
    text.encode()
    return "title" in text and not set(text) & set("\x1b\x07\r\x9b\u202e\x00\x7f")


def test_nothing_raw_reaches_the_terminal(capsys):
    output = Output(loudness=2)
    for say in (output.say, output.detail, output.error):
        say(EVIL)
    output.table(["key"], [[EVIL]])
    tell(EVIL)
    told = capsys.readouterr()
    assert safe(told.out) and safe(told.err)
    assert told.out.count("title") == 3 and told.err.count("title") == 2


@pytest.mark.parametrize("kind", [ConfigError, RuntimeError])
def test_errors_are_written_out(kind, capsys):
    """One sentence or a traceback."""
    with pytest.raises(kind) as caught:
        raise kind(EVIL)
    tell_error(caught.value)
    assert safe(capsys.readouterr().err)


def test_remarks_of_a_progress_line_are_written_out(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr("sys.stderr", written)
    times = iter([0.0, 20.0])
    Progress("rows", clock=lambda: next(times))(1, 2, EVIL)
    assert safe(written.getvalue())


def test_json_stays_json_and_keeps_what_it_says(capsys):
    document = {"id": EVIL, "words": "Gr\u00fc\u00dfe"}
    Output(as_json=True).result(document)
    told = capsys.readouterr().out
    assert safe(told) and "Gr\u00fc\u00dfe" in told and json.loads(told) == document


def test_a_wrong_command_line_is_written_out(capsys):
    with pytest.raises(SystemExit):
        main(["pack", "x", f"--{EVIL}"])
    assert safe(capsys.readouterr().err)
