"""Models come back from what runs leave, whatever form it has, and their answers are scored as answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pivot.evaluate import evaluator
from pivot.evaluate.load import find_export, load_export
from pivot.evaluate.vqa import VQA
from pivot.models.parts import write_model
from tests.kit import tiny
from tests.kit.answered import make_answered_set
from tests.kit.commands import ROOT, rank_free_environment
from tests.kit.parts import CASES, build, config_of, score
from tests.kit.templates import THINKS


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_export_in_parts_is_the_model_that_was_written(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, processor = build(config_of(case, tmp_path))
    model.to(dtype)
    model.vision_tower.set_aside = {name: value.to(dtype) for name, value in model.vision_tower.set_aside.items()}
    write_model(tmp_path / "export", model, model.state_dict(), processor)
    export, run = find_export(tmp_path / "export")
    loaded = load_export(export, torch.device("cpu"))
    assert run is None and loaded.processor.fingerprint == processor.fingerprint
    expected, found = model.state_dict(), loaded.model.state_dict()
    assert all(found[name].dtype == dtype and torch.equal(found[name], value) for name, value in expected.items())
    if dtype == torch.float32:  # casting a model also rounds the rotations, which building it does not
        assert torch.equal(score(loaded.model.eval(), loaded.processor), score(model, processor))


@pytest.mark.parametrize("cls", ["drop", "keep"])
def test_an_hf_llava_is_opened_as_it_says(cls: str, tmp_path: Path) -> None:
    config = config_of("plain", tmp_path)
    config.model.vision_tower.path = str(tiny.tiny_vision_tower(tmp_path / "clip", "clip"))
    config.model.vision_tower.cls, config.model.vision_tower.layer = cls, -1
    config.data.image.fit = "pad"
    model, processor = build(config)
    write_model(tmp_path / "export", model, model.state_dict(), processor)
    loaded = load_export(find_export(tmp_path / "export")[0], torch.device("cpu"))
    assert loaded.processor.geometry == processor.geometry
    assert torch.equal(score(loaded.model.eval(), loaded.processor), score(model, processor))


def test_the_command_takes_parts_beside_a_llava(tmp_path: Path) -> None:
    model, processor = build(config_of("open_clip", tmp_path))
    write_model(tmp_path / "parts", model, model.state_dict(), processor)
    tiny.tiny_llava(tmp_path / "llava")
    make_answered_set(tmp_path, "set", 8)
    command = [sys.executable, "launch/evaluate.py", "held-out", "--data", str(tmp_path / "set")]
    command += ["--model", str(tmp_path / "parts"), "--model", str(tmp_path / "llava"), "--json", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, env=rank_free_environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("prompts    the template of") == 2
    assert done.stdout.count("2080 tokens are more than the 2048 that the language model was made for") == 2
    assert set(json.loads((tmp_path / "out").read_text())["models"]) == {"parts", "llava"}


def write_run(folder: Path) -> Path:
    """The settings of a run, as it leaves them."""
    folder.mkdir()
    rates = ", ".join(f"{name}: {{lr: null}}" for name in ("vision_tower", "projector", "language_model"))
    text = f"output_dir: {folder}\ndata: {{train: x}}\nobjective: {{dpo: {{}}}}\ntrain: {{global_batch_size: 1}}\n"
    (folder / "config.yaml").write_text(f"{text}optim: {{{rates}}}\n")
    return folder


@pytest.mark.parametrize("case", [*CASES, "plain"])
def test_a_run_is_opened_by_its_folder_whatever_it_exported(case: str, tmp_path: Path) -> None:
    config = config_of(case, tmp_path)
    config.model.vision_tower.image_size = 32 if "timm" in case else 48
    config.data.image.fit = "pad"
    model, processor = build(config)
    run = write_run(tmp_path / "run")
    with pytest.raises(ValueError, match="the run holds no export, which is written after its last step; start"):
        find_export(run)
    write_model(run / "export", model, model.state_dict(), processor)
    assert (run / "export" / "parts.json").is_file() == (case != "plain")
    export, settings = find_export(run)
    assert settings is not None and settings.output_dir == str(run)
    loaded = load_export(export, torch.device("cpu"))
    assert loaded.processor.geometry == processor.geometry
    assert torch.equal(score(loaded.model.eval(), loaded.processor), score(model, processor))


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds neither config\.json nor parts\.json; expected a run that is done"):
        find_export(tmp_path)
    tower = tiny.tiny_vision_tower(tmp_path / "tower")
    with pytest.raises(ValueError, match="is a siglip_vision_model; expected an HF LlavaForConditionalGeneration"):
        load_export(find_export(tower)[0], torch.device("cpu"))


def test_settings_beside_a_foreign_export_do_not_read_our_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIVOT_SECRET", "hunter2")
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text("{}")
    text = (
        "output_dir: '${oc.env:PIVOT_SECRET}'\ndata: {train: x}\nobjective: {dpo: {}}\ntrain: {global_batch_size: 1}\n"
    )
    rates = ", ".join(f"{name}: {{lr: null}}" for name in ("vision_tower", "projector", "language_model"))
    (tmp_path / "config.yaml").write_text(f"{text}optim: {{{rates}}}\n")
    _, run = find_export(tmp_path)
    assert run is not None and run.output_dir == "${oc.env:PIVOT_SECRET}"


def test_an_answer_is_scored_without_the_thought_that_its_template_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each answer is right, behind an empty thought as the model was trained to write it, and is shown as it came."""
    from pivot.evaluate.held_out import open_held_out
    from pivot.system import distributed

    model, processor = build(config_of("plain", tmp_path))
    processor = type(processor)(processor.tokenizer, processor.encoder, chat_template=THINKS)
    make_answered_set(tmp_path, "set", 6)
    world = distributed.start(60.0)
    try:
        held_out = open_held_out(
            tmp_path / "set", processor, world, roles=("chosen",), cache_dir=tmp_path, num_samples=6, max_tokens=500,
            max_tokens_per_micro_batch=1000, say=print,
        )  # fmt: skip
        said = {q.row: f"<think>\n\n</think>\n\n{q.accepted[0]}" for q in held_out.questions}

        def answer(*_: Any, **__: Any) -> dict[int, str]:
            return said

        monkeypatch.setattr(evaluator, "answer_questions", answer)
        found = evaluator.evaluate(
            held_out, processor, model, model, world, max_new_tokens=4, max_tokens=1000
        )  # fmt: skip
    finally:
        distributed.stop()
    assert found.metrics[VQA] == 1.0
    assert {one.generated for one in found.answers} <= set(said.values())
