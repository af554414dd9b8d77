from __future__ import annotations

import argparse

from data_tools.arguments import whole_number
from data_tools.console import Output
from data_tools.info import describe, describe_in_words


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="DIR", help="a packed set")
    command.add_argument(
        "--top", type=whole_number(0), default=3, help="so many of the largest samples are named (%(default)s)"
    )


def run(options: argparse.Namespace, output: Output) -> int:
    facts = describe(options.folder, top=options.top)
    output.table(("field", "value"), describe_in_words(facts).items())
    output.result(facts)
    return 0
