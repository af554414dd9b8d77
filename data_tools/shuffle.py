"""`pack --shuffle`: a set whose samples lie in a drawn order, for readers that only read shards from front to back.

It is packed beside its place first and copied from there by the index, so for a while it lies on the disk twice. Both
halves go on after a kill.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_tools.copying import Choice, copy_samples
from data_tools.draw import shuffled
from data_tools.journal import Journal, require_files
from data_tools.pack import PackOptions, PackResult, Tally, check_unchanged, identity, pack, try_pack
from pivot.data.manifest import Shard
from pivot.data.shards import ShardSet


def pack_shuffled(
    options: PackOptions,
    seed: int,
    progress: Callable[[Tally], None] = lambda tally: None,
    copied: Callable[[int, int], None] = lambda done, total: None,
) -> PackResult:
    """`pack`, then the samples in the order that their keys and `seed` give; stats.json is that of the pack."""
    staged, result = _staged(options), _finished(options, seed)
    if result is None:
        result = pack(replace(options, out=staged), progress)
        if not result.complete:
            return result
        shards = ShardSet.open(staged)
        choice = Choice(
            folders=(str(staged),),
            rows=shuffled(shards.index["key_hash"], seed),
            name=shards.name,
            made_by=_made_by(seed),
            samples_per_shard=options.samples_per_shard,
            bytes_per_shard=options.bytes_per_shard,
            facts={name: shards.manifest[name] for name in ("drops", "tally")} | {"packed_with": identity(options)},
        )
        copied_shards = copy_samples(choice, options.out, workers=options.workers, progress=copied)
        result = PackResult(result.tally, copied_shards, complete=True)
    if staged.is_dir():
        shutil.copyfile(staged / "stats.json", options.out / "stats.json")
        shutil.rmtree(staged)
    return result


def try_pack_shuffled(
    options: PackOptions, seed: int, progress: Callable[[Tally], None] = lambda tally: None
) -> tuple[Tally, int]:
    """`try_pack` for `pack_shuffled`."""
    result = _finished(options, seed)
    if result is None:
        return try_pack(replace(options, out=_staged(options)), progress)
    return result.tally, sum(shard.bytes for shard in result.shards)


def _staged(options: PackOptions) -> Path:
    out = options.out.absolute()
    return out.with_name(f"{out.name}-unshuffled")


def _made_by(seed: int) -> dict[str, Any]:
    return {"command": "pack", "shuffle_seed": seed}


def _finished(options: PackOptions, seed: int) -> PackResult | None:
    """What an earlier run made to its end. Raises ValueError when --out holds something else, before hours of work."""
    path = options.out / "manifest.json"
    if not path.is_file():
        Journal(options.out, {"made_by": _made_by(seed)}).look()
        return None
    manifest = json.loads(path.read_text())
    packed_with = {"share": None} | (manifest.get("packed_with") or {})  # there were no shares at first
    made, wanted = (manifest.get("made_by"), packed_with), (_made_by(seed), identity(options))
    if made != wanted:
        raise ValueError(f"{options.out} holds a set made otherwise ({made}, not {wanted}); choose another --out")
    tally, shards = Tally(**manifest["tally"]), [Shard(**entry) for entry in manifest["shards"]]
    require_files(options.out, shards)
    check_unchanged(options, tally)
    return PackResult(tally, shards, complete=True)
