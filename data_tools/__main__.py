"""python -m data_tools COMMAND: turn preference data into shards, look at it, check it, cut and draw from it.

Exit code 0: done; 1: the data is not good enough (too many rows dropped, damage found, twins that differ); 2: the
command or its input is wrong; 3: the machine failed (disk full, file unreadable, worker killed), run the same command
again: it resumes; 130: interrupted.

From a downloaded set to a run (docs/data_tutorial.md says more):

    python -m data_tools pack SRC --show-mapping             three rows as they are understood
    python -m data_tools pack SRC --out SET                  a folder of shards; SET is what the others read
    python -m data_tools preview SET --out preview.html      look at it
    python -m data_tools split SET --eval 0.02 --out OUT     OUT/train for data.train, OUT/eval for data.eval
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from typing import NoReturn

from data_tools.arguments import whole_number
from data_tools.console import Output
from pivot.system.plain import plain

# Each has a module in data_tools/commands: add_arguments(parser) and run(options, output) -> exit code.
COMMANDS = {
    "demo": "draw the demo world: captions, questions, preference pairs, a tiny model",
    "pack": "turn a data set into shards; run again, it resumes",
    "validate": "read and decode everything once",
    "info": "what a packed data set holds",
    "preview": "look at it: a contact sheet (PNG) or one HTML page with the answers' difference marked",
    "lengths": "count tokens, and say what share of the pairs is over which limit",
    "split": "set apart pairs for evaluation; an image never lies on both sides",
    "sample": "draw a part: uniformly or by MMPR's repeat_time, with filters",
    "reshard": "the same samples in shards of another size, shuffled if you like; several sets become one",
    "exclude": "a list of the damaged samples that runs met, for data.exclude",
    "simulate": "which ids each rank would see at each step",
    "twins": "whether two runs see the same ids at every step",
}


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options, unknown = _parser(arguments).parse_known_args(arguments)
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    output = Output(as_json=options.json, loudness=0 if options.quiet else 1 + options.verbose)
    try:
        return options.run(options, output)
    except (BrokenPipeError, KeyboardInterrupt) as error:
        return _stopped(error)
    except OSError as error:
        output.error(_machine_text(error, options))
        return 3
    except ValueError as error:
        output.error(str(error))
        return 2
    except RuntimeError as error:
        output.error(_damage_text(error))
        return 1


def _stopped(error: BaseException) -> int:
    if isinstance(error, BrokenPipeError):  # `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    else:
        print("interrupted; run the same command again to go on", file=sys.stderr)
    return 130


def _machine_text(error: OSError, options: argparse.Namespace) -> str:
    out = getattr(options, "out", None)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f"the disk of {out}" if out else "the disk"
        return f"no space is left on {where}; what is finished stays. Free some and run the same command: it goes on"
    if error.errno is None:  # a sentence of ours
        return str(error)
    return f"{error} ({type(error).__name__})"


def _damage_text(error: RuntimeError) -> str:
    from pivot.data.shards import DamagedSample

    mend = "; python -m data_tools validate lists all damage. A run masks it, and by `exclude` the next leaves it out"
    return f"{error}{mend if isinstance(error, DamagedSample) else ''}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, plain(f"error: {message}; {self.prog} --help lists what there is\n"))


def _parser(arguments: list[str]) -> argparse.ArgumentParser:
    """Only the module of the command that is asked for is loaded: some bring torch or matplotlib with them."""
    parser = _Parser(prog="python -m data_tools", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name in arguments:
            module = importlib.import_module(f"data_tools.commands.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run, parser=command)
        _add_shared(command)
    return parser


def _add_shared(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("all commands")
    group.add_argument(
        "--dry-run", action="store_true", help="read and check, say what would be written, write nothing"
    )
    group.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    cores = min(8, os.cpu_count() or 1)
    group.add_argument("--workers", type=whole_number(0), default=cores, help="processes (%(default)s)")
    loudness = group.add_mutually_exclusive_group()
    loudness.add_argument("-q", "--quiet", action="store_true", help="say nothing but errors")
    loudness.add_argument("-v", "--verbose", action="count", default=0, help="say more")


if __name__ == "__main__":
    sys.exit(main())
