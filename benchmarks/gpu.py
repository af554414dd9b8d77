"""All that needs to be seen on a GPU, in one call: correctness first, then speed; prints Markdown tables.

    python benchmarks/gpu.py --out gpu.json                       # on a card
    python benchmarks/gpu.py --device cpu --shape tiny --quick    # does the script itself work?

 1. attention   every back end against a float64 oracle and against SDPA, and its time on a packed row
 2. stages      ZeRO-0 (fp32), 1, 2, 3 in the run's precision: losses of all agree, pairs per second, memory
 3. against TRL at its best of batch 1, 2, 4, 8; image trees; each saving switched off
 4. sweeps      row budget, activation checkpointing, back ends
 5. large       the 7B shape, as far as memory allows

Parts that fail are reported and the others go on. `--minutes` ends it before a part that would start too late.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import SHAPES
from dpo_step import Bench, machine, versions
from measure import synchronise
from table import show

from pivot.models.attention import BACKENDS, choose_attention
from pivot.startup.flops import measure_matmul_tflops
from pivot.trees import Segments

HERE = Path(__file__).resolve().parent
# Losses of ten steps, setting against setting: the same sums in another order.
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}


# -- 1: attention --------------------------------------------------------------------------------------------------


def preference_row(shape: Any, pairs: int) -> Segments:
    """Prompts of an image and their two completions, as a micro-batch packs them."""
    prompt = shape.image_tokens + 2 + shape.prompt[1]
    completion = shape.completion[1] + 1
    lengths = np.array([prompt, completion, completion] * pairs)
    parents = np.array([value for pair in range(pairs) for value in (-1, 3 * pair, 3 * pair)])
    ends = np.cumsum(lengths)
    return Segments(ends - lengths, ends, parents)


def oracle(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments) -> torch.Tensor:
    """[1, T, H, D] in float64 with a mask that is as large as the row: small rows only."""
    owner = np.repeat(np.arange(len(segments)), segments.end - segments.start)
    lineage = np.zeros((len(segments), len(segments)), dtype=bool)
    for segment in range(len(segments)):
        lineage[segment, [segment, *segments.ancestors(segment)]] = True
    seen = lineage[owner[:, None], owner[None]] & np.tril(np.ones((len(owner), len(owner)), dtype=bool))
    groups = query.shape[1] // key.shape[1]
    q, k, v = query.double(), key.double().repeat_interleave(groups, 1), value.double().repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~torch.from_numpy(seen).to(q.device), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def attention(options: argparse.Namespace, dtype: torch.dtype) -> list[dict[str, Any]]:
    shape, device = SHAPES[options.shape], torch.device(options.device)
    heads, key_heads = shape.language["num_attention_heads"], shape.language["num_key_value_heads"]
    width = shape.language["hidden_size"] // heads
    small, large = preference_row(shape, 2), preference_row(shape, options.row_pairs)
    rows = []
    for name, backend in BACKENDS.items():
        row: dict[str, Any] = {"backend": name}
        rows.append(row)
        try:
            choose_attention(name, device=device, dtype=dtype, heads=heads, key_heads=key_heads, head_size=width)
        except ValueError as error:
            row["refused"] = str(error)
            continue
        states = _states(small, heads, key_heads, width, dtype, device)
        output = backend(*states, small.move(lambda x: x.to(device)), width**-0.5).double()
        exact = oracle(*states, small)
        row["error"] = float((output - exact).abs().max())
        row["error_of_sdpa"] = float((BACKENDS["sdpa"](*states, small, width**-0.5).double() - exact).abs().max())
        on_device = large.move(lambda x: x.to(device))
        states = [x.requires_grad_() for x in _states(large, heads, key_heads, width, dtype, device)]

        def both(states: Any = states, backend: Any = backend, segments: Segments = on_device) -> None:
            output = backend(*states, segments, width**-0.5)
            torch.autograd.grad(output.float().sum(), states)

        row["forward_backward_ms"] = _time(both, options.device) * 1e3
    return rows


def _states(
    segments: Segments, heads: int, key_heads: int, width: int, dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, count, segments.num_tokens, width) for count in (heads, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def _time(run: Callable[[], None], device: str, repeats: int = 10) -> float:
    run()
    synchronise(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronise(device)
    return (time.perf_counter() - start) / repeats


# -- 2 to 5: training steps ----------------------------------------------------------------------------------------


def bench(options: argparse.Namespace, folder: Path, **changes: Any) -> Bench:
    """A bench of `dpo_step.py` on the case in `folder`, made there on the first use."""
    settings = {
        "against": "nothing",
        "shape": options.shape,
        "pairs_per_image": 1,
        "pairs_per_step": None,
        "steps": options.steps,
        "rounds": 1,
        "dtype": options.dtype,
        "device": options.device,
        "threads": 0,
        "zero": None,
        "attention": "auto",
        "row_tokens": options.row_tokens,
        "checkpointing": "none",
        "only_ratio": True,
    }
    made = Bench(argparse.Namespace(**(settings | changes)), folder)
    made.write()
    return made


def stages(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    rows = []
    for dtype, zero in (("fp32", 0), (options.dtype, 1), (options.dtype, 2), (options.dtype, 3)):
        if dtype == "fp32" and options.dtype != "fp32" and options.shape not in ("tiny", "cpu", "1.5b"):
            continue
        case = folder if dtype == options.dtype else folder.with_name(f"{folder.name}-{dtype}")
        found = bench(options, case, dtype=dtype, zero=zero).pivot()
        rows.append({"stage": zero, "dtype": dtype} | _figures(found))
        if "losses" in found:
            same = [row for row in rows[:-1] if row["dtype"] == dtype and "losses" in row]
            rows[-1]["losses"] = found["losses"]
            if same:
                rows[-1] |= _agreement(found["losses"], same[0]["losses"], dtype)
    return rows


def _agreement(found: list[float], expected: list[float], dtype: str) -> dict[str, Any]:
    difference = max(abs(ours - theirs) for ours, theirs in zip(found, expected, strict=True))
    return {"difference": difference, "agrees": difference <= LOSS_TOLERANCE[dtype]}


def sweeps(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Neither a row's budget nor recomputation nor the back end may change the losses: each is held to the first."""
    settings = [
        {"max_tokens_per_micro_batch": tokens, "checkpointing": checkpointing, "attention": "auto"}
        for tokens in options.budgets
        for checkpointing in ("none", "selective", "full")
    ]
    settings += [
        {"max_tokens_per_micro_batch": options.row_tokens, "checkpointing": "none", "attention": name}
        for name in BACKENDS
    ]
    longest, rows, expected = bench(options, folder), [], None
    for setting in settings:
        found = longest.pivot(**setting)
        rows.append(setting | _figures(found))
        if "losses" in found:
            expected = expected or found["losses"]
            rows[-1] |= _agreement(found["losses"], expected, options.dtype)
    return rows


