"""What all ranks of a run must agree on before it starts: their settings."""

from __future__ import annotations

import hashlib

from pivot.config import KEYS, Config, ConfigError, flatten
from pivot.config_check import read_deepspeed_json
from pivot.system import distributed


def require_same_settings(config: Config) -> None:
    """ConfigError on every rank, naming key, ranks and values, unless all have the same settings. Collective.

    What each machine may have of its own (`ranks` in pivot/config.py) is not compared.
    """
    mine = {key: repr(value) for key, value in flatten(config).items() if not KEYS[key].ranks}
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
