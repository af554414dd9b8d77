"""What `make sft` and `make dpo` do without CONFIG, step by step; the Makefile says which step needs which.

    python launch/demo.py start GOAL FOLDER            what is going to happen, and how long it takes (needs no package)
    python launch/demo.py stage NAME FOLDER [key=value ...]   run a stage, or go on with it
    python launch/demo.py table GOAL FOLDER            what came out

GOAL is sft or dpo, NAME is align, sft or dpo. SEED and NPROC are read from the environment.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from local import run_here, shown_command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pivot.evaluate.task import Measure

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_FOLDER = "runs/demo"  # what the YAMLs say
OUR_PYTHON = ".venv/bin/python"  # as the Makefile names it
CPU_PROCESSES = 2
INTERRUPTED = 130
TO_MEND, AGAIN = 2, 75  # of the training scripts: for the user to mend; saved on a signal
# name -> (script, what it does, minutes on two cores as measured)
STAGES = {
    "align": ("train_sft.py", "learn to describe scenes: captions, all weights drawn at random", 4.5),
    "sft": ("train_sft.py", "learn to answer questions", 3.0),
    "dpo": ("train_dpo.py", "learn from right and wrong answers: DPO with ZeRO-3", 3.0),
}
CHAINS = {"sft": ("align", "sft"), "dpo": ("align", "sft", "dpo")}
PICTURE = "data/scenes.png"


# -- what is going to happen ---------------------------------------------------------------------------------------


def start(goal: str, folder: Path) -> int:
    """One screen. Steps that are done are said to be."""
    if is_done(folder, goal):
        return 0
    own_environment = os.environ.get("PYTHON", OUR_PYTHON) != OUR_PYTHON
    installed = own_environment or (ROOT / ".venv" / ".installed").is_file()
    drawn = (folder / "data" / "demo.json").is_file()
    steps = [
        ("install", "torch, deepspeed, transformers and the rest into .venv (about 6 GB)", 2.5, installed),
        ("data", "draw scenes with captions, questions, right and wrong answers", 0.5, drawn),
        *((name, STAGES[name][1], STAGES[name][2], is_done(folder, name)) for name in CHAINS[goal]),
    ]
    print(f"pivot demo: a multimodal LLM of 1.4 million parameters, trained from nothing; all files below {folder}/\n")
    for name, text, minutes, done in steps:
        print(f"  {name:<8}{text:<72}{'done' if done else f'{minutes:.1f} min'}")
    left = sum(minutes for *_, minutes, done in steps if not done)
    print(f"\nAbout {left:.0f} minutes on two cores. Ctrl-C stops, the same command goes on.")
    print(f"The first thing to look at: {folder / PICTURE}\n", flush=True)
    return 0


# -- a stage -------------------------------------------------------------------------------------------------------


def stage(name: str, folder: Path, overrides: list[str]) -> int:
    """Run the stage under the deepspeed launcher; the exit code is 0 only when it came to its end."""
    script, text, minutes = STAGES[name]
    print(f"\n== {name}: {text} (about {minutes:g} min)", flush=True)
    words = [f"launch/configs/demo/{name}.yaml", *_settings(name, folder), *overrides]
    print(f"$ {shown_command(script, words)}", flush=True)
    started = time.monotonic()
    code, stopped = run_here(script, words)
    with (folder / "times.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"stage": name, "seconds": round(time.monotonic() - started, 1)}) + "\n")
    state = _read_status(folder / name)
    if code == 0 and state == "done":
        (folder / f"{name}.done").touch()
        return 0
    if stopped or code == AGAIN or (code == 0 and state == "preempted"):
        print(f"\n{name} was stopped; the same command goes on where it was", file=sys.stderr)
        return INTERRUPTED
    again = "mend it, or begin anew with DEMO=FOLDER" if code == TO_MEND else "the same command goes on"
    print(f"\n{name} failed (exit code {code}); the reason is above; {again}", file=sys.stderr)
    return code if code > 0 else 1


def _settings(name: str, folder: Path) -> list[str]:
    """What another folder or seed than the YAMLs' changes."""
    settings = []
    if str(folder) != DEFAULT_FOLDER:
        sets = {"align": "captions", "sft": "questions", "dpo": "preference"}
        settings += [f"output_dir={folder}/{name}", f"data.train={folder}/data/{sets[name]}"]
        settings += [f"data.eval={folder}/data/eval"]
        if name == "align":
            settings += [f"model.vision_tower.path={folder}/data/model/vision.json"]
            settings += [f"model.language_model.path={folder}/data/model/language/config.json"]
        else:
            settings += [f"init_from={folder}/{'align' if name == 'sft' else 'sft'}/export"]
    seed = os.environ.get("SEED", "").strip()
    return settings + ([f"train.seed={seed}"] if seed not in ("", "0") else [])