def large(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """7B: all trained with offloaded optimizer state where host memory allows, and with a frozen language model."""
    rows = []
    made = bench(options, folder, shape=options.large, pairs_per_step=8, steps=2)
    for zero, frozen in (("3_offload", []), (1, ["language_model"])):
        found = made.pivot(zero=zero, frozen=frozen, checkpointing="full", steps=4)
        rows.append({"stage": zero, "frozen": ",".join(frozen) or "nothing"} | _figures(found))
    return rows


def _figures(found: dict[str, Any]) -> dict[str, Any]:
    if "failed" in found:
        return {"failed": found["failed"]}
    useful = found["flops_per_step"] / len(found["ids"][0]) * found["pairs_per_s"]
    return {
        "pairs_per_s": found["pairs_per_s"],
        "useful_tflops": useful / 1e12,
        "peak_memory_gib": found["peak_memory_gib"],
        "runs_on": found["attention"],
    }


# -- the whole -----------------------------------------------------------------------------------------------------


def against_trl(options: argparse.Namespace, folder: Path, pairs_per_image: int) -> dict[str, Any]:
    """In a process of its own, so that this one holds none of the card's memory."""
    out = folder.with_suffix(".json")
    command = [sys.executable, str(HERE / "dpo_step.py"), "--against", "trl", "--shape", options.shape]
    command += ["--device", options.device, "--dtype", options.dtype, "--steps", str(options.steps), "--rounds", "2"]
    command += ["--pairs-per-image", str(pairs_per_image), "--row-tokens", str(options.row_tokens)]
    command += ["--case", str(folder), "--json", str(out)]
    done = subprocess.run(command, text=True, stdout=sys.stderr)
    if not out.is_file():
        raise RuntimeError(f"dpo_step.py ended with {done.returncode}")
    return json.loads(out.read_text())


def as_table(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row if name != "losses"))
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        cells = [row.get(name, "") for name in names]
        lines.append("| " + " | ".join(f"{x:.4g}" if isinstance(x, float) else str(x) for x in cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument("--large", choices=SHAPES, default="7b")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--row-tokens", type=int, default=16384)
    parser.add_argument("--row-pairs", type=int, default=14, help="pairs of the row that attention is timed on")
    parser.add_argument("--budgets", type=int, nargs="*", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--minutes", type=float, default=1e9, help="start no further part after so long")
    parser.add_argument("--parts", nargs="*", default=["attention", "stages", "trl", "trees", "sweeps", "large"])
    parser.add_argument("--quick", action="store_true", help="small budgets: to try the script")
    parser.add_argument("--out", type=Path, help="write all figures here")
    options = parser.parse_args()
    if options.quick:
        options.row_tokens, options.row_pairs, options.budgets, options.large = 2048, 3, [512, 2048], options.shape
    started, dtype = time.monotonic(), {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    found: dict[str, Any] = {"machine": machine(options.device), "versions": versions(), "shape": options.shape}
    found["matmul_tflops"] = measure_matmul_tflops(torch.device(options.device), dtype)
    print(f"# {found['machine']}: {found['matmul_tflops']:.4g} TFLOP/s in {options.dtype}; {found['versions']}\n")
    with tempfile.TemporaryDirectory() as folder:
        case = Path(folder) / "case"
        parts: dict[str, Callable[[], Any]] = {
            "attention": lambda: attention(options, dtype),
            "stages": lambda: stages(options, case),
            "trl": lambda: against_trl(options, case, 1),
            "trees": lambda: against_trl(options, case.with_name("trees"), 4),
            "sweeps": lambda: sweeps(options, case),
            "large": lambda: large(options, case.with_name("large")),
        }
        for name in options.parts:
            if time.monotonic() - started > 60 * options.minutes:
                found[name] = {"skipped": "no time left"}
            else:
                try:
                    found[name] = parts[name]()
                except Exception as error:  # the other parts are worth having
                    found[name] = {"failed": f"{type(error).__name__}: {str(error)[-500:]}"}
            if options.device == "cuda":
                torch.cuda.empty_cache()  # the next part's processes want all of the card
            text = as_table(found[name]) if isinstance(found[name], list) else None
            text = text or (show(found[name]) if "pairs_per_s" in found[name] else str(found[name]))
            print(f"\n## {name} ({time.monotonic() - started:.0f} s)\n\n{text}", flush=True)
            if options.out:
                options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
