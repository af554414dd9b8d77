"""What HF LLaVA cannot express goes out in parts, and comes back as the same model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pivot.config import Config, ModelConfig, VisionTowerConfig
from pivot.models.build import resolve_sources
from pivot.models.parts import write_model
from tests.kit.parts import CASES, build, config_of, score


@pytest.mark.parametrize("case", CASES)
def test_round_trip_gives_the_same_log_probs(case: str, tmp_path: Path) -> None:
    config = config_of(case, tmp_path)
    model, processor = build(config)
    write_model(tmp_path / "export", model, model.state_dict(), processor)
    assert "not_llava_because" in json.loads((tmp_path / "export" / "parts.json").read_text())

    model_section = ModelConfig(VisionTowerConfig(post_norm="post_norm" in case), config.model.projector)
    again, same_processor = build(Config(output_dir="unused", init_from=str(tmp_path / "export"), model=model_section))
    assert torch.equal(score(model, processor), score(again, same_processor))
    before, after = model.vision_tower.set_aside, again.vision_tower.set_aside
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("case, was_open_clip", [("open_clip", True), ("post_norm", False)])
def test_folders_are_read_that_were_written_when_there_were_two_libraries(
    case: str, was_open_clip: bool, tmp_path: Path
) -> None:
    config = config_of(case, tmp_path)
    model, processor = build(config)
    write_model(tmp_path / "export", model, model.state_dict(), processor)
    facts = json.loads((tmp_path / "export" / "parts.json").read_text())
    assert facts.pop("library") == ("open_clip" if was_open_clip else "transformers")
    (tmp_path / "export" / "parts.json").write_text(json.dumps(facts | {"open_clip": was_open_clip}))
    model_section = ModelConfig(VisionTowerConfig(post_norm=case == "post_norm"), config.model.projector)
    again, _ = build(Config(output_dir="unused", init_from=str(tmp_path / "export"), model=model_section))
    assert torch.equal(score(model, processor), score(again, processor))


def test_a_library_of_another_release_is_named(tmp_path: Path) -> None:
    facts = {"library": "fourth", "projector": "mlp2x_gelu", "layer": -2, "post_norm": False, "cls": "drop"}
    (tmp_path / "parts.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="its encoder is of fourth; this release has transformers, open_clip"):
        resolve_sources(Config(output_dir="unused", init_from=str(tmp_path)))


def test_other_features_are_refused(tmp_path: Path) -> None:
    model, processor = build(config_of("linear", tmp_path))
    write_model(tmp_path / "export", model, model.state_dict(), processor)
    with pytest.raises(ValueError, match=r"model.projector: mlp2x_gelu, but .* was made with linear"):
        resolve_sources(Config(output_dir="unused", init_from=str(tmp_path / "export")))
