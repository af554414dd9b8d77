"""What a folder from elsewhere says beyond the network: nothing of it is followed in silence."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from pivot.config import Config, DataConfig
from pivot.config_load import read_settings
from pivot.evaluate.load import load_export
from pivot.models.build import build_mllm, resolve_sources
from pivot.models.language import check_positions
from pivot.models.parts import write_model
from pivot.models.skeleton import build_skeleton
from pivot.processor import build_processor
from tests.kit import tiny
from tests.kit.answered import make_answered_set
from tests.kit.commands import ROOT, rank_free_environment
from tests.kit.parts import build, config_of

RUN = (
    "output_dir: o\ninit_from: i\ndata: {train: %s}\nobjective: {dpo: {}}\n"
    "train: {global_batch_size: 4, max_steps: 1}\n"
    "optim: {vision_tower: {lr: 1e-4}, projector: {lr: 1e-3}, language_model: {lr: 1e-5}}\n"
)


@pytest.mark.parametrize("text", [r"a${oc.env:SECRET}", r"a\${oc.env:SECRET}", r"a\\${oc.env:SECRET}"])
def test_no_number_of_backslashes_opens_our_environment(tmp_path: Path, monkeypatch: Any, text: str) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    (tmp_path / "config.yaml").write_text(RUN % f"'{text}'")
    assert read_settings(tmp_path / "config.yaml").data.train == text


def spoil(folder: Path, part: str | None, **keys: Any) -> Config:
    config = json.loads((folder / "config.json").read_text())
    (config if part is None else config[part]).update(keys)
    (folder / "config.json").write_text(json.dumps(config))
    return Config(output_dir="unused", init_from=str(folder))


@pytest.mark.parametrize("part", [None, "text_config", "vision_config"])
def test_a_checkpoint_does_not_switch_recomputing_on(tmp_path: Path, part: str | None) -> None:
    sources = resolve_sources(spoil(tiny.tiny_llava(tmp_path), part, gradient_checkpointing=True))
    processor = build_processor(sources.model, DataConfig())
    model = build_mllm(
        sources, processor, seed=0, dtype=torch.float32, loading=nullcontext, gather=lambda _: nullcontext()
    )
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_a_decoder_that_sees_what_follows_is_refused(tmp_path: Path) -> None:
    sources = resolve_sources(spoil(tiny.tiny_llava(tmp_path), "text_config", is_causal=False))
    with pytest.raises(ValueError, match="has attention to what follows"):
        build_skeleton(sources.model, 260)


@pytest.mark.parametrize("original", [16, 64])
def test_dynamic_positions_follow_the_row_beyond_max_position_embeddings(original: int) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0, "original_max_position_embeddings": original}
    config = tiny.tiny_text_config("qwen2", rope_parameters=rope, max_position_embeddings=32)
    assert check_positions(config, 32) is None
    with pytest.raises(ValueError, match="at most 32"):
        check_positions(config, 33)


def test_an_open_clip_export_keeps_its_way_to_resample(tmp_path: Path) -> None:
    name = tiny.tiny_open_clip(tmp_path / "clip")
    settings = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    source = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": settings}
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "open_clip_config.json").write_text(json.dumps(source))
    save_file(open_clip.create_model(name).state_dict(), tmp_path / "in" / "open_clip_model.safetensors")
    config = config_of("open_clip", tmp_path)
    config.model.vision_tower.path = f"open_clip:local-dir:{tmp_path / 'in'}"
    model, processor = build(config)
    assert processor.geometry.resample == "bilinear"
    write_model(tmp_path / "export", model, model.state_dict(), processor)
    loaded = load_export(tmp_path / "export", torch.device("cpu"))
    assert loaded.processor.geometry == processor.geometry


def test_evaluation_refuses_positions_that_follow_the_row(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    tiny.tiny_llava(tmp_path / "llava", text_changes={"rope_parameters": rope, "max_position_embeddings": 512})
    make_answered_set(tmp_path, "set", 8)
    command = [sys.executable, "launch/evaluate.py", "held-out", "--data", str(tmp_path / "set")]
    command += ["--model", str(tmp_path / "llava")]
    for more, status in (([], 2), (["--max-tokens", "400", "--max-new-tokens", "8"], 0)):
        done = subprocess.run(
            [*command, *more], cwd=ROOT, capture_output=True, text=True, timeout=200, env=rank_free_environment()
        )
        assert done.returncode == status, done.stderr
        assert ("scaled by dynamic" in done.stderr) == (status == 2)
