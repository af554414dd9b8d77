from __future__ import annotations

import argparse
import sys
from pathlib import Path

from data_tools.console import Output
from data_tools.demo.build import DemoOptions, write_demo
from data_tools.demo.scenes import PRESETS


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, required=True, help="folder to write")
    command.add_argument("--num-train", type=int, default=10_000, help="training scenes (%(default)s)")
    command.add_argument(
        "--num-preference", type=int, default=4500, help="the first so many of them get preference pairs (%(default)s)"
    )
    command.add_argument("--num-eval", type=int, default=400, help="held-out scenes, four questions each (%(default)s)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--preset", choices=PRESETS, default=PRESETS[0], help="rich: overlaps, textures, digits")


def run(options: argparse.Namespace, output: Output) -> int:
    if min(options.num_train, options.num_eval, options.num_preference) < 1:
        raise ValueError("--num-train, --num-eval and --num-preference: expected at least one scene each")
    wanted = DemoOptions(
        out=options.out,
        num_train=options.num_train,
        num_eval=options.num_eval,
        num_preference=min(options.num_preference, options.num_train),
        seed=options.seed,
        preset=options.preset,
        workers=options.workers,
    )
    if options.dry_run:
        output.say(f"would draw {options.num_train} training and {options.num_eval} held-out scenes to {options.out}")
        output.result({"out": str(options.out), **wanted.identity()})
        return 0
    counts = write_demo(wanted, lambda text: print(text, file=sys.stderr, flush=True) if output.loudness else None)
    output.say(f"{options.out}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    output.result({"out": str(options.out), "samples": counts})
    return 0
