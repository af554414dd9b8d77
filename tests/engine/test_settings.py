"""Each file in ds_configs/ as the engine that is built from it holds it, and what DeepSpeed may compile, and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pivot.config import COMPONENTS, REPOSITORY, ConfigError
from pivot.engine.settings import compiling, require_settings
from tests.kit.ranks import run_ranks
from tests.kit.ranks.scenarios import ADAM_RATES
from tests.kit.ranks.scenarios_settings import CLIPPING, DECAYS
from tests.kit.tiny import tiny_llava


@pytest.fixture(scope="module", params=["plain", pytest.param("offloading", marks=pytest.mark.slow)])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("built")
    tiny_llava(folder / "llava")
    if request.param == "offloading":
        (folder / "all").touch()
    run_ranks("tests.kit.ranks.scenarios_settings:built", 1, folder, limit_s=280)
    return json.loads((folder / "built.json").read_text())


def test_a_built_engine_holds_what_was_asked_for(built: dict[str, dict[str, Any]]) -> None:
    """Stage, clipping, sums, precision of weights, sums and messages, and each component's rate and decay."""
    files = {name.rpartition("-")[0] for name in built}
    assert files >= {path.stem for path in (REPOSITORY / "ds_configs").glob("*.json") if "offload" not in path.name}
    for name, held in built.items():
        weights = "torch.bfloat16" if name.endswith("True") else "torch.float32"
        assert held["stage"] == int(name[4]), name
        assert (held["clipping"], held["accumulation"]) == (CLIPPING, 1), name
        assert held["types"] == [weights, "torch.float32"] and held["communication"] == "torch.float32", name
        assert held["groups"] == [[part, ADAM_RATES[part], DECAYS[part]] for part in COMPONENTS], name
        assert held["offload"] == ("offload" in name), name


class Held:
    """An engine that holds other things than it was asked to."""

    def __init__(self, **changes: Any) -> None:
        self._changes = changes

    def __getattr__(self, name: str) -> Any:
        import torch

        own = {"zero_optimization_stage": 2, "gradient_clipping": 1.0, "gradient_accumulation_steps": 1}
        own |= {"get_data_types": (torch.float32, torch.float32), "checkpoint_tag_validation_fail": True}
        own |= {"communication_data_type": torch.float32}
        value = (own | self._changes)[name]
        return value if name == "communication_data_type" else lambda: value


ASKED = {"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0, "bf16": {"enabled": False}}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"zero_optimization_stage": 1}, "zero_optimization.stage"),
        ({"gradient_clipping": 0.0}, "gradient_clipping"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps"),
        ({"communication_data_type": None}, "communication_data_type"),
        ({"checkpoint_tag_validation_fail": False}, "checkpoint.tag_validation"),
    ],
)
def test_a_setting_that_deepspeed_dropped_is_an_error(changes: dict[str, Any], key: str) -> None:
    require_settings(Held(), ASKED)
    with pytest.raises(RuntimeError, match=f"DeepSpeed holds {key} = .*, expected .*; write it in the JSON"):
        require_settings(Held(**changes), ASKED)


def test_what_everybody_may_write_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S14."""
    folder = tmp_path / "extensions"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
    with compiling("offload_optimizer"):  # which makes it
        folder.mkdir(mode=0o755)
    with compiling("offload_optimizer"):
        pass
    folder.chmod(0o1777)
    refused = pytest.raises(ConfigError, match=f"everybody may write into {folder}, and what lies there would be run")
    with refused, compiling("offload_optimizer"):
        pytest.fail("it was loaded")
    folder.chmod(0o755)


def test_an_absent_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with pytest.raises(RuntimeError, match="^something else$"), compiling("offload_optimizer"):
        raise RuntimeError("something else")
    monkeypatch.setenv("CXX", "no-such-compiler")
    refused = pytest.raises(ConfigError, match="offload_optimizer needs a C.. compiler .* no-such-compiler is not on")
    with refused, compiling("offload_optimizer"):
        raise RuntimeError("ninja: error")