def _read_status(run: Path) -> str | None:
    """What the run says of itself; None where it says nothing, or where a crash damaged it."""
    from pivot.system.files import read_object  # here, so that the first screen needs nothing installed

    return read_object(run / "status").get("status")


def is_done(folder: Path, name: str) -> bool:
    return (folder / f"{name}.done").is_file()


# -- what came out -------------------------------------------------------------------------------------------------


def table(goal: str, folder: Path) -> int:
    """Accuracies on held-out scenes, untrained and after each stage, and where to go from here."""
    from pivot.evaluate.tasks import compared_measures, titled_measures

    measures = titled_measures()
    rows: list[tuple[str, dict[str, Any], float | None]]
    rows = [("untrained", _evaluation(folder / "align", first=True), None)]
    rows += [(f"after {name}", _evaluation(folder / name), _seconds(folder, name)) for name in CHAINS[goal]]
    last = rows[-1][1]
    print(f"\nHeld out: {last.get('eval/num_questions', 0):.0f} questions about scenes that were in no training set")
    print(f"{'':<18}" + "".join(f"{column:>24}" for column in [*(measure.column for measure in measures), "seconds"]))
    if any(f"{measure.key}_blind" in last for measure in measures):
        print(_line("without looking", [_blind(last, measure) for measure in measures]))
    for name, evaluation, seconds in rows:
        cells = [_cell(evaluation, measure) for measure in measures]
        print(_line(name, [*cells, "" if seconds is None else f"{seconds:.0f}"]))
        if name == "after dpo":
            print(_line("  less sft", _changes(folder, compared_measures())))
    print("\n[..] is the 95 % interval over scenes. Without looking: the best fixed answer to each kind of question.")
    if goal == "dpo":
        print("Less sft: what DPO changed, question by question; beyond noise where the interval leaves out 0.")
    _say_next(goal, folder)
    return 0


def _line(name: str, cells: list[str]) -> str:
    return (f"{name:<18}" + "".join(f"{cell:>24}" for cell in cells)).rstrip()


def _cell(evaluation: dict[str, Any], measure: Measure) -> str:
    """The number in an evaluation's row of the log, with its interval where models are compared by it."""
    from pivot.evaluate.intervals import Interval, share_text

    value, interval = evaluation.get(measure.key), evaluation.get("intervals", {}).get(measure.key)
    if interval is not None and not measure.own_reference:
        return share_text(Interval(*interval))
    return "" if value is None else f"{value:.3f}"


def _blind(evaluation: dict[str, Any], measure: Measure) -> str:
    """What can be had without looking at the image, where that is known."""
    blind = None if measure.own_reference else evaluation.get(f"{measure.key}_blind", measure.chance)
    return "" if blind is None else f"{blind:.3f}"


def _changes(folder: Path, measures: Sequence[Measure]) -> list[str]:
    """What DPO changed in each measure after SFT, paired over the held-out samples."""
    from pivot.evaluate.intervals import change_text
    from pivot.evaluate.outcomes import compare, read_outcomes

    runs = folder / "sft", folder / "dpo"
    before, after = (read_outcomes(run, _evaluation(run).get("step", 0)) for run in runs)
    changes = [compare(before, after, measure.key) for measure in measures]
    return ["" if change is None else change_text(change) for change in changes]


def _evaluation(run: Path, *, first: bool = False) -> dict[str, Any]:
    """The log's last evaluation, or its first, {} where there is none."""
    from pivot.system.files import read_json_lines

    rows = [row for _, row in read_json_lines(run / "log.jsonl") if row is not None and row.get("event") == "eval"]
    return rows[0 if first else -1] if rows else {}


def _seconds(folder: Path, name: str) -> float | None:
    """All that a stage took, over its interruptions."""
    from pivot.system.files import read_json_lines

    calls = [row for _, row in read_json_lines(folder / "times.jsonl") if row is not None and row.get("stage") == name]
    return sum(call["seconds"] for call in calls) or None


def _say_next(goal: str, folder: Path) -> None:
    report = folder / goal / "report.html"
    print(f"\npicture  {folder / PICTURE}")
    if report.is_file():
        print(f"report   {report}")
    print(f"model    {folder / goal / 'export'}   (stock transformers loads it)")
    print("next     make dpo" if goal == "sft" else "next     python -m data_tools pack YOUR_DATA --out my_set")


def main(arguments: list[str]) -> int:
    if len(arguments) < 3 or arguments[0] not in ("start", "stage", "table"):
        print(__doc__, file=sys.stderr)
        return 2
    command, name, folder = arguments[0], arguments[1], Path(arguments[2])
    try:
        if command == "stage":
            return stage(name, folder, arguments[3:])
        return {"start": start, "table": table}[command](name, folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"no space is left on the disk of {folder}; free some, the same command goes on", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
