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
    found = validate(options.folder, fast=options.fast, workers=options.workers, progress=line)
    line.close()
    shown = len(found.problems) if output.loudness > 1 else SHOWN_PROBLEMS
    for problem in found.problems[:shown]:
        output.error(problem)
    if len(found.problems) > shown:
        output.error(f"and {len(found.problems) - shown} more; -v lists them all")
    what = "indexed" if options.fast else "read"
    counts = f"{count_text(found.num_samples, 'sample')} {what}, {count_text(len(found.problems), 'problem')}"
    output.say(f"{options.folder}: {counts}")
    output.result({"samples": found.num_samples, "images": found.num_images, "problems": found.problems})
    return 1 if found.problems else 0
