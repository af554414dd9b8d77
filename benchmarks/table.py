"""The result of `dpo_step.py` for people: a table and a bar chart."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def show(result: dict[str, Any]) -> str:
    """A Markdown table, with what was measured and where above it."""
    rates, memory = result["pairs_per_s"], result["peak_memory_gib"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"{result['shape']['name']} shape, {result['pairs_per_step']} pairs a step, {result['pairs_per_image']} pairs "
        f"an image, {result['dtype']}, {result['machine']}; {versions}; attention {result['attention']}; "
        f"{result['tflops_per_pair']:.3g} useful TFLOP a pair; the reference is scored once, "
        f"{1e3 * result['reference_s_per_pair']:.0f} ms a pair",
        "",
        "| | pairs/s | of ours | peak memory, GiB |",
        "|---|---|---|---|",
    ]
    for name, rate in rates.items():
        lines.append(f"| {name} | {rate:.2f} | {rate / rates['pivot']:.2f} | {memory[name]:.2f} |")
    lines += [
        "",
        f"useful share of the matrix rate: {100 * result['useful_share']:.0f} % of {1e3 * result['matmul_tflops']:.0f} "
        "GFLOP/s, measured behind each round's steps",
    ]
    if "ratio" in result:
        limit = result["matmul_tflops"] / result["tflops_per_pair"] / rates["trl"]
        settings = ", ".join(f"{key} {value}" for key, value in result["settings"]["trl"].items())
        lines += [
            "",
            f"ours over TRL's: {result['ratio']:.2f} times the pairs per second (median of the rounds; "
            f"{result['cpu_ratio']:.2f} by processor time), "
            f"{memory['pivot'] / memory['trl']:.2f} of its memory; at all of that rate it would be {limit:.1f} times; "
            f"TRL at its best of what was tried: {settings}",
            f"largest difference over {len(result['losses']['pivot'])} steps: loss "
            f"{result['max_loss_difference']:.1e}, reward margin {result['max_margin_difference']:.1e}",
        ]
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rates = result["pairs_per_s"]
    names = list(rates)[::-1]
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(names) + 1.2))
    colours = ["#2a78d6" if name == "pivot" else "#e2703a" if name == "trl" else "#9db8d6" for name in names]
    bars = axes.barh(names, [rates[name] for name in names], color=colours)
    axes.bar_label(bars, fmt="%.2f", padding=4)
    axes.set_xlabel(f"pairs/s, {result['shape']['name']} shape, {result['machine']}, {result['dtype']}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
