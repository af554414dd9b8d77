from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from data_tools.arguments import count, seed, share
from data_tools.console import Output, bytes_text, count_text
from data_tools.pack import PackOptions, Tally, pack, try_pack
from data_tools.readers import READERS, find_reader
from data_tools.readers.generic import FIELDS, IMAGE, parse_mapping
from data_tools.records import Drop, ImageBytes, Record, shown
from data_tools.shuffle import pack_shuffled, try_pack_shuffled

SHOWN_ROWS = 3
SHOWN_LETTERS = 200  # of a text in --show-mapping


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", type=Path, metavar="SRC", help="folder or file; the format is found out")
    command.add_argument("--out", type=Path, help="folder to write; needed but for --show-mapping")
    command.add_argument(
        "--image-root", type=Path, action="append", default=[], help="folder from which image paths count; repeatable"
    )
    command.add_argument(
        "--allow-root", type=Path, action="append", default=[], help="folder to which links may lead; repeatable"
    )
    command.add_argument("--name", help="of the data set and its shards; by default that of SRC")
    command.add_argument("--format", choices=["auto", *READERS], default="auto", metavar="FORMAT", help=_formats())
    command.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="FIELD=COLUMN",
        help=f"fields: {', '.join(FIELDS)}; repeatable; image goes with all formats, image= says that none is there",
    )
    command.add_argument(
        "--show-mapping", action="store_true", help="print three rows as they are understood, and stop"
    )
    command.add_argument(
        "--share",
        type=share,
        default=(1, 1),
        metavar="I/N",
        help="pack rows I, I + N, I + 2 N, ... only, so that N machines pack at once, each into its own --out; reshard "
        "then makes one set of the N",
    )
    command.add_argument(
        "--turns",
        choices=["last", "each"],
        default="last",
        help="which answers of SFT conversations to train on (%(default)s)",
    )
    command.add_argument(
        "--max-side",
        type=count,
        metavar="PX",
        help="make larger images smaller (JPEG); by default all keep their bytes",
    )
    command.add_argument(
        "--max-drop",
        type=float,
        default=0.01,
        help="end with 1 and no set when a larger share of the rows is dropped (%(default)s)",
    )
    command.add_argument(
        "--shuffle",
        action="store_true",
        help="put the samples in a drawn order, for readers that read shards front to back (pivot draws its own "
        "order) and for sets to be read from afar; takes the set's size twice while it runs",
    )
    command.add_argument("--seed", type=seed, default=0, help="of --shuffle (%(default)s)")
    command.add_argument("--samples-per-shard", type=count, default=2000, help="at most (%(default)s)")
    command.add_argument("--megabytes-per-shard", type=count, default=256, help="at most (%(default)s)")


def _formats() -> str:
    return f"auto, {', '.join(READERS)}"


def run(options: argparse.Namespace, output: Output) -> int:
    mapping = parse_mapping(options.map)
    _check(options)
    if options.show_mapping:
        return _show_mapping(options, mapping, output)
    if options.out is None:
        raise ValueError("--out is missing: name the folder to write")
    wanted = PackOptions(
        source=options.source,
        out=options.out,
        name=options.name,
        format=options.format,
        mapping=mapping,
        image_roots=tuple(options.image_root),
        allow_roots=tuple(options.allow_root),
        share=options.share,
        turns=options.turns,
        max_side=options.max_side,
        workers=options.workers,
        max_drop=options.max_drop,
        samples_per_shard=options.samples_per_shard,
        bytes_per_shard=options.megabytes_per_shard << 20,
    )
    line = output.progress("rows")

    def progress(tally: Tally) -> None:
        line(tally.rows, None, f"{tally.num_dropped:,} dropped")

    if options.dry_run:
        there = (options.out / "manifest.json").is_file()
        dry_run = partial(try_pack_shuffled, seed=options.seed) if options.shuffle else try_pack
        tally, size = dry_run(wanted, progress=progress)
        line.close()
        num_samples, complete = tally.rows - tally.num_dropped, there or tally.drop_ratio <= options.max_drop
        would = f"would write {count_text(num_samples, 'sample')}, {bytes_text(size)} of content, to {options.out}"
        text = f"{options.out} is complete: nothing would be written" if there else would
    else:
        if options.shuffle:
            result = pack_shuffled(wanted, options.seed, progress, copied := output.progress("samples copied"))
            copied.close()
        else:
            result = pack(wanted, progress)
        line.close()
        tally, num_samples, complete = result.tally, result.num_samples, result.complete
        size = sum(shard.bytes for shard in result.shards)
        counts = f"{count_text(num_samples, 'sample')} in {count_text(len(result.shards), 'shard')}"
        text = f"{options.out}: {counts}, {bytes_text(size)}"
    _show_tally(tally, num_samples, output)
    output.result(
        {"out": str(options.out), "samples": num_samples, "bytes": size, "complete": complete} | asdict(tally)
    )
    if complete:
        output.say(text)
        return 0
    output.error(
        f"{tally.num_lost} of {tally.rows} rows were dropped ({tally.drop_ratio:.1%}; duplicates do not count), more "
        f"than --max-drop {options.max_drop:g}; no manifest was written. Mend the input and choose "
        "another --out, or run again with a larger --max-drop: it resumes"
    )
    return 1


