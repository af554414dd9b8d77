"""What grows with ranks and with data: `python benchmarks/scale.py [--ranks N ...] [--pairs N ...] [--batches N ...]`.

One process plays one rank of many. Sets are indexes without images, written here; checkpoints hold tiny shards. What is
measured is processor time of that one rank, what it opens and reads, and what it holds: no network, no shared disk and
no GPU is in it. docs/scale.md says what follows.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import numpy as np
import torch
import torch.distributed as dist
from data_loading import SAMPLES_PER_SHARD, write_large_set

from pivot.data.lengths import LENGTH_RECORD, LENGTHS_VERSION, Lengths, load_lengths
from pivot.data.plan import Plan, PlanSettings
from pivot.data.reference_cache import PAIR, ReferenceCache, record_of
from pivot.data.shards import ShardSet
from pivot.engine.files import MASTER, SavedShards, Write
from pivot.metrics import StepMetrics
from pivot.run import checkpoint
from pivot.system.distributed import World

Row = dict[str, Any]
CPU = torch.device("cpu")
IMAGE_TOKENS = 729
MAX_TOKENS, ROW_TOKENS = 4096, 8192
STEPS = 8  # that a figure of one step is taken from
FILES_PER_RANK = 3  # of a ZeRO-3 checkpoint: model states, optimizer states, random state


def cpu_s(run: Callable[[], Any], times: int = 1) -> float:
    """Seconds of processor time of one call: other jobs on the machine do not count."""
    start = time.process_time()
    for _ in range(times):
        run()
    return (time.process_time() - start) / times


def held_bytes(build: Callable[[], Any]) -> tuple[int, int]:
    """(what the result holds, the most that was held while it was built)."""
    tracemalloc.start()
    kept = build()
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del kept
    return held, peak


class Asked(NamedTuple):
    """What a file server is asked for."""

    opens: int
    stats: int


@contextmanager
def watched(asked: list[Asked]) -> Iterator[None]:
    """Append what this process opens and looks for inside."""
    counts = {"open": 0, "stat": 0}
    stat, watching = os.stat, [True]

    def hook(event: str, arguments: Sequence[Any]) -> None:
        if watching and event == "open" and isinstance(arguments[0], str | Path | bytes):
            counts["open"] += 1

    def count(*arguments: Any, **named: Any) -> Any:
        counts["stat"] += 1
        return stat(*arguments, **named)

    sys.addaudithook(hook)  # there is no way to remove one
    with mock.patch("os.stat", count):
        yield
    watching.clear()
    asked.append(Asked(counts["open"], counts["stat"]))


# -- sets ----------------------------------------------------------------------------------------------------------


def draw_lengths(pairs: int) -> np.ndarray:
    """LENGTH_RECORD[pairs]: an image each, prompts and answers as long as those of instruction data, log-normal."""
    random = np.random.default_rng(0)
    records = np.zeros(pairs, dtype=LENGTH_RECORD)
    records["image"] = IMAGE_TOKENS
    records["prompt"] = IMAGE_TOKENS + random.lognormal(3.5, 0.6, pairs).clip(5, 500)
    for role in ("chosen", "rejected"):
        records[role] = random.lognormal(5.0, 0.7, pairs).clip(2, 1500)
    records["image_prefix"], records["image_prefix_hash"] = IMAGE_TOKENS, random.integers(1, 1 << 62, pairs)
    return records


class OnlyAName:
    """Of a processor, what names the folder of its token counts."""

    fingerprint = "f" * 64


def write_side_cars(folder: Path, shards: ShardSet) -> None:
    lengths = folder / "lengths" / f"{OnlyAName.fingerprint[:16]}-{LENGTHS_VERSION}"
    references = folder / "ref" / OnlyAName.fingerprint[:16]
    records, scored = draw_lengths(len(shards)), np.zeros(len(shards), dtype=record_of(PAIR))
    for where, values in ((lengths, records), (references, scored)):
        where.mkdir(parents=True)
        for shard, first in zip(shards.shards, shards.first_rows, strict=False):
            np.save(where / f"{shard.name}.{shard.sha256[:16]}.npy", values[first : first + shard.samples])


def plan_of(lengths: Lengths, *, batch: int = 256, ranks: int = 1) -> Plan:
    shard_sizes = [SAMPLES_PER_SHARD] * (len(lengths) // SAMPLES_PER_SHARD)
    return Plan(
        PlanSettings(
            fingerprint="scale",
            shard_sizes=shard_sizes,
            lengths=lengths,
            seed=0,
            global_batch_size=batch,
            max_tokens=MAX_TOKENS,
            max_tokens_per_micro_batch=ROW_TOKENS,
            world_size=ranks,
            roles=PAIR,
        )
    )


def measure_set(folder: Path, pairs: int) -> list[Row]:
    """Per rank, whatever the number of ranks: all of them read all side-cars and build the same plan."""
    write_large_set(folder, pairs)
    shards = ShardSet.open(folder / "set")
    write_side_cars(folder, shards)
    asked: list[Asked] = []
    rows = []

    def note(what: str, run: Callable[[], Any], num_bytes: int, mapped: int = 0) -> None:
        with watched(asked):
            spent = cpu_s(run)
        held, peak = (size + mapped for size in held_bytes(run))
        rows.append(
            {"pairs": pairs, "what": what, "cpu_s": spent, **asked[-1]._asdict(), "read_mb": num_bytes / 1e6}
            | {"held_mb": held / 1e6, "peak_mb": peak / 1e6}
        )

    manifest = (folder / "set" / "manifest.json").stat().st_size
    index = shards.index.nbytes  # a block of its own, which tracemalloc does not see
    note("manifest and index", lambda: ShardSet.open(folder / "set"), manifest + index, index)
    processor: Any = OnlyAName()
    note("token counts", lambda: load_lengths(shards, processor, folder), pairs * LENGTH_RECORD.itemsize)
    fingerprint = OnlyAName.fingerprint
    note("reference", lambda: ReferenceCache(folder, fingerprint, shards), pairs * record_of(PAIR).itemsize)
    lengths = load_lengths(shards, processor, folder)
    note("plan", lambda: plan_of(lengths), 0)
    plan = plan_of(lengths)
    note("an epoch's order", lambda: plan.another().step_ids(0), 0)
    every = plan.another(limit=plan.num_pairs, window_shards=1)
    cache = ReferenceCache(folder, fingerprint, shards)
    note("references: none is missing", lambda: cache.first_missing(every), 0)
    return rows


# -- steps ---------------------------------------------------------------------------------------------------------


def measure_dealing(lengths: Lengths, batches: Sequence[int], ranks: Sequence[int]) -> list[Row]:
    rows = []
    for batch in batches:
        for count in ranks:
            plan = plan_of(lengths, batch=batch, ranks=count)
            steps = [plan.step(number) for number in range(STEPS)]
            spent = min(cpu_s(partial(plan.step, number)) for number in range(STEPS))  # others' jobs empty its cache
            worst = sum(1 / step.balance for step in steps) / STEPS
            num_rows = sum(step.num_micro_batches for step in steps) / STEPS
            rows.append(
                {"pairs a step": batch, "ranks": count, "cpu_ms": spent * 1e3, "max/mean": worst}
                | {"micro-batches": num_rows}
            )
    return rows


def measure_reduction(ranks: Sequence[int]) -> list[Row]:
    """What `StepMetrics.reduce` does on a rank beside the collective, which is played by a copy."""
    rows = []

    def gather(table: torch.Tensor, own: torch.Tensor) -> None:
        table.view(-1, len(own)).copy_(own)

    for count in ranks:
        sums = StepMetrics(World(0, count, CPU))
        sums.add({f"value{number}": torch.ones(()) for number in range(14)})
        sums.add(dict.fromkeys(("tokens", "flops", "wait_s", "peak_memory_gib", "masked", "save"), 1.0))
        with mock.patch("torch.distributed.all_gather_into_tensor", gather):
            spent = cpu_s(sums.reduce, 20)
        rows.append({"ranks": count, "cpu_ms": spent * 1e3, "gathered_kb": count * 20 * 8 / 1e3})
    return rows


def measure_gathers(ranks: Sequence[int], batch: int) -> list[Row]:
    """What `distributed.gather` costs the rank that receives: it unpickles N objects out of a table as wide as the
    largest. torch's own steps, without the collective."""
    rows = []
    for count in ranks:
        per_rank = max(1, batch // count)
        objects = {
            "shared_failure": None,
            "hashes of a save": {f"bf16_zero_pp_rank_{n}_optim_states.pt": {"bytes": 1 << 30, "sha256": "f" * 64}
                                 for n in range(FILES_PER_RANK)},
            "scored references": np.zeros(per_rank, dtype=[("row", "<i8"), ("record", record_of(PAIR))]),
        }  # fmt: skip
        for what, value in objects.items():
            own = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
            table = own.repeat(count, 1)
            spent = cpu_s(lambda table=table: [pickle.loads(row.numpy().tobytes()) for row in table], 3)
            rows.append({"what": what, "ranks": count, "cpu_ms": spent * 1e3, "received_kb": table.nbytes / 1e3})
    return rows


# -- checkpoints ---------------------------------------------------------------------------------------------------


class SmallShards:
    """An engine's side of a checkpoint of `ranks` ranks, whose files are nearly empty."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def save(self, folder: Path, tag: str, write: Write) -> None:
        for rank in range(self.ranks):
            for kind in ("model_states", "optim_states"):
                (folder / tag / f"zero_pp_rank_{rank}_mp_rank_00_{kind}.pt").write_bytes(b"x")
            (folder / tag / f"rank-{rank:05d}.pt").write_bytes(b"x")


def measure_checkpoints(folder: Path, ranks: Sequence[int]) -> list[Row]:
    """`checkpoint.find` by one rank of many: the listing, the manifest, and its share of the (tiny) files."""
    rows = []
    for count in ranks:
        where = folder / str(count)
        engine: Any = SmallShards(count)
        alone = World(0, 1, CPU)
        begun = checkpoint.begin(engine, where, 1, alone, state={}, facts={}, size_bytes=0)
        checkpoint.publish(begun, alone, keep=1, say=str)
        spent = cpu_s(lambda where=where, count=count: checkpoint.find(where, World(0, count, CPU), str))
        manifest = checkpoint.step_folder(where, 1) / checkpoint.MANIFEST
        rows.append(
            {"ranks": count, "files": count * FILES_PER_RANK, "manifest_kb": manifest.stat().st_size / 1e3}
            | {"find_cpu_ms": spent * 1e3, "entries listed by all": count * count * FILES_PER_RANK}
        )
    return rows


def write_zero3_shards(folder: Path, shapes: dict[str, tuple[int, ...]], ranks: int) -> None:
    """A checkpoint of one parameter group as DeepSpeed's ZeRO-3 lays it out; each value is its place in the group."""
    folder.mkdir(parents=True)
    parts = {name: -(-int(np.prod(shape)) // ranks) for name, shape in shapes.items()}
    starts = dict(zip(shapes, np.cumsum([0, *(int(np.prod(shape)) for shape in shapes.values())]), strict=False))
    model_states = {"param_shapes": [{name: torch.Size(shape) for name, shape in shapes.items()}], "module": {}}
    for rank in range(ranks):
        pieces = [starts[name] + torch.arange(rank * part, (rank + 1) * part) for name, part in parts.items()]
        flat = torch.cat(pieces).float()
        state = {"step": 3, "exp_avg": flat + 0.25, "exp_avg_sq": flat + 0.5}
        optimizer = {"fp32_flat_groups": [flat], "optimizer_state_dict": {"state": {0: state}}}
        torch.save(model_states, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        optim_states = folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": optimizer}, optim_states)


def measure_takeovers(folder: Path, ranks: Sequence[int], parameters: int) -> list[Row]:
    """A checkpoint of N ranks, read by one rank of N + 1: its own part, and what it would be to read all."""
    rows = []
    for count in ranks:
        write_zero3_shards(folder / str(count), {"weight": (parameters,)}, count)
        opened = cpu_s(lambda count=count: SavedShards(folder / str(count)))
        saved = SavedShards(folder / str(count))
        own = slice(0, -(-parameters // (count + 1)))

        def take(part: slice, saved: SavedShards = saved) -> int:
            return sum(saved.read("weight", kind, part).nbytes for kind in (MASTER, "exp_avg", "exp_avg_sq"))

        row: Row = {"ranks": count, "open_cpu_ms": opened * 1e3}
        for name, part in (("own", own), ("all", slice(None))):
            row |= {f"{name}_cpu_ms": cpu_s(partial(take, part)) * 1e3, f"{name}_mb": take(part) / 1e6}
        rows.append(row)
    return rows


# -- all of it -----------------------------------------------------------------------------------------------------


def measure(folder: Path, ranks: Sequence[int], pairs: Sequence[int], batches: Sequence[int], parameters: int) -> Any:
    """{table: rows}. The rank's process group is one of itself alone."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        lengths = Lengths.from_records(draw_lengths(max(200_000, *batches)))
        return {
            "a rank's start": [row for count in pairs for row in measure_set(folder / f"set-{count}", count)],
            "a step's plan": measure_dealing(lengths, batches, ranks),
            "a step's metrics": measure_reduction(ranks),
            "gathered objects": measure_gathers(ranks, max(batches)),
            "a checkpoint's way back": measure_checkpoints(folder / "checkpoints", ranks),
            "a takeover by other ranks": measure_takeovers(folder / "shards", ranks, parameters),
        }
    finally:
        dist.destroy_process_group()


def show(title: str, rows: list[Row]) -> str:
    """A table in Markdown."""
    names = list(rows[0])
    cells = [
        [f"{row[name]:,.4g}" if isinstance(row[name], float) else f"{row[name]}" for name in names] for row in rows
    ]
    lines = [f"## {title}", "", *(f"| {' | '.join(line)} |" for line in (names, ["---"] * len(names), *cells))]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 8, 64, 512, 4096])
    parser.add_argument("--pairs", type=int, nargs="+", default=[20_000, 200_000, 3_200_000], help="of a set")
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1024, 4096], help="pairs a step")
    parser.add_argument("--parameters", type=int, default=16_000_000, help="of a checkpoint that others take over")
    parser.add_argument("--json", type=Path, help="write everything here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.ranks, options.pairs, options.batches, options.parameters)
    for title, rows in found.items():
        print(show(title, rows))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
