"""Write a run's report.html again: `python launch/report.py RUN [--previous RUN ...]`."""

from __future__ import annotations

import argparse
import sys

from command import OK, tell_error


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="report.py", description="Write a run's report.html again.")
    parser.add_argument("run", metavar="RUN", help="a run's output_dir")
    parser.add_argument(
        "--previous",
        nargs="*",
        metavar="RUN",
        help="earlier stages to show beside it, oldest first (those that init_from leads to)",
    )
    options = parser.parse_args(arguments)
    try:
        from pivot.report import write_report  # here, so that --help needs nothing installed

        print(write_report(options.run, options.previous))
        return OK
    except Exception as error:
        return tell_error(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
