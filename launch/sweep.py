"""Train a run with several values of some keys, and put what came out into one table.

    python launch/sweep.py CONFIG --grid optim.lr=1e-6,5e-6 --grid train.seed=1,2,3 [key=value ...]
    python launch/sweep.py CONFIG --grid ... --slurm="--nodes=2"     # submit them as an array instead
    python launch/sweep.py CONFIG --grid ... --table                 # only the table of what is there
    python launch/sweep.py --compare RUN RUN                         # what two runs differ in: settings, samples, steps

One after the other on this machine (NPROC processes each). The same command goes on; runs that are done stay.
DIR (by default the config's output_dir with `-sweep` behind it) gets a folder a run, table.csv, table.md and table.png.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from command import AGAIN, FAILED, INTERRUPTED, OK, ROOT, tell_error
from local import run_to_end

SHOWN = re.compile(r"[^A-Za-z0-9._=,+-]+")  # what a folder's name does not hold


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    values: dict[str, str]  # key -> its value, as in the words of a command line
    folder: Path

    def words(self) -> list[str]:
        return [*(f"{key}={value}" for key, value in self.values.items()), f"output_dir={self.folder}"]


def parse_grid(texts: list[str]) -> dict[str, list[str]]:
    """`optim.lr=1e-6,5e-6` -> {"optim.lr": ["1e-6", "5e-6"]}. A comma inside of brackets or braces parts nothing."""
    grid: dict[str, list[str]] = {}
    for text in texts:
        key, sign, values = text.partition("=")
        parts = _split_values(values)
        if not sign or not key or not all(parts):
            raise ValueError(f"--grid {text}: expected KEY=VALUE,VALUE,..., for example optim.lr=1e-6,5e-6")
        if key in grid:
            raise ValueError(f"--grid {key} is given twice; write all its values in one, with commas")
        if key == "output_dir":
            raise ValueError("--grid output_dir: each run gets a folder of its own; leave it out")
        if len(set(parts)) < len(parts):
            raise ValueError(f"--grid {text}: a value stands there twice, which would be one run")
        grid[key] = parts
    return grid


def _split_values(text: str) -> list[str]:
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def make_cells(grid: dict[str, list[str]], folder: Path) -> list[Cell]:
    """Every combination, the last key changing fastest."""
    cells = []
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        name = SHOWN.sub("_", ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in chosen.items()))
        cells.append(Cell(chosen, folder / name))
    names = [cell.folder.name for cell in cells]
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None:
        raise ValueError(
            f"--grid: two runs would have the folder {doubled}; give values that differ in letters or digits"
        )
    return cells


def run_all(cells: list[Cell], script: str, config: Path, overrides: list[str]) -> int:
    """Train what is not done yet. A run that fails is named and the others go on; a signal ends all."""
    worst = OK
    for number, cell in enumerate(cells, 1):
        title = f"{number} of {len(cells)}: {cell.folder}"
        code = run_to_end(title, script, [str(config), *overrides, *cell.words()], cell.folder)
        if code in (INTERRUPTED, AGAIN):
            return code
        worst = max(worst, code)
    return worst


def submit(cells: list[Cell], script: str, config: Path, overrides: list[str], options: str, folder: Path) -> int:
    """Submit an array with a task for each run; those that are done end at once."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / "grid.txt"
    lines.write_text("".join(shlex.join(cell.words()) + "\n" for cell in cells), encoding="utf-8")
    command = ["sbatch", f"--array=1-{len(cells)}", *shlex.split(options), "launch/slurm/sweep.sbatch", str(lines)]
    command += [f"launch/{script}", str(config), *overrides]
    print(f"$ {shlex.join(command)}", flush=True)
    try:
        return subprocess.run(command, cwd=ROOT, check=False).returncode
    except FileNotFoundError:
        print("error: there is no sbatch here; submit it on a login node of the cluster", file=sys.stderr)
        return FAILED


def sweep(options: argparse.Namespace) -> int:
    from pivot.config_load import load_config
    from pivot.objectives import objective_class
    from pivot.report.sweep import write_tables

    grid, overrides = parse_grid(options.grid), options.overrides
    config = load_config(str(options.config), overrides)
    folder = options.out or Path(config.output_dir.rstrip("/") + "-sweep")
    cells = make_cells(grid, folder)
    for cell in cells:  # all of them before the first trains
        load_config(str(options.config), [*overrides, *cell.words()])
    script = f"train_{objective_class(config.objective).name}.py"
    if options.slurm is not None:
        return submit(cells, script, options.config, overrides, options.slurm, folder)
    code = OK if options.table else run_all(cells, script, options.config, overrides)
    if any((cell.folder / "log.jsonl").is_file() for cell in cells):
        print("\n" + write_tables([(cell.values, cell.folder) for cell in cells], folder))
    return code


def compare(one: Path, other: Path) -> int:
    """OK where the two runs differ in nothing; FAILED where they do, and it is said."""
    from pivot.report.differences import describe_differences

    lines = describe_differences(one, other)
    print("\n".join(lines) if lines else "they differ in nothing: settings, samples of each step, number of steps")
    return FAILED if lines else OK


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="sweep.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, nargs="?", metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--grid", action="append", default=[], metavar="KEY=V,V", help="values of a key; may be repeated"
    )
    parser.add_argument("--out", type=Path, metavar="DIR")
    parser.add_argument("--slurm", metavar="OPTIONS", help="of sbatch, '' for none: submit an array")
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--compare", type=Path, nargs=2, metavar="RUN")
    options = parser.parse_intermixed_args(arguments)
    if options.compare is None and (options.config is None or not options.grid):
        parser.error("give CONFIG and at least one --grid, or --compare RUN RUN")
    try:
        return sweep(options) if options.compare is None else compare(*options.compare)
    except Exception as error:
        return tell_error(error)


if __name__ == "__main__":
    from pivot.system.process import leave

    leave(main(sys.argv[1:]))
