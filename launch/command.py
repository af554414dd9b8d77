"""What the training scripts share: their command line, and errors that a user can act on."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a checkout works without being installed, also under the deepspeed launcher

USAGE = """usage: deepspeed launch/train_{objective}.py CONFIG [key=value ...] [--check | --print-config]

  CONFIG          the run's YAML; keys and defaults are in pivot/config.py
  key=value       overrides, for example optim.lr=1e-6
  --check         read settings and data, show what would run, load no weights
  --print-config  print the resolved settings"""

# Done; failed; for the user to mend; stopped by a signal (sysexits' EX_TEMPFAIL): the same command goes on.
OK, FAILED, USAGE_ERROR, AGAIN = 0, 1, 2, 75


def main(objective: str, arguments: list[str]) -> int:
    """Run the training script of `objective`; the exit code (0 done, see below)."""
    flags = {word for word in arguments if word.startswith("-") and not word.startswith("--local_rank")}
    words = [word for word in arguments if not word.startswith("-")]
    if flags & {"-h", "--help"}:
        print(USAGE.format(objective=objective))
        return OK
    unknown = flags - {"--check", "--print-config"}
    if not words or unknown:
        found = f"unknown flag {min(unknown)}" if unknown else "no CONFIG was given"
        print(f"error: {found}\n{USAGE.format(objective=objective)}", file=sys.stderr)
        return USAGE_ERROR
    from pivot.config_load import load_config, to_yaml  # here, so that --help needs nothing installed

    try:
        config = load_config(words[0], words[1:], objective)
        if "--print-config" in flags:
            print(to_yaml(config), end="")
            return OK
        from pivot import distributed, train

        try:
            status = train.train(config, check_only="--check" in flags)
        finally:
            distributed.stop()
        return AGAIN if status == train.PREEMPTED else OK
    except Exception as error:
        return report(error)


def report(error: Exception) -> int:
    """Print `error`, as one sentence where it is our own word to the user and with its traceback elsewhere."""
    rank = os.environ.get("RANK", "0")
    if isinstance(error, ValueError) and _raised_by_pivot(error):
        print(f"error: {error}" if rank == "0" else f"[rank {rank}] error: {error}", file=sys.stderr, flush=True)
        return USAGE_ERROR
    traceback.print_exception(error)
    sys.stderr.flush()
    return FAILED


def _raised_by_pivot(error: Exception) -> bool:
    *_, innermost = traceback.walk_tb(error.__traceback__)
    return Path(innermost[0].f_code.co_filename).resolve().is_relative_to(ROOT / "pivot")
