"""`pack --shuffle`: a set whose samples lie in a drawn order, for readers that only read shards from front to back.

It is packed beside its place first and copied from there by the index, so for a while it lies on the disk twice. Both
halves go on after a kill.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from data_tools.copying import Choice, copy_samples
from data_tools.draw import shuffled
from data_tools.pack import PackOptions, PackResult, Tally, check_unchanged, identity, pack
from pivot.data.shards import Shard, ShardSet


def pack_shuffled(
    options: PackOptions,
    seed: int,
    progress: Callable[[Tally], None] = lambda tally: None,
    copied: Callable[[int, int], None] = lambda done, total: None,
) -> PackResult:
    """`pack`, then the samples in the order that their keys and `seed` give; stats.json is that of the pack."""
    staged = options.out.absolute().with_name(f"{options.out.absolute().name}-unshuffled")
    made_by = {"command": "pack", "shuffle_seed": seed}
    manifest = options.out / "manifest.json"
    if manifest.is_file():
        result = _finished(json.loads(manifest.read_text()), options, made_by)
    else:
        result = pack(replace(options, out=staged), progress)
        if not result.complete:
            return result
        shards = ShardSet.open(staged)
        choice = Choice(
            folders=(str(staged),),
            rows=shuffled(shards.index["key_hash"], seed),
            name=shards.name,
            made_by=made_by,
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


def _finished(manifest: dict[str, Any], options: PackOptions, made_by: dict[str, Any]) -> PackResult:
    found, wanted = (manifest.get("made_by"), manifest.get("packed_with")), (made_by, identity(options))
    if found != wanted:
        raise ValueError(f"{options.out} holds a set made otherwise ({found}, not {wanted}); choose another --out")
    tally = Tally(**manifest["tally"])
    check_unchanged(options, tally)
    return PackResult(tally, [Shard(**entry) for entry in manifest["shards"]], complete=True)
