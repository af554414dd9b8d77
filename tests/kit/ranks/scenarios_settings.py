"""What a built engine holds of each file in ds_configs/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pivot.config import COMPONENTS, REPOSITORY
from tests.kit.ranks.scenarios import build, optim_config

DECAYS = dict(zip(COMPONENTS, (0.1, 0.0, 0.01), strict=True))
CLIPPING = 0.7


def built(folder: Path) -> None:
    """The offloading ones are compiled, which takes a minute: only where the file `all` lies there."""
    found: dict[str, Any] = {}
    for path in sorted((REPOSITORY / "ds_configs").glob("*.json")):
        settings = json.loads(path.read_text())
        stage = settings["zero_optimization"]["stage"]
        if "offload" in path.name and not (folder / "all").exists():
            continue
        for bf16 in (False, True) if stage else (False,):
            optim = optim_config("adamw", max_grad_norm=CLIPPING, decays=DECAYS)
            engine, _ = build(folder / "llava", path.stem.removeprefix("zero"), optim, bf16=bf16)
            own = engine._engine
            engine._set_rates(0)
            found[f"{path.stem}-{bf16}"] = {
                "stage": own.zero_optimization_stage(),
                "clipping": own.gradient_clipping(),
                "accumulation": own.gradient_accumulation_steps(),
                "types": [str(one) for one in own.get_data_types()],
                "communication": str(own.communication_data_type),
                "groups": [[g["component"], g["lr"], g["weight_decay"]] for g in own.optimizer.param_groups],
                "offload": "CPUAdam" in type(engine._optimizer).__name__,
            }
    (folder / "built.json").write_text(json.dumps(found))
