"""Export a checkpoint as a model: `python launch/export.py RUN_OR_CHECKPOINT --out DIR`. No GPU is needed.

With `--encoder hf|open_clip|timm` it is the encoder alone, as that library keeps one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from command import OK, tell_error


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="export.py",
        description="Write what a run's end would have exported, had it ended at a checkpoint: an HF LLaVA folder, or "
        "its parts for what LLaVA cannot express.",
    )
    parser.add_argument(
        "path", type=Path, metavar="RUN_OR_CHECKPOINT", help="a run (its newest sound checkpoint), or one"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="an empty folder, or one to be made")
    parser.add_argument(
        "--encoder",
        choices=("hf", "open_clip", "timm"),
        help="write the vision encoder alone, whole and as its own library (named here) keeps one; it is read back by "
        "that library, and its features are compared",
    )
    options = parser.parse_args(arguments)
    try:
        from pivot.run import export  # here, so that --help needs nothing installed
        from pivot.system.redact import tell

        if options.encoder is None:
            export.export_checkpoint(options.path, options.out, tell)
        else:
            library = export.ENCODER_OPTIONS[options.encoder]
            export.export_encoder(options.path, options.out, library, tell)
        tell(f"exported   {options.out}")
        return OK
    except Exception as error:
        return tell_error(error)


if __name__ == "__main__":
    from pivot.system.process import leave

    leave(main(sys.argv[1:]))