def _check(options: argparse.Namespace) -> None:
    """Raise ValueError for a value that would be found out late or never."""
    if not 0 <= options.max_drop <= 1:  # nan is neither
        raise ValueError(f"--max-drop is {options.max_drop:g}, expected a share of the rows from 0 to 1")
    for flag, folders in (("--image-root", options.image_root), ("--allow-root", options.allow_root)):
        for folder in folders:
            if not folder.is_dir():
                raise ValueError(f"{flag} {folder}: there is no such folder")


def _show_tally(tally: Tally, num_samples: int, output: Output) -> None:
    rows = [("read", f"{tally.rows:,}", ""), ("kept", f"{num_samples:,}", "")]
    with_images = f"{count_text(tally.images, 'image')}" if tally.images else "no sample has an image"
    rows.append(("  with images", f"{tally.with_images:,}", with_images))
    for reason, dropped in sorted(tally.drops.items()):
        examples = "\n".join(f"{example['id']}: {example['detail']}" for example in tally.examples[reason])
        rows.append((reason, f"{dropped:,}", examples))
    output.table(("rows", "count", "examples"), rows)
    if tally.recoded:
        formats = "; ".join(f"{count:,} {format}" for format, count in sorted(tally.recoded.items()))
        output.say(f"images written as PNG, since shards hold JPEG, PNG and WebP: {formats}")
    if tally.prompts_taken_off:
        output.say(
            f"both answers of {count_text(tally.prompts_taken_off, 'pair')} began with the prompt; it was taken off"
        )
    if tally.untrained_answers:
        output.say(
            f"{tally.untrained_answers} earlier answers of conversations are context only; --turns each makes a "
            "sample of every answer (and stores the image with each)"
        )


def _show_mapping(options: argparse.Namespace, mapping: dict[str, str], output: Output) -> int:
    format, reader = find_reader(options.source, options.format, mapping)
    rows = list(islice(reader.read(options.source, tuple(options.image_root), mapping.get(IMAGE)), SHOWN_ROWS))
    output.say(f"{options.source}: format {format}")
    for row in rows:
        output.table(("field", "value"), _fields(row).items())
    output.result({"format": format, "rows": [_fields(row) for row in rows]})
    if not rows:
        output.error(f"{options.source} has no rows")
    return 0 if any(isinstance(row, Record) for row in rows) else 1


def _fields(row: Record | Drop) -> dict[str, Any]:
    if isinstance(row, Drop):
        return {"id": shown(row.id), "dropped": row.reason, "detail": row.detail}
    images = [f"{len(i.data)} bytes {i.name}" if isinstance(i, ImageBytes) else shown(i) for i in row.images]
    history = "\n".join(f"{role}: {shown(text, SHOWN_LETTERS)}" for role, text in row.history)
    texts = {name: shown(getattr(row, name) or "-", SHOWN_LETTERS) for name in ("prompt", "chosen", "rejected")}
    if row.label is not None:
        texts = {"prompt": texts["prompt"], "completion": texts["chosen"], "label": str(row.label).lower()}
    tail = {"images": "\n".join(images) or "-", "answer": _either(row.answer)}
    return {"id": shown(row.id), "source": row.source, **({"history": history} if history else {}), **texts, **tail}


def _either(answer: str | tuple[str, ...] | None) -> str:
    return " or ".join(answer) if isinstance(answer, tuple) else answer or "-"
