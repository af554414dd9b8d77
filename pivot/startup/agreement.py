"""What all ranks of a run must agree on before it starts: their settings."""

from __future__ import annotations

import hashlib

from pivot.config import Config, ConfigError
from pivot.config_check import read_deepspeed_json
from pivot.run.folder import flatten
from pivot.system import distributed

# What the machines of a run may have of their own: it decides no number, and no step waits for it elsewhere.
_FREE_ON_RANKS = ("data.workers", "data.cache_dir", "data.shard_cache", "data.shard_cache_gb")


def require_same_settings(config: Config) -> None:
    """ConfigError on every rank, naming key, ranks and values, unless all have the same settings. Collective."""
    mine = {key: repr(value) for key, value in flatten(config).items() if key not in _FREE_ON_RANKS}
    mine |= {f"deepspeed's {key}": repr(value) for key, value in read_deepspeed_json(config.deepspeed).items()}
    if len(set(distributed.gather(hashlib.sha256(repr(sorted(mine.items())).encode()).hexdigest()))) == 1:
        return
    ranks = distributed.gather(mine)
    differences = []
    for key in sorted(set().union(*ranks)):
        values = [rank.get(key, "absent") for rank in ranks]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            differences.append(f"{key} is {values[0]} on rank 0 and {values[other]} on rank {other}")
    more = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
    raise ConfigError(
        f"the ranks have different settings ({'; '.join(differences[:5])}{more}); start all of them with the same "
        "command line and the same files"
    )
