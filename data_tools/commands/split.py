from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from data_tools.arguments import seed
from data_tools.console import Output, count_text
from data_tools.copying import Choice, check_copy, copy_samples
from data_tools.split import choose_eval
from pivot.data.shards import ShardSet


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="DIR", help="a packed set")
    command.add_argument("--eval", type=float, default=0.02, help="largest share for evaluation (%(default)s)")
    command.add_argument("--seed", type=seed, default=0, help="which groups of images are set apart (%(default)s)")
    command.add_argument("--out", type=Path, required=True, help="folder to write: OUT/train and OUT/eval")


def run(options: argparse.Namespace, output: Output) -> int:
    shards = ShardSet.open(options.folder)
    held_out = choose_eval(shards, options.eval, options.seed)
    choices = {}
    for side, rows in (("eval", np.flatnonzero(held_out)), ("train", np.flatnonzero(~held_out))):
        made_by = {"command": "split", "side": side, "eval": options.eval, "seed": options.seed}
        choices[side] = Choice((options.folder,), rows, f"{shards.name[:67]}-{side}", made_by)
        check_copy(choices[side], options.out / side)  # both before either is written
    if not options.dry_run:
        for side, choice in choices.items():
            line = output.progress(f"{side} samples")
            copy_samples(choice, options.out / side, workers=options.workers, progress=line)
            line.close()
    counts = {side: len(choice.rows) for side, choice in choices.items()}
    text = f"{count_text(counts['train'], 'sample')} for training, {counts['eval']} for evaluation; no image is in both"
    output.say(f"would write {text}" if options.dry_run else f"{options.out}/train and {options.out}/eval: {text}")
    output.result({"out": str(options.out), **counts})
    return 0
