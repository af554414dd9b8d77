"""The report: whole, self-contained, and text stays text whatever it says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pivot.evaluate.outcomes import SampleAnswer
from pivot.report import write_report
from pivot.report.charts import Chart, Series, format_number, nice_ticks, running_mean
from pivot.report.read import find_previous, read_run
from tests.kit.runs import make_run
from tests.kit.sets import make_set

ROOT = Path(__file__).resolve().parent.parent
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 6 }}\"'&"


def questions(count: int = 16, text: str = "What colour?") -> list[SampleAnswer]:
    return [SampleAnswer(row, f"id{row}", f"{text} {row}", "red", "blue", row % 5 > 0) for row in range(count)]


class Page(HTMLParser):
    """Tags that were opened, and those that were closed in the wrong order."""

    VOID = frozenset({"meta", "img", "link", "br"})
    SELF_CLOSED = frozenset({"line", "polyline"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.mismatched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.mismatched.append(tag)


def test_a_page_that_needs_nothing_else(tmp_path: Path) -> None:
    shards = make_set(tmp_path)
    run = make_run(tmp_path / "dpo", "dpo", questions(), held_out=str(shards.parts[0].folder), skill=(0.5, 0.8))
    path = write_report(run)
    assert path == run / "report.html"
    text = path.read_text()
    page = Page(text)
    assert not page.mismatched and not page.open
    assert {tag for tag, _ in page.tags} >= {"svg", "polyline", "table", "img", "pre"}
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "form"}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        assert not {"href", "srcset", "action"} & attributes.keys()
        assert (attributes.get("src") or "data:image/png;").startswith(("data:image/png;", "data:image/jpeg;"))
    assert not re.search(r"https?://|@import|url\(", text)
    assert "nan" not in " ".join(attributes.get("points") or "" for _, attributes in page.tags)
    for expected in ("Preference accuracy", "Answer accuracy", "Gradient norm", "12 chosen equals rejected"):
        assert expected in text
    assert "2 checkpoints, training waited 3 s; the longest write took 9.5 s" in text
    assert "What colour? 3" in text and "global_batch_size: 64" in text and "torch version" in text


def test_text_stays_text(tmp_path: Path) -> None:
    """In a question, an answer, a generated answer, a path of the settings, a metric's name and the folder's name."""
    folder = tmp_path / "<b>run"
    asked = [SampleAnswer(0, EVIL, f"Q {EVIL}", f"A {EVIL}", f"G {EVIL}", False)]
    make_run(folder, "sft", asked, held_out="sets/<script>alert(3)</script>", skill=(0.2, 0.3))
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps({"step": 121, "loss": 0.5, "loss/<script>": 0.5, "lr/projector": 1e-5}) + "\n")
    text = write_report(folder).read_text()
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "b!", "img"}
    assert not page.mismatched
    assert "Q &lt;script&gt;alert(1)&lt;/script&gt;&lt;img" in text
    for prefix in "QAG":
        assert f"{prefix} &lt;script&gt;" in text
    assert "{{ 7 * 6 }}" in text
    assert "default-src 'none'" in text


def test_the_chain_is_found_through_init_from(tmp_path: Path) -> None:
    asked = questions()
    align = make_run(tmp_path / "align", "sft", asked, held_out="set", skill=(0.0, 0.1))
    sft = make_run(tmp_path / "sft", "sft", asked, held_out="set", skill=(0.1, 0.7), init_from=align)
    dpo = make_run(tmp_path / "dpo", "dpo", asked, held_out="set", skill=(0.7, 0.8), init_from=sft)
    assert [run.name for run in find_previous(read_run(dpo))] == ["align", "sft"]
    text = write_report(dpo).read_text()
    header = re.search(r"<thead><tr>(.*?)</tr>", text, re.DOTALL)
    assert header is not None
    labels = re.findall(r'<th scope="col">(.*?)</th>', header[1])
    assert labels == ["", "untrained", "after align", "after sft", "after dpo", "change"]
    alone = write_report(dpo, previous=[]).read_text()
    assert "before dpo" in alone and "after sft" not in alone


def test_runs_scored_on_other_sets_are_not_compared(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", "sft", questions(), held_out="other", skill=(0.0, 0.1))
    second = make_run(tmp_path / "second", "sft", questions(), held_out="set", skill=(0.1, 0.7), init_from=first)
    text = write_report(second).read_text()
    assert "after first" not in text and "before second" in text


def test_a_run_without_evaluation_or_steps_has_a_report_too(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "sft", [], held_out="set", skill=(0, 0))
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    kept = [row for row in rows if row.get("event") != "eval"]
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept) + '{"step": 12, "lo')
    assert "On data it never saw" not in write_report(run).read_text()
    (run / "log.jsonl").write_text("")
    (run / "status").unlink()
    assert "unknown" in write_report(run).read_text()


def test_a_run_that_is_not_over_shows_its_last_sign_of_life(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "sft", [], held_out="set", skill=(0, 0))
    assert "sign of life" not in write_report(run).read_text()
    then = (datetime.now(UTC) - timedelta(hours=3)).isoformat(timespec="seconds")
    status = {"status": "running", "host": "node7", "pid": 12, "job": "34", "time": then}
    (run / "status").write_text(json.dumps(status))
    expected = "its last sign of life was 3 h ago (process 12 on node7, job 34)"
    assert expected in write_report(run).read_text()
    (run / "status").write_text(json.dumps({"status": "running", "time": "x"}))
    assert "sign of life" not in write_report(run).read_text()


def test_repeated_rows_count_once_and_null_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "sft", [], held_out="set", skill=(0, 0), steps=3)
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": 9.0}\n{"step": 3, "loss": null}\n')
    xs, ys = read_run(run).series("loss")
    assert xs == [1, 2] and ys[1] == 9.0


FOREIGN = ["[1, 2]", '"x"', "3", "null", "[" * 5000, '{"a":' * 3000, "\x00\x01", '{"step": NaN, "loss": 1}']
FOREIGN += ['{"step": "x", "loss": 1}', '{"step": 3, "loss": "y"}', '{"step": true}', '{"step": [1]}', '{"step": 1.5}']
FOREIGN += ['{"step": 3, "loss": 1e999}', f'{{"step": 3, "loss": {"9" * 400}}}', f'{{"step": {"9" * 5000}}}']
FOREIGN += ['{"step": -1}', '{"step": 3, "perf/pairs_per_s": {}}', '{"event": ["x"]}', '{"event": "stop", "step": 1}']
FOREIGN += ['{"event": "eval", "step": "a"}', '{"event": "eval", "step": 1, "intervals": {"a": [1, 2]}}']
FOREIGN += ['{"event": "start", "num_parameters": [1]}', '{"event": "start", "exclusions": {"a": "b"}}']
FOREIGN += ['{"event": "save", "step": 1}', '{"event": "save", "step": 1, "wait_s": "a", "write_s": 1}']
FOREIGN += ['{"event": "end", "flops": 1}', '{"event": "end", "pairs": 1, "tokens": 1, "flops": 1, "compare": [1]}']
FOREIGN += ['{"event": "spike", "step": 9, "loss": "x"}', '{"event": "skipped", "step": 9, "reason": "<b>"}']
FOREIGN += ['{"step": 120, "row": {}}', '{"step": 120, "question": 1, "answer": "", "generated": "", "right": 1}']


def test_lines_of_others_are_passed_over_and_counted(tmp_path: Path) -> None:
    """As the last lines, where a newest row would be looked for, and by bytes: none is text for sure."""
    run = make_run(tmp_path / "run", "dpo", questions(), held_out="set", skill=(0.5, 0.8))
    before = write_report(run).read_text()
    assert "lines passed over" not in before
    for name in ("log.jsonl", "samples.jsonl"):
        with (run / name).open("ab") as file:
            file.write("".join(f"{line}\n" for line in FOREIGN).encode() + b"\xff\xfe\n\n")
    after = write_report(run).read_text()
    count = len(FOREIGN) + 1
    fact = f"<div><dt>lines passed over</dt><dd>{count} of log.jsonl, {count} of samples.jsonl: "
    fact += "not what a run writes, or cut short</dd></div>"
    assert fact in after
    assert after.replace(fact, "") == before


def test_steps_that_went_wrong_are_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "dpo", [], held_out="set", skill=(0, 0))
    before = write_report(run).read_text()
    assert "<dt>spikes of the loss</dt><dd>none</dd>" in before and "spikes at" not in before
    events = [{"event": "spike", "step": step, "loss": 5.2, "median": 0.7, "limit": 1.9} for step in range(1, 11)]
    events.append({"event": "skipped", "step": 31, "reason": "loss", "ranks": [1], "hosts": ["a"], "num_samples": 3})
    with (run / "log.jsonl").open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)
    page = write_report(run).read_text()
    assert "spikes at step 1, 2, 3, 4, 5, 6, 7, 8 and 2 more; not finite at step 31" in page
    assert "<dt>steps that were not finite</dt><dd>step 31</dd>" in page and "lines passed over" not in page


def test_a_damaged_status_or_outcome_file_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "dpo", questions(), held_out="set", skill=(0.5, 0.8))
    (run / "status").write_text("[1]")
    for path in (run / "held_out").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    text = write_report(run).read_text()
    assert ">unknown<" in text and "Preference accuracy" in text


def test_a_line_separator_inside_a_text_splits_no_row(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "sft", questions(4, "one\u2028two\x85three"), held_out="set", skill=(0.1, 0.2))
    assert len(read_run(run).answers) == 4 * 4 and not any(read_run(run).passed_over.values())


def test_no_run_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no config.yaml, so it is no run"):
        write_report(tmp_path)


def test_the_command_writes_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "sft", questions(4), held_out="set", skill=(0.1, 0.2))
    command = [sys.executable, "launch/report.py", str(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_file()


# -- charts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, expected",
    [(0, "0"), (0.12345, "0.123"), (12.34, "12.3"), (100.0, "100"), (11858.0, "11,858"), (1.2e-6, "1.2e-06")],
)
def test_format_number(value: float, expected: str) -> None:
    assert format_number(value) == expected


@pytest.mark.parametrize("low, high", [(0, 1), (-3.7, 12), (0.071, 0.0713), (5, 5), (0, 0), (1e-9, 3e-9), (10, 4e6)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert len(ticks) <= 6
    assert all(low - 1e-9 * abs(low) <= tick <= high + 1e-9 * abs(high) for tick in ticks)
    assert low == high or len(ticks) >= 2


def test_running_mean_has_no_bias_at_the_start() -> None:
    assert running_mean([3.0] * 50) == pytest.approx([3.0] * 50)
    assert running_mean([]) == []


@pytest.mark.parametrize("ys", [[1.0], [0.0, 0.0], [2.0, 2.0, 2.0], [1e-9, 1.0], [-1.0, 1e6]])
@pytest.mark.parametrize("log", [False, True])
def test_any_values_give_a_figure(ys: list[float], log: bool) -> None:
    svg = Chart("t", [Series("s", 1, list(range(len(ys))), ys, smooth=True)], log=log).svg()
    assert "nan" not in svg and "inf" not in svg


def test_the_cost_is_told_beside_what_the_user_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "dpo", "dpo", questions(), held_out="sets/eval", skill=(0.3, 0.9))
    page = write_report(run).read_text()
    assert "3.25 GPU-hours, 7,680 pairs, 8.2 M tokens, 4.1e+17 useful FLOP" in page
    assert "beside SigLIP pre-training: 1/2,000 of its FLOPs, 25 % of its samples" in page
    log = (run / "log.jsonl").read_text().splitlines()
    (run / "log.jsonl").write_text("\n".join(line for line in log if '"end"' not in line) + "\n")
    assert "<dt>spent</dt><dd>-</dd>" in write_report(run).read_text()


def test_a_foreign_runs_settings_are_shown_as_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who draws the report of another's run does not put its own environment on the page."""
    monkeypatch.setenv("PIVOT_SECRET", "hunter2")
    run = make_run(tmp_path / "dpo", "dpo", questions(), held_out="none", skill=(0.5, 0.8))
    settings = run / "config.yaml"
    settings.write_text(settings.read_text().replace("train: sets/train", "train: 'x/${oc.env:PIVOT_SECRET}'"))
    text = write_report(run).read_text()
    assert "hunter2" not in text and text.count("${oc.env:PIVOT_SECRET}") >= 2
