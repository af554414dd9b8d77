"""What does saving cost? `python benchmarks/saving.py [--stage 2] [--every 5] [--rounds 3] [--folder DISK]`

Three runs of two ranks take turns: without saving, with saves that training waits for, with saves in the background.
Each gives its seconds a step, saving included, between its second and its last save; the difference to the run without
is what saving costs. About 160 MB of state; `--folder` says which disk is written to.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from cases import SHAPES, write_case
from run_pivot import settings

from pivot.run.folder import RunFolder
from pivot.startup.inputs import open_inputs
from pivot.system import distributed
from pivot.system.distributed import World
from pivot.system.process import free_port, leave
from pivot.train import Trainer

RANKS = 2
ARMS = ("without saving", "waiting", "in the background")
SAVES = 5  # the first and the tail of the last are outside of what is timed


class Timed(Trainer):
    """Notes when each step begins."""

    begun: list[float]

    def train_step(self, *arguments: Any) -> dict[str, float]:
        self.begun.append(time.perf_counter())
        return super().train_step(*arguments)


def run_rank(task: dict[str, Any]) -> None:
    output = Path(task["case"]) / task["name"]
    output.mkdir(parents=True, exist_ok=True)
    config = settings(task, output)
    every = task["every"]
    config.checkpoint.every_steps = 0 if task["arm"] == ARMS[0] else every
    config.checkpoint.asynchronous = task["arm"] == ARMS[2]
    config.log.every_steps = 1
    world = distributed.start(config.train.timeout_s)
    inputs = open_inputs(config, world, lambda text: None)
    trainer = Timed(config, RunFolder(output), inputs, world)
    trainer.begun = []
    trainer.run()
    if world.is_main:
        Path(task["out"]).write_text(json.dumps(summary(trainer, output, every, world)))
    distributed.stop()
    leave(0)


def summary(trainer: Timed, output: Path, every: int, world: World) -> dict[str, Any]:
    begun, rows = trainer.begun, [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    saves = [row for row in rows if row.get("event") == "save" and row["step"] % every == 0]
    return {
        "step_s": (begun[SAVES * every] - begun[every]) / ((SAVES - 1) * every),
        "wait_s": [row["wait_s"] for row in saves],
        "write_s": [row["write_s"] for row in saves],
        "state_gib": sum(trainer.engine.checkpoint_bytes()) / 2**30,
    }


def run(case: Path, arm: str, turn: int, options: argparse.Namespace) -> dict[str, Any]:
    shape, name = SHAPES[options.shape], f"{arm.replace(' ', '-')}-{turn}"
    task = {
        "case": str(case),
        "name": name,
        "arm": arm,
        "every": options.every,
        "steps": SAVES * options.every + 1,
        "dtype": "fp32",
        "pairs_per_step": options.pairs,
        "lr": 1e-5,
        "zero": options.stage,
        "workers": 0,
        "image_trees": False,
        "max_tokens_per_micro_batch": 4 * (shape.image_tokens + 2 + shape.prompt[1] + 2 * (shape.completion[1] + 1)),
        "checkpointing": "none",
        "attention": "auto",
        "frozen": [],
        "out": str(case / f"{name}.json"),
    }
    port, processes = free_port(), []
    for rank in range(RANKS):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        environment = os.environ | {key: str(value) for key, value in place.items()}
        command = [sys.executable, __file__, "--rank", json.dumps(task)]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL))
    for process in processes:
        _, words = process.communicate()
        if process.returncode:
            raise RuntimeError(words.decode()[-2000:])
    return json.loads(Path(task["out"]).read_text())


def measure(case: Path, options: argparse.Namespace) -> dict[str, Any]:
    write_case(case, SHAPES[options.shape], num_pairs=64, pairs_per_image=1, dtype=torch.float32)
    rounds: list[dict[str, dict[str, Any]]] = []
    for turn in range(options.rounds):
        rounds.append({arm: run(case, arm, turn, options) for arm in ARMS})
        steps = ", ".join(f"{arm} {found['step_s']:.3f}" for arm, found in rounds[-1].items())
        print(f"round {turn + 1}, seconds a step: {steps}", flush=True)
    shares = {
        arm: statistics.median(found[arm]["step_s"] / found[ARMS[0]]["step_s"] - 1 for found in rounds)
        for arm in ARMS[1:]
    }
    return {"options": vars(options) | {"folder": None, "json": None}, "shares": shares, "rounds": rounds}


def show(found: dict[str, Any], every: int) -> None:
    first = found["rounds"][0][ARMS[0]]
    print(f"\n{first['state_gib'] * 1024:.0f} MiB of state, a save every {every} steps, medians of the rounds")
    for arm, share in found["shares"].items():
        saves = [turn[arm] for turn in found["rounds"]]
        waited, wrote = (statistics.median(s for save in saves for s in save[name]) for name in ("wait_s", "write_s"))
        print(f"{arm:18} {100 * share:6.1f} % of the time of a step; waited {waited:.3f} s a save, wrote {wrote:.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="cpu")
    parser.add_argument("--stage", type=int, default=2, help="ZeRO")
    parser.add_argument("--every", type=int, default=5, help="steps from one save to the next")
    parser.add_argument("--pairs", type=int, default=8, help="a step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="write below this folder; by default where temporary files go")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--rank", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        run_rank(options.rank)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(Path(folder) / "case", options)
    show(found, options.every)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
