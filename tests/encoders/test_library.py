"""A library of encoders is one file and one line: a third one is known to nothing but the dict, and all works."""

from __future__ import annotations

import json
import subprocess
import sys
from inspect import signature
from pathlib import Path

import pytest
import torch

from pivot.config import COMPONENTS, Config, LanguageModelConfig, ModelConfig, VisionTowerConfig
from pivot.encoders.library import LIBRARIES, EncoderLibrary, name_library, require_same_network, resolve_encoder
from pivot.encoders.tower import build_vision_tower
from pivot.evaluate.load import find_export, load_export
from pivot.models.build import resolve_sources, weights_fingerprint
from pivot.models.parts import is_model, write_model
from pivot.models.skeleton import build_skeleton
from pivot.startup.flops import training_costs
from tests.kit import third_library, tiny
from tests.kit.commands import ROOT, rank_free_environment
from tests.kit.parts import build, score
from tests.kit.sets import make_set

CPU = torch.device("cpu")


@pytest.fixture
def third(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIBRARIES, "third", third_library)


def config_of(folder: Path, *, post_norm: bool = False) -> Config:
    tower = VisionTowerConfig(path=third_library.write_config(folder / "third.json"), post_norm=post_norm)
    language = LanguageModelConfig(str(tiny.tiny_language_model(folder / "language")))
    return Config(output_dir="unused", model=ModelConfig(tower, "mlp2x_gelu", language))


def test_a_path_belongs_to_the_library_that_it_begins_with(third: None) -> None:
    paths = ("third:x", "open_clip:ViT-B-32@tag", "folder", "owner/name", "fourth:x", "third", "open_clip/x")
    names = ("third", "open_clip", "transformers", "transformers", "transformers", "transformers", "transformers")
    assert tuple(map(name_library, paths)) == names
    with pytest.raises(ValueError, match="absent; give a folder, .* or open_clip:MODEL or timm:MODEL or third:MODEL"):
        resolve_encoder(VisionTowerConfig())


@pytest.mark.parametrize("post_norm", [False, True])
def test_a_third_library_trains_and_comes_back_from_its_export(third: None, tmp_path: Path, post_norm: bool) -> None:
    """One step moves every parameter before the feature layer and none behind it; the export is the moved model."""
    config = config_of(tmp_path, post_norm=post_norm)
    model, processor = build(config)
    tower = model.vision_tower
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    aside = {name: value.clone() for name, value in tower.set_aside.items()}
    assert {name.split(".")[0] for name in aside} == {"blocks", "head"} | ({"norm"} if not post_norm else set())

    model.enable_activation_checkpointing("full")
    optimizer = torch.optim.SGD(tower.parameters(), lr=0.1)
    with torch.enable_grad():
        tower(tiny.random_images(2)).pow(2).mean().backward()
    optimizer.step()
    assert not any(torch.equal(value, before[name]) for name, value in tower.state_dict().items())

    write_model(tmp_path / "export", model, model.state_dict(), processor)
    facts = json.loads((tmp_path / "export" / "parts.json").read_text())
    assert facts["library"] == "third" and "the third encoder" in facts["not_llava_because"]
    assert is_model(tmp_path / "export")
    loaded = load_export(find_export(tmp_path / "export")[0], CPU)
    assert loaded.processor.fingerprint == processor.fingerprint
    assert torch.equal(score(loaded.model.eval(), loaded.processor), score(model, processor))
    assert all(torch.equal(value, aside[name]) for name, value in loaded.model.vision_tower.set_aside.items())


def test_a_third_library_is_counted_and_fingerprinted(third: None, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    sources = resolve_sources(config)
    skeleton = build_skeleton(sources.model, 300, sources.encoder)
    built = build_vision_tower(sources.encoder, dtype=torch.float32)
    shapes = {name: p.shape for name, p in skeleton.vision_tower.named_parameters()}
    assert shapes == {name: p.shape for name, p in built.named_parameters()}
    assert len(skeleton.encoder_blocks()) == 2
    assert training_costs(skeleton, COMPONENTS)
    fingerprint = weights_fingerprint(sources, seed=0)
    assert fingerprint == weights_fingerprint(resolve_sources(config), seed=0)
    assert fingerprint != weights_fingerprint(sources, seed=1)  # its weights are drawn
    settings = third_library.SETTINGS | {"depth": 4}
    (tmp_path / "third.json").write_text(json.dumps(settings))
    assert fingerprint != weights_fingerprint(resolve_sources(config), seed=0)


def test_encoders_of_two_libraries_are_two_networks(third: None, tmp_path: Path) -> None:
    path = third_library.write_config(tmp_path / "third.json")
    folder = str(tiny.tiny_vision_tower(tmp_path / "siglip"))
    require_same_network(path, path)
    with pytest.raises(ValueError, match="has library third, but init_from .* has transformers; leave the path out"):
        require_same_network(path, folder)
    with pytest.raises(ValueError, match="has library open_clip, but"):
        require_same_network("open_clip:ViT-B-32", folder)
    wider = str(tiny.tiny_vision_tower(tmp_path / "wider", hidden_size=64))
    with pytest.raises(ValueError, match="has hidden_size 64, but init_from .* has 32"):
        require_same_network(wider, folder)


def test_each_library_has_the_functions_of_the_protocol() -> None:
    """mypy says so too, but a test double is not type-checked."""
    for name in (name for name in vars(EncoderLibrary) if not name.startswith("_")):
        _, *parameters = signature(getattr(EncoderLibrary, name)).parameters
        for library in (*LIBRARIES.values(), third_library):
            assert [*signature(getattr(library, name)).parameters] == parameters, name


RUN = """
import sys
sys.path.insert(0, "launch")
from command import main
from pivot.encoders.library import LIBRARIES
from pivot.system.process import leave
from tests.kit import third_library
LIBRARIES["third"] = third_library
leave(main("dpo", sys.argv[1:]))
"""
SETTINGS = """
output_dir: {folder}/run
model: {{vision_tower: {{path: "{encoder}"}}, language_model: {{path: {folder}/language}}}}
data: {{train: {folder}/set, cache_dir: {folder}/cache, workers: 0}}
objective: {{dpo: {{}}}}
optim: {{vision_tower: {{lr: 1e-2}}, projector: {{lr: 1e-3}}, language_model: {{lr: 1e-4}}}}
train: {{global_batch_size: 4, max_steps: 2}}
"""


@pytest.mark.slow
def test_a_whole_run_with_a_third_library(third: None, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    make_set(tmp_path)
    (tmp_path / "run.yaml").write_text(SETTINGS.format(folder=tmp_path, encoder=config.model.vision_tower.path))
    command = [sys.executable, "-c", RUN, str(tmp_path / "run.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, env=rank_free_environment())
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert all(row["update_ratio/vision_tower"] > 0 for row in rows if "loss" in row)
    loaded = load_export(find_export(tmp_path / "run")[0], CPU)
    assert score(loaded.model.eval(), loaded.processor).isfinite().all()
