"""DPO steps per second and memory, ours beside TRL's: same weights, same pairs, same dtype, the same minutes.

    python benchmarks/dpo_step.py --against trl                          # the CPU shape
    python benchmarks/dpo_step.py --against trl --pairs-per-image 4      # pairs that share images, in image trees
    python benchmarks/dpo_step.py --shape 1.5b --device cuda --dtype bf16 --against trl --json out.json

Both sides read the same LLaVA folder and see the same pairs in the same order, each in a process of its own, from JPEG
files to the updated weights. First every setting of TRL is tried for a few steps, and the fastest is kept; then the two
take turns for some rounds, so that what else the machine does hits both. After that each of our savings is switched off
alone. Losses are compared step by step.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from cases import SHAPES, Shape, write_case
from table import draw, show

HERE = Path(__file__).resolve().parent
LR = 1e-5
WARM_STEPS = 2  # not timed: the first allocations, and the loader's start
SEARCH_STEPS = 3  # timed, per setting that is tried
LOSS_STEPS = 10
MAX_LOSS_DIFFERENCE = 1e-3
SAVINGS = {
    "shared_prompt": "a prompt for each completion",
    "image_once": "and an encoder call for each completion",
    "completions_only": "the head on every position",
    "reference_cache": "the reference model at every step",
    "image_trees": "pairs of one image in trees of their own",
}
PACKAGES = ("torch", "transformers", "deepspeed", "trl", "flash-attn")


class Bench:
    """The runs of one case."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.shape: Shape = SHAPES[options.shape]
        self.pairs = options.pairs_per_step or self.shape.pairs_per_step
        self.steps = WARM_STEPS + max(options.steps, LOSS_STEPS)
        self.ids: list[list[int]] = []
        self._runs = 0

    def write(self) -> None:
        if not (self.folder / "shape.json").is_file():
            dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[self.options.dtype]
            count = self.pairs * self.steps
            write_case(
                self.folder, self.shape, num_pairs=count, pairs_per_image=self.options.pairs_per_image, dtype=dtype
            )

    def pivot(self, *, steps: int | None = None, **changes: Any) -> dict[str, Any]:
        task = {
            "zero": self.options.zero if self.options.zero is not None else (0 if self.options.dtype == "fp32" else 1),
            "workers": 0,
            "image_trees": self.options.pairs_per_image > 1,
            "max_tokens_per_micro_batch": self.options.row_tokens,
            "checkpointing": self.options.checkpointing,
            "attention": self.options.attention,
            "without": [],
            "frozen": [],
        }
        return self._run("run_pivot.py", steps or self.steps, task | changes)

    def trl(self, *, steps: int | None = None, **changes: Any) -> dict[str, Any]:
        task = {"ids": self.ids, "checkpointing": False, "attention": "sdpa", "workers": 0}
        return self._run("run_trl.py", steps or self.steps, task | changes)

    def _run(self, script: str, steps: int, task: dict[str, Any]) -> dict[str, Any]:
        """The worker's result, or {"failed": its last words}."""
        self._runs += 1
        out = self.folder / f"result-{self._runs}.json"
        task |= {
            "case": str(self.folder),
            "out": str(out),
            "name": f"run-{self._runs}",
            "steps": steps,
            "device": self.options.device,
            "dtype": self.options.dtype,
            "threads": self.options.threads,
            "pairs_per_step": self.pairs,
            "lr": LR,
        }
        environment = os.environ | (
            {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if self.options.device == "cpu" else {}
        )
        command = [sys.executable, str(HERE / script), json.dumps(task)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode or not out.is_file():
            return {"failed": _last_words(done.stderr)}
        result = json.loads(out.read_text())
        timed = result["seconds"][WARM_STEPS:]
        worked = result["cpu_seconds"][WARM_STEPS:]
        return result | {
            "pairs_per_s": self.pairs * len(timed) / sum(timed),
            "pairs_per_cpu_s": self.pairs * len(worked) / sum(worked),
        }

    # -- what is measured --------------------------------------------------------------------------------------

    def best_settings(self, side: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The fastest of the settings that a user would try, and all of them with what they gave."""
        run, tried = getattr(self, side), []
        for setting in self._candidates(side):
            result = run(steps=WARM_STEPS + SEARCH_STEPS, **setting)
            rate = {key: result[key] for key in ("pairs_per_s", "peak_memory_gib", "failed") if key in result}
            tried.append(setting | rate)
            print(f"tried {side}  {_describe(setting)}: {_describe(rate)}", flush=True)
        working = [setting for setting in tried if "pairs_per_s" in setting]
        if not working:
            raise RuntimeError(f"no setting of {side} ran: {tried[-1]['failed']}")
        best = max(working, key=lambda setting: setting["pairs_per_s"])
        return {key: best[key] for key in self._candidates(side)[0]}, tried

    def _candidates(self, side: str) -> list[dict[str, Any]]:
        workers = (0, 1) if self.options.device == "cpu" else (4,)
        if side == "pivot":
            return [{"workers": count} for count in workers]
        batches = [size for size in (1, 2, 4, 8) if self.pairs % size == 0]
        candidates = [{"batch": size, "workers": workers[0], "checkpointing": False} for size in batches]
        candidates += [{"batch": batches[-1], "workers": count, "checkpointing": False} for count in workers[1:]]
        if self.options.device == "cuda":
            candidates += [{"batch": size, "workers": workers[0], "checkpointing": True} for size in batches[1:]]
        return candidates

    def compare(self) -> dict[str, Any]:
        first = self.pivot(steps=self.steps)
        if "failed" in first:
            raise RuntimeError(f"our own run failed: {first['failed']}")
        self.ids = first["ids"]
        ours, tried_ours = self.best_settings("pivot")
        results: dict[str, Any] = {"tried": {"pivot": tried_ours}, "settings": {"pivot": ours}}
        rates: dict[str, list[float]] = {"pivot": []}
        cpu_rates: dict[str, list[float]] = {"pivot": [], "trl": []}
        last: dict[str, dict[str, Any]] = {}
        matmul_tflops: list[float] = []
        if self.options.against == "trl":
            theirs, tried_theirs = self.best_settings("trl")
            results["tried"]["trl"], results["settings"]["trl"] = tried_theirs, theirs
            rates["trl"] = []
        for number in range(self.options.rounds):
            for side in rates:
                last[side] = getattr(self, side)(**results["settings"][side])
                rates[side].append(last[side]["pairs_per_s"])
                cpu_rates[side].append(last[side]["pairs_per_cpu_s"])
                matmul_tflops += [last[side]["matmul_tflops"]] if side == "pivot" else []
                print(f"round {number + 1}  {side}: {rates[side][-1]:.2f} pairs/s", flush=True)
        for name in self._savings():
            changes: dict[str, Any] = {"image_trees": False} if name == "image_trees" else {"without": [name]}
            label = f"pivot without {name}"
            last[label] = self.pivot(**(ours | changes))
            rates[label] = [last[label]["pairs_per_s"]] if "pairs_per_s" in last[label] else []
            print(f"{label}: {_describe(last[label], ('pairs_per_s', 'failed'))}", flush=True)
        results["rounds"] = rates
        results["pairs_per_s"] = {name: statistics.median(values) for name, values in rates.items() if values}
        results["peak_memory_gib"] = {name: run["peak_memory_gib"] for name, run in last.items() if "failed" not in run}
        results["losses"] = {name: run["losses"][:LOSS_STEPS] for name, run in last.items() if "failed" not in run}
        results["attention"] = last["pivot"]["attention"]
        # The first run also scored all pairs under the reference; the others found that done.
        scored = self.pairs * self.steps
        results["reference_s_per_pair"] = (first["start_s"] - last["pivot"]["start_s"]) / scored
        results["tflops_per_pair"] = first["flops_per_step"] / self.pairs / 1e12
        results["matmul_tflops"] = statistics.median(matmul_tflops)
        results["useful_share"] = (
            results["pairs_per_s"]["pivot"] * results["tflops_per_pair"] / results["matmul_tflops"]
        )
        if "trl" in rates:
            pairs = zip(rates["pivot"], rates["trl"], strict=True)
            results["ratio"] = statistics.median(ours / theirs for ours, theirs in pairs)
            results["cpu_ratio"] = statistics.median(cpu_rates["pivot"]) / statistics.median(cpu_rates["trl"])
            for key, name in (("losses", "loss"), ("margins", "margin")):
                both = zip(last["pivot"][key][:LOSS_STEPS], last["trl"][key], strict=False)
                results[f"max_{name}_difference"] = max(abs(a - b) for a, b in both)
        return results

    def _savings(self) -> list[str]:
        if self.options.only_ratio:
            return []
        there = {"image_trees": self.options.pairs_per_image > 1}
        return [name for name in SAVINGS if there.get(name, True)]


def _last_words(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][-300:] if lines else "the process ended and printed nothing"


def _describe(values: dict[str, Any], keys: tuple[str, ...] | None = None) -> str:
    chosen = {key: value for key, value in values.items() if keys is None or key in keys}
    return ", ".join(
        f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}" for key, value in chosen.items()
    )


def versions() -> dict[str, str]:
    releases = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            releases[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return releases


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{len(os.sched_getaffinity(0))} CPU cores, {torch.get_num_threads()} threads"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", choices=("trl", "nothing"), default="trl")
    parser.add_argument("--shape", choices=SHAPES, default="cpu")
    parser.add_argument("--pairs-per-image", type=int, default=1, help="above 1 our rows are image trees")
    parser.add_argument("--pairs-per-step", type=int, help="by default the shape's")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a run")
    parser.add_argument("--rounds", type=int, default=3, help="turns that the two sides take")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="of torch, in both; 0: its own choice")
    parser.add_argument("--zero", type=int, choices=(0, 1, 2, 3), help="our ZeRO stage; by default 0 in fp32, else 1")
    parser.add_argument("--attention", default="auto", help="our attention back end")
    parser.add_argument("--row-tokens", type=int, default=16384, help="our token budget of a micro-batch")
    parser.add_argument("--checkpointing", choices=("none", "selective", "full"), default="none", help="ours")
    parser.add_argument("--only-ratio", action="store_true", help="do not switch our savings off one by one")
    parser.add_argument("--case", type=Path, help="keep models and data here, and take them from here the next time")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--table", type=Path, help="write the table here (Markdown)")
    parser.add_argument("--plot", type=Path, help="write a bar chart here (.png or .svg)")
    return parser.parse_args()


def main() -> int:
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, options.case or Path(folder))
        bench.write()
        results = bench.compare()
    facts = {
        "shape": {"name": options.shape} | asdict(bench.shape),
        "pairs_per_step": bench.pairs,
        "pairs_per_image": options.pairs_per_image,
        "steps": options.steps,
        "dtype": options.dtype,
        "machine": machine(options.device),
        "versions": versions(),
    }
    results = facts | results
    print("\n" + show(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.table:
        given = shlex.join(sys.argv[1:])
        options.table.write_text(f"`python benchmarks/dpo_step.py {given}`, {date.today()}\n\n{show(results)}\n")
    if options.plot:
        draw(results, options.plot)
    difference = results.get("max_loss_difference", 0.0)
    if options.dtype == "fp32" and difference > MAX_LOSS_DIFFERENCE:
        print(f"the losses differ by {difference:.2e}, more than {MAX_LOSS_DIFFERENCE:g}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
