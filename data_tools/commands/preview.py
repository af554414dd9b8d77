from __future__ import annotations

import argparse
import io
from pathlib import Path

from data_tools.arguments import count, seed
from data_tools.console import Output, bytes_text, count_text
from data_tools.copying import open_sets
from data_tools.preview import choose, read_shown, to_html
from data_tools.sheet import draw_sheet
from data_tools.where import HELP, parse_where
from pivot.system.files import write_atomically


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="DIR", help="a packed set")
    command.add_argument(
        "--out",
        type=Path,
        action="append",
        metavar="FILE",
        help="ends with .html or .png; repeatable; by default DIR/preview.html",
    )
    command.add_argument("--n", type=count, help="how many samples (40 on a page, 8 on a sheet)")
    command.add_argument("--seed", type=seed, default=0, help="of the draw (%(default)s)")
    command.add_argument("--where", action="append", default=[], metavar="COND", help=HELP)
    command.add_argument("--columns", type=count, default=2, help="of the sheet (%(default)s)")
    command.add_argument("--dark", action="store_true", help="a dark sheet; the page follows the browser")


def run(options: argparse.Namespace, output: Output) -> int:
    files = options.out or [Path(options.folder) / "preview.html"]
    for file in files:
        if file.suffix not in (".html", ".png"):
            raise ValueError(f"--out {file}: expected a file that ends with .html or .png")
    shards = open_sets([options.folder])
    conditions = [parse_where(text) for text in options.where]
    written = {}
    for file in files:
        rows = choose(shards, options.n or (8 if file.suffix == ".png" else 40), options.seed, conditions)
        if not rows:
            raise ValueError(f"no sample of {options.folder} meets {' and '.join(options.where)}")
        shown = read_shown(shards, rows)
        if file.suffix == ".html":
            data = to_html(shards, shown, shards.name).encode()
        else:
            image = io.BytesIO()
            draw_sheet(shown, shards.name, columns=options.columns, dark=options.dark).save(image, "PNG")
            data = image.getvalue()
        unreadable = len(rows) - len(shown)
        written[str(file)] = {"samples": len(shown), "unreadable": unreadable, "bytes": len(data)}
        if not options.dry_run:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, data)
        verb = "would write" if options.dry_run else "wrote"
        output.say(f"{verb} {file}: {count_text(len(shown), 'sample')}, {bytes_text(len(data))}")
        if unreadable:
            output.say(
                f"{unreadable} of {len(rows)} cannot be read and is not shown; python -m data_tools validate "
                f"{options.folder} lists what is damaged"
            )
    output.result({"rows": rows, "files": written})
    return 0
