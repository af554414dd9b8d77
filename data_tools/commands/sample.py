from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from data_tools.arguments import count, seed, whole_number
from data_tools.console import Output
from data_tools.copying import Choice, check_copy, copy_samples
from data_tools.draw import WAYS, Filters, draw
from data_tools.where import HELP, parse_where, text_of
from pivot.data.samples import Sample
from pivot.data.shards import ShardSet

# Uniform over annotation rows, seed 777: one image that exists, no <image> in the answers, and prompt and chosen of at
# most 1500 tokens of Qwen2.5 (text alone). The released script looks for a misspelt tag and never at the rejected
# answer; we look for the right one, in both.
PRESETS: dict[str, dict[str, Any]] = {
    "pivot-20k": {"num": 20_000, "seed": 777, "by": "rows", "images": 1, "max_tokens": 1500, "without": ["<image>"]}
}
SPECIAL = ("<image>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "<review>", "</review>")


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="DIR", help="a packed set")
    command.add_argument("--out", type=Path, required=True, help="folder to write")
    command.add_argument("--name", help="of the new set; by default that of DIR and the number")
    command.add_argument("--preset", choices=PRESETS, help="PIVOT's draw from MMPR; needs --tokenizer (Qwen2.5)")
    command.add_argument("--num", type=count, help="how many samples; all that pass the filters, if absent")
    command.add_argument("--seed", type=seed, help="of the draw; 0 if absent")
    command.add_argument("--by", choices=WAYS, help="rows: each alike; repeat_time: by the weight of its source")
    command.add_argument("--where", action="append", default=[], metavar="COND", help=HELP)
    command.add_argument("--images", type=whole_number(0), help="only samples with exactly so many images")
    command.add_argument("--max-words", type=count, help="at most so many words in the longer answer")
    command.add_argument(
        "--max-tokens", type=count, help="at most so many in prompt and chosen, text alone; needs --tokenizer"
    )
    command.add_argument("--tokenizer", help="folder or hub id that --max-tokens counts with")
    command.add_argument(
        "--without", action="append", metavar="TEXT", help="only samples without it in an answer; repeatable"
    )
    command.add_argument("--no-special-tokens", action="store_true", help=f"--without {', '.join(SPECIAL)}")


def run(options: argparse.Namespace, output: Output) -> int:
    wanted = _resolve(options)
    filters = Filters(
        conditions=tuple(parse_where(text) for text in options.where),
        num_images=wanted["images"],
        max_words=options.max_words,
        max_tokens=wanted["max_tokens"],
        without=tuple(wanted["without"]),
        count_tokens=None if wanted["max_tokens"] is None else _TokenCount(options.tokenizer),
    )
    shards = ShardSet.open(options.folder)
    line = output.progress("samples")
    drawn = draw(shards, wanted["num"], wanted["seed"], by=wanted["by"], filters=filters, progress=line)
    line.close()
    facts = {"by": wanted["by"], "seed": wanted["seed"], "num": len(drawn.rows), "preset": options.preset}
    facts |= {"filters": filters.facts(), "tokenizer": options.tokenizer, "input": shards.fingerprint}
    name = options.name or f"{shards.name[:64]}-{len(drawn.rows)}"
    choice = Choice((options.folder,), drawn.rows, name, {"command": "sample", **facts})
    if options.dry_run:
        check_copy(choice, options.out)
    else:
        line = output.progress("samples")
        copy_samples(choice, options.out, workers=options.workers, progress=line)
        line.close()
    if drawn.refused:
        output.table(("not drawn because of", "rows"), drawn.refused.items())
    verb = "would write" if options.dry_run else "wrote"
    output.say(
        f"{verb} {len(drawn.rows)} of {len(shards)} samples to {options.out}, drawn by {wanted['by']} with seed "
        f"{wanted['seed']} ({drawn.looked_at} looked at)"
    )
    output.result({"out": str(options.out), "samples": len(drawn.rows), "draw": facts, "refused": drawn.refused})
    return 0


def _resolve(options: argparse.Namespace) -> dict[str, Any]:
    """The preset's settings under those that are given."""
    resolved: dict[str, Any] = {"num": None, "seed": 0, "by": "rows", "images": None, "max_tokens": None, "without": []}
    resolved |= PRESETS.get(options.preset, {})
    resolved |= {name: getattr(options, name) for name in resolved if getattr(options, name) is not None}
    if options.no_special_tokens:
        resolved["without"] = sorted({*resolved["without"], *SPECIAL})
    if resolved["max_tokens"] is not None and options.tokenizer is None:
        raise ValueError("a limit on tokens needs --tokenizer: the folder or hub id of the model's (PIVOT: Qwen2.5)")
    return resolved


class _TokenCount:
    """Text tokens of prompt and chosen, without template and images, as PIVOT's script counts."""

    def __init__(self, path: str) -> None:
        from pivot.processor import load_tokenizer

        self._tokenizer = load_tokenizer(path)

    def __call__(self, sample: Sample) -> int:
        text = text_of(sample, "prompt") + text_of(sample, "chosen")
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])
