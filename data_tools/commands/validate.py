from __future__ import annotations

import argparse

from data_tools.console import Output, count_text
from data_tools.validate import validate

SHOWN_PROBLEMS = 50


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="DIR", help="a packed set")
    command.add_argument("--fast", action="store_true", help="sizes, index and manifest only; no shard is read")


def run(options: argparse.Namespace, output: Output) -> int:
    line = output.progress("samples")
    validation = validate(options.folder, fast=options.fast, workers=options.workers, progress=line)
    line.close()
    shown = len(validation.problems) if output.loudness > 1 else SHOWN_PROBLEMS
    for problem in validation.problems[:shown]:
        output.error(problem)
    if len(validation.problems) > shown:
        output.error(f"and {len(validation.problems) - shown} more; -v lists them all")
    what = "indexed" if options.fast else "read"
    counts = f"{count_text(validation.num_samples, 'sample')} {what}, {count_text(len(validation.problems), 'problem')}"
    output.say(f"{options.folder}: {counts}")
    output.result({"samples": validation.num_samples, "images": validation.num_images, "problems": validation.problems})
    return 1 if validation.problems else 0
