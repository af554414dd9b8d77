"""Compare kinds of training fairly: each arm's settings are chosen on one held-out set and reported on another.

    python launch/fair.py sft=sft.yaml dpo=dpo.yaml --grid optim.lr=1e-6,2e-6,5e-6 --choose-on SET --report-on SET \\
        --seeds 11,12,13 --out DIR [key=value ...]

First every arm trains with every value of the grid (as many runs for each arm) and seed --choose-seed, and the best by
--by on --choose-on is written to DIR/chosen.json. Only then each arm trains with its choice and fresh seeds, and
DIR/table.md compares the arms on --report-on, paired by seed. `--grid ARM:KEY=V,V` gives an arm values of its own; all
grids must have equally many. The same command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from command import OK, tell_error
from sweep import Cell, make_cells, parse_grid, run_all


def parse_arms(texts: list[str]) -> dict[str, Path]:
    """`sft=sft.yaml` -> {"sft": Path("sft.yaml")}."""
    arms: dict[str, Path] = {}
    for text in texts:
        name, sign, path = text.partition("=")
        if not sign or not name.isidentifier() or not path:
            raise ValueError(f"{text}: expected ARM=CONFIG, for example dpo=runs/dpo.yaml, the arm a plain word")
        if name in arms:
            raise ValueError(f"{text}: the arm {name} is named twice")
        arms[name] = Path(path)
    if len(arms) < 2:
        raise ValueError("give at least two arms to compare, for example sft=sft.yaml dpo=dpo.yaml")
    return arms


def grids_of(arms: dict[str, Path], texts: list[str]) -> dict[str, dict[str, list[str]]]:
    """Each arm's grid: what is given for it (`ARM:KEY=V,V`), and what is given for all."""
    for text in texts:
        arm, sign, _ = text.partition("=")[0].partition(":")
        if sign and arm not in arms:
            raise ValueError(f"--grid {text}: there is no arm {arm}; the arms are {', '.join(arms)}")
    grids = {}
    for arm in arms:
        own = [text.removeprefix(f"{arm}:") for text in texts if text.startswith(f"{arm}:")]
        shared = [text for text in texts if ":" not in text.partition("=")[0]]
        grids[arm] = parse_grid(own + shared)
        if "train.seed" in grids[arm]:
            raise ValueError("--grid train.seed: seeds are not chosen; they are given by --seeds and --choose-seed")
    sizes = {arm: len(make_cells(grid, Path())) for arm, grid in grids.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{arm} {size}" for arm, size in sizes.items())
        raise ValueError(f"--grid: the arms get unequally many tries ({told}); give each as many values")
    return grids


def require_apart(choose_on: str, report_on: str, seeds: list[str], choose_seed: str) -> None:
    """ValueError where what is reported was looked at while choosing."""
    from pivot.data.shards import ShardSet

    sets = [ShardSet.open(path) for path in (choose_on, report_on)]
    if sets[0].fingerprint == sets[1].fingerprint:
        raise ValueError(
            f"--choose-on {choose_on} and --report-on {report_on} hold the same samples; split the held-out set in two "
            "(python -m data_tools split)"
        )
    if len(set(seeds)) < len(seeds) or choose_seed in seeds:
        raise ValueError(
            f"--seeds {','.join(seeds)}: expected seeds that differ from each other and from {choose_seed}"
        )


def choose(cells: list[Cell], by: str) -> tuple[Cell, dict[str, float]]:
    """The cell with the highest last held-out value of the metric `by` (of eval/loss the lowest), and all values."""
    from pivot.report.read import read_run

    scores = {}
    for cell in cells:
        values = read_run(cell.folder).series(by, held_out=True)[1]
        if not values:
            raise ValueError(f"--by {by}: {cell.folder} did not measure it; its log names what there is")
        scores[cell.folder.name] = values[-1]
    sign = -1.0 if by.endswith("loss") else 1.0
    return max(cells, key=lambda cell: sign * scores[cell.folder.name]), scores


def compare_fairly(options: argparse.Namespace) -> int:
    from pivot.config_load import load_config
    from pivot.objectives import objective_class
    from pivot.report.sweep import write_tables
    from pivot.system.files import write_json

    arms, seeds = parse_arms(options.arms), options.seeds.split(",")
    overrides = [text for text in options.overrides if text]
    grids = grids_of(arms, options.grid)
    require_apart(options.choose_on, options.report_on, seeds, options.choose_seed)
    scripts = {}
    for arm, path in arms.items():
        config = load_config(str(path), [*overrides, "output_dir=unused"])
        scripts[arm] = f"train_{objective_class(config.objective).name}.py"
    choosing = {arm: make_cells(grid, options.out / "choose" / arm) for arm, grid in grids.items()}
    fixed = [f"data.eval={options.choose_on}", f"train.seed={options.choose_seed}"]
    for arm, cells in choosing.items():
        code = run_all(cells, scripts[arm], arms[arm], [*overrides, *fixed])
        if code != OK:
            return code
    chosen: dict[str, Any] = {}
    reporting: list[tuple[str, Cell]] = []
    for arm, cells in choosing.items():
        best, scores = choose(cells, options.by)
        chosen[arm] = {"values": best.values, "by": options.by, "on": options.choose_on, "scores": scores}
        seeded = [
            Cell({**best.values, "train.seed": seed}, options.out / "report" / f"{arm},seed={seed}") for seed in seeds
        ]
        reporting += [(arm, cell) for cell in seeded]
    write_json(options.out / "chosen.json", chosen)
    print(f"\nchosen     {json.dumps({arm: entry['values'] for arm, entry in chosen.items()})}", flush=True)
    for arm in arms:
        cells = [cell for name, cell in reporting if name == arm]
        code = run_all(cells, scripts[arm], arms[arm], [*overrides, f"data.eval={options.report_on}"])
        if code != OK:
            return code
    rows = [({"arm": arm, "train.seed": cell.values["train.seed"]}, cell.folder) for arm, cell in reporting]
    print("\n" + write_tables(rows, options.out))
    return OK


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fair.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "words", nargs="+", metavar="ARM=CONFIG or key=value", help="arms are plain words; keys have dots"
    )
    parser.add_argument("--grid", action="append", required=True, metavar="[ARM:]KEY=V,V")
    parser.add_argument("--choose-on", required=True, metavar="SET")
    parser.add_argument("--report-on", required=True, metavar="SET")
    parser.add_argument("--seeds", required=True, metavar="N,N", help="for the runs that are reported")
    parser.add_argument("--choose-seed", default="0", metavar="N")
    parser.add_argument("--by", default="eval/preference_accuracy", metavar="METRIC", help="%(default)s")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    options = parser.parse_intermixed_args(arguments)
    options.arms = [word for word in options.words if "." not in word.partition("=")[0]]
    options.overrides = [word for word in options.words if word not in options.arms]
    try:
        return compare_fairly(options)
    except Exception as error:
        return tell_error(error)


if __name__ == "__main__":
    from pivot.system.process import leave

    leave(main(sys.argv[1:]))
