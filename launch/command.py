"""What the scripts that take a run's CONFIG share: their command line, and errors that a user can act on."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pivot.config import Config, Key

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a checkout works without being installed, also under the deepspeed launcher

USAGE = """usage: deepspeed launch/{script}.py CONFIG [key=value ...] [--check | --print-config]

  CONFIG          the run's YAML
  key=value       overrides, for example optim.lr=1e-6
  --check         read settings and data, show what would run, load no weights
  --print-config  print the resolved settings
  --help          say this, and every key with its default, its values and what it means"""

WIDTH = 120  # letters of a line of --help

# Done; failed; for the user to mend; stopped by a signal (sysexits' EX_TEMPFAIL): the same command goes on.
OK, FAILED, USAGE_ERROR, AGAIN = 0, 1, 2, 75
INTERRUPTED = 130  # by Ctrl-C, as a shell counts it

Task = Callable[["Config", bool], int]  # a run's settings, and whether they shall only be checked -> the exit code


def train(config: Config, check_only: bool) -> int:
    """Train to the end, with its report, or until a signal."""
    from pivot import train as training

    if training.train(config, check_only=check_only) == training.PREEMPTED:
        return AGAIN
    if not check_only and os.environ.get("RANK", "0") == "0":
        write_report(config.output_dir)
    return OK


def write_report(folder: str) -> None:
    """Write the page for people. A failure is only said: the run and its export are whole."""
    from pivot.system.redact import tell

    try:
        from pivot import report  # here, so that training needs nothing that only draws

        tell(f"report     {report.write_report(folder)}")
    except Exception as error:
        tell(f"no report ({type(error).__name__}: {error}); try python launch/report.py {folder}")


def make_references(config: Config, check_only: bool) -> int:
    """Score the reference log-probs that the run would need."""
    from pivot.startup import references

    references.make_references(config, check_only=check_only)
    return OK


def describe_keys() -> str:
    """What pivot/config.py says of each setting, by sections, in lines of at most WIDTH letters."""
    from pivot.config import KEYS

    lines = ["Keys and their defaults. resume: a run that goes on may change it; ranks: each machine may have its own."]
    for section in ("", *(key.name for key in KEYS.values() if key.section is not None)):
        lines += [
            "",
            *textwrap.wrap(f"{section}: {KEYS[section].text}" if section else "", WIDTH, break_on_hyphens=False),
        ]
        for key in KEYS.values():
            if key.section is None and key.name.rpartition(".")[0] == section:
                text = textwrap.fill(key.text, WIDTH - 6, break_on_hyphens=False)
                lines += [_describe_values(key), textwrap.indent(text, 6 * " ")]
    return "\n".join(lines)


def _describe_values(key: Key) -> str:
    """In columns: what it is, what it may be, and who may change it."""
    from pivot.config import MISSING

    default = key.default if isinstance(key.default, str) else json.dumps(key.default)
    setting = f"{key.name}: must be given" if key.default == MISSING else f"{key.name}={default}"
    values = " | ".join(key.choices)
    if key.low > -math.inf:
        values = f"at least {key.low:g}" if key.high == math.inf else f"{key.low:g} to {key.high:g}"
    may = ", ".join(name for name in ("resume", "ranks") if getattr(key, name))
    return f"  {setting:<46}  {values:<46}  {may}".rstrip()


def main(
    objective: str, arguments: list[str], *, task: Task = train, script: str | None = None, others: tuple[str, ...] = ()
) -> int:
    """What a script does: `task` with the settings of a run of `objective`, or of one of `others`; the exit code (see
    above)."""
    script = script or f"train_{objective}"
    flags = {word for word in arguments if word.startswith("-") and not word.startswith("--local_rank")}
    words = [word for word in arguments if not word.startswith("-")]
    if flags & {"-h", "--help"}:
        print(USAGE.format(script=script), describe_keys(), sep="\n\n")
        return OK
    unknown = flags - {"--check", "--print-config"}
    if not words or unknown:
        mistake = f"unknown flag {min(unknown)}" if unknown else "no CONFIG was given"
        print(f"error: {mistake}\n{USAGE.format(script=script)}", file=sys.stderr)
        return USAGE_ERROR
    from pivot.system import preemption  # here, and below: --help needs nothing installed

    with contextlib.nullcontext() if flags else preemption.listening():
        return _start(task, words, objective, others, flags)


def _start(task: Task, words: list[str], objective: str, others: tuple[str, ...], flags: set[str]) -> int:
    from pivot.config_load import load_config, to_yaml

    try:
        config = load_config(words[0], words[1:], objective, others=others)
    except Exception as error:
        return tell_error(error)
    if "--print-config" in flags:
        print(to_yaml(config), end="")
        return OK
    return _run(task, config, "--check" in flags)


def _run(task: Task, config: Config, check_only: bool) -> int:
    from pivot.system import distributed, preemption

    try:
        code = task(config, check_only)
    except preemption.Preempted as asked:  # training has said so itself
        print(f"stopped by {asked}; what is finished stays, the same command goes on", flush=True)
        code = AGAIN
    except Exception as error:
        code = tell_error(error)
    except KeyboardInterrupt:  # only --check dies of it
        code = INTERRUPTED
    distributed.stop(code)
    return code


def tell_error(error: Exception) -> int:
    """Print `error`, as one sentence where it is our own word to the user and with its traceback elsewhere."""
    from pivot.system.sentences import in_our_words

    rank = os.environ.get("RANK", "0")
    if in_our_words(error):
        _print_error(f"error: {error}" if rank == "0" else f"[rank {rank}] error: {error}")
        return USAGE_ERROR if isinstance(error, ValueError) else FAILED
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = error.filename or "output_dir or data.cache_dir"
        _print_error(f"error: {where}: {error.strerror}; free some, the same command goes on")
        return FAILED
    from pivot.system.distributed import is_echo

    if is_echo(error):  # of a rank that tells the whole, or is dead
        _print_error(f"[rank {rank}] {error}")
        return FAILED
    _print_error("".join(traceback.format_exception(error)).rstrip())
    return FAILED


def _print_error(text: str) -> None:
    from pivot.system.redact import tell

    tell(text, to=sys.stderr)
