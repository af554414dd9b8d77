"""Evaluate trained models on held-out data, one process:

    python launch/evaluate.py held-out --model sft=runs/sft --model dpo=runs/dpo --data DATA/eval [--json FILE]

A model is a run's folder (its export/ is taken), an HF LLaVA folder or an export in parts; the others are compared to
the first one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command import OK, tell_error  # first: it makes pivot importable

from pivot.system.files import write_atomically
from pivot.system.process import leave
from pivot.system.redact import tell

if TYPE_CHECKING:
    from rich.text import Text

    from pivot.evaluate.evaluator import Evaluation
    from pivot.evaluate.intervals import Interval
    from pivot.evaluate.task import Measure


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    held_out = commands.add_parser("held-out", help="preference accuracy and VQA accuracy on a packed set")
    add = held_out.add_argument
    add("--model", action="append", required=True, metavar="NAME=FOLDER", help="a run or an export; repeatable")
    add("--data", required=True, metavar="SET", help="a folder written by data_tools")
    add("--num-samples", type=int, metavar="N", help="the first N of the set's fixed order (as the run's, else 1000)")
    add("--max-tokens", type=int, metavar="N", help="leave longer samples out (as the run's, else 2048)")
    add("--max-new-tokens", type=int, metavar="N", help="of an answer (as the run's, else 32)")
    add("--cache-dir", type=Path, metavar="DIR", help="token counts (beside the set)")
    add("--json", type=Path, metavar="FILE", help="also write the numbers and the sample answers here")
    options = parser.parse_args(arguments)
    options.models = dict(map(_split, options.model))
    if len(options.models) < len(options.model):
        parser.error("--model: two have the same name; give NAME=FOLDER with a name for each")
    return options


def held_out(options: argparse.Namespace) -> dict[str, Any]:
    """Evaluate every model of `options`, print the tables, and give what --json writes."""
    from pivot.evaluate.load import find_export
    from pivot.system import distributed

    exports = {name: find_export(folder) for name, folder in options.models.items()}
    config = next((run for _, run in exports.values() if run is not None), None)
    world = distributed.start(600.0)
    try:
        evaluations = {name: _evaluate(export, options, config, world) for name, (export, _) in exports.items()}
    finally:
        distributed.stop()
    differences = _differences(evaluations)
    _print(evaluations, differences)
    return {
        "data": options.data,
        "models": {
            name: {
                "folder": str(exports[name][0]),
                "metrics": evaluation.metrics,
                "intervals": evaluation.intervals,
                "skipped": evaluation.skipped,
                "answers": [vars(answer) for answer in evaluation.answers],
            }
            for name, evaluation in evaluations.items()
        },
        "differences": differences,
    }


def _split(text: str) -> tuple[str, str]:
    name, separator, folder = text.partition("=")
    if not separator:
        name, folder = Path(text).name, text
    return name, folder


def _evaluate(export: Path, options: argparse.Namespace, run: Any, world: Any) -> Evaluation:
    from pivot.config import DataConfig, EvaluateConfig, TrainConfig
    from pivot.evaluate.evaluator import evaluate
    from pivot.evaluate.held_out import open_held_out
    from pivot.evaluate.load import load_export
    from pivot.models.language import check_positions

    data = run.data if run is not None else DataConfig()
    settings = run.evaluate if run is not None else EvaluateConfig()
    budget = (run.train if run is not None else TrainConfig()).max_tokens_per_micro_batch
    max_tokens = options.max_tokens or data.max_tokens
    max_new_tokens = options.max_new_tokens or settings.max_new_tokens
    loaded = load_export(export, world.device)
    warning = check_positions(loaded.model.language_model.config, max_tokens + max_new_tokens)
    for line in (*loaded.processor.notes, *([f"positions  {warning}"] if warning else ())):
        tell(line)
    data_set = open_held_out(
        options.data,
        loaded.processor,
        world,
        roles=("chosen",),
        cache_dir=options.cache_dir or _cache_dir(options.data),
        num_samples=options.num_samples or settings.num_samples,
        max_tokens=max_tokens,
        max_tokens_per_micro_batch=budget,
        say=tell,
    )
    return evaluate(
        data_set,
        loaded.processor,
        loaded.model,
        loaded.model,
        world,
        max_new_tokens=max_new_tokens,
        max_tokens=budget,
    )


def _cache_dir(data: str) -> Path:
    return Path(data) if os.access(data, os.W_OK) else Path.home() / ".cache" / "pivot"


def _differences(evaluations: dict[str, Evaluation]) -> dict[str, dict[str, Interval]]:
    """metric -> model -> its paired difference from the first model."""
    from pivot.evaluate.outcomes import compare
    from pivot.evaluate.tasks import compared_measures

    (_, first), *others = evaluations.items()
    differences: dict[str, dict[str, Interval]] = {}
    for measure in compared_measures():
        for name, evaluation in others:
            interval = compare(first.outcomes, evaluation.outcomes, measure.key)
            if interval is not None:
                differences.setdefault(measure.key, {})[name] = interval
    return differences


def _print(evaluations: dict[str, Evaluation], differences: dict[str, dict[str, Interval]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from pivot.evaluate.tasks import measures_of_tasks_in

    console, first = Console(), next(iter(evaluations))
    measured = {key for evaluation in evaluations.values() for key in (*evaluation.metrics, *evaluation.skipped)}
    measures = measures_of_tasks_in(measured)
    table = Table(title="held out, with 95 % intervals", title_justify="left")
    table.add_column("model")
    for measure in measures:
        table.add_column(measure.column, justify="right", no_wrap=True)
    for name, evaluation in evaluations.items():
        table.add_row(name, *(_cell(evaluation, measure) for measure in measures))
        if name != first:
            changes = [_change(measure, differences.get(measure.key, {}).get(name)) for measure in measures]
            table.add_row(f"  less {first}", *changes, style="dim")
    console.print(table)
    some = evaluations[first]
    num_samples, num_questions = (some.metrics.get(f"eval/num_{name}", 0) for name in ("samples", "questions"))
    counts = f"{num_samples:.0f} samples, {num_questions:.0f} questions"
    reasons = "".join(f"; no {metric}: {reason}" for metric, reason in some.skipped.items())
    tell(counts + reasons)


def _cell(evaluation: Evaluation, measure: Measure) -> Text:
    """The number of a model, with its interval where it is a share."""
    from rich.text import Text

    from pivot.evaluate.intervals import share_text

    value, interval = evaluation.metrics.get(measure.key), evaluation.intervals.get(measure.key)
    if interval is not None:
        return Text(share_text(interval))
    return Text("-" if value is None else f"{value:.3f}")


def _change(measure: Measure, change: Interval | None) -> Text:
    """What a model changed; empty for what is never compared."""
    from rich.text import Text

    from pivot.evaluate.intervals import change_text

    if change is not None:
        return Text(change_text(change))
    return Text("-" if measure.is_share else "")


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    try:
        numbers = held_out(options)
        if options.json is not None:
            write_atomically(options.json, json.dumps(numbers, indent=2, ensure_ascii=False) + "\n")
        return OK
    except Exception as error:
        return tell_error(error)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
