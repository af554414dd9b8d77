"""`launch/reference.py`: complete at once, or resumed per shard; a miss as soon as anything it depends on changes."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from launch.command import main, make_references
from pivot.config import REPOSITORY
from pivot.config_load import load_config
from pivot.data import reference_cache as reference
from pivot.data.shards import ShardSet
from pivot.startup import references as scoring
from pivot.startup.inputs import open_inputs
from pivot.system import distributed
from tests.kit.runs import write_dpo_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dpo_run(tmp_path_factory.mktemp("reference"))


def command(folder: Path, *overrides: str) -> int:
    return main("dpo", [str(folder / "run.yaml"), *overrides], task=make_references, script="reference")


def files(cache: Path) -> list[Path]:
    return sorted(path for path in (cache / "ref").rglob("*.npy") if path.name.count(".npy") == 1)


def test_a_complete_cache_is_said_at_once_and_loads_no_weights(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(folder) == 0
    assert "reference log-probs: 24 of 24 pairs" in capsys.readouterr().out
    assert len(files(folder / "cache")) == len(ShardSet.open(folder / "set").shards)

    def refuse(*args: object, **settings: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(scoring, "build_mllm", refuse)
    assert command(folder) == 0
    shown = capsys.readouterr().out
    assert "complete   training set" in shown and "reference log-probs:" not in shown
    assert not (folder / "run").exists()


def test_killed_it_goes_on_with_the_shard_that_is_missing(folder: Path, tmp_path: Path) -> None:
    """SIGKILL while the third shard is written: two stay as they are, and the end is that of an unbroken run."""
    dying = (
        "import os, signal, sys; sys.path.insert(0, sys.argv.pop(1)); from launch.command import main\n"
        "from pivot.data import reference_cache as reference; write, written = reference.write_array, []\n"
        "def once(path, array):\n"
        "    if len(written) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    written.append(path); write(path, array)\n"
        "reference.write_array = once; main('dpo', sys.argv[1:], script='reference')"
    )
    changes = [str(folder / "run.yaml"), f"data.cache_dir={tmp_path}/cache"]
    killed = subprocess.run([sys.executable, "-c", dying, REPOSITORY, *changes], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    before = {path: path.stat().st_mtime_ns for path in files(tmp_path / "cache")}
    assert len(before) == 2
    assert command(folder, *changes[1:]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert command(folder) == 0
    whole, resumed = files(folder / "cache"), files(tmp_path / "cache")
    assert [path.name for path in whole] == [path.name for path in resumed]
    for one, other in zip(whole, resumed, strict=True):
        assert np.array_equal(np.load(one), np.load(other))


def test_training_behind_it_computes_nothing(folder: Path) -> None:
    assert command(folder) == 0
    script = [sys.executable, REPOSITORY / "launch" / "train_dpo.py", folder / "run.yaml"]
    script += ["deepspeed=ds_configs/zero0.json", f"output_dir={folder}/trained"]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "reference log-probs" not in done.stdout and "exported" in done.stdout


def test_a_loss_without_reference_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(folder, "objective.dpo.loss=simpo") == 2
    assert "objective.dpo.loss: simpo needs no reference" in capsys.readouterr().err


def test_the_script_starts_from_anywhere(tmp_path: Path) -> None:
    path = REPOSITORY / "launch" / "reference.py"
    done = subprocess.run([sys.executable, "-S", path, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "deepspeed launch/reference.py CONFIG" in done.stdout


# -- the fingerprint -----------------------------------------------------------------------------------------------


def fingerprint(folder: Path, *overrides: str, **changes: object) -> str:
    config = load_config(folder / "run.yaml", list(overrides), "dpo")
    world = distributed.start(60.0)
    try:
        inputs = dataclasses.replace(open_inputs(config, world, lambda text: None), **changes)
        return scoring.resolve_fingerprint(config, inputs)
    finally:
        distributed.stop()


def other_weights(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path = tmp_path / "llava" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return fingerprint(folder, f"init_from={tmp_path}/llava")


def other_tokenizer(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path = tmp_path / "llava" / "tokenizer.json"
    core = json.loads(path.read_text())
    vocabulary = core["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(core))
    return fingerprint(folder, f"init_from={tmp_path}/llava")


def other_template(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path = tmp_path / "llava" / "chat_template.jinja"
    path.write_text(path.read_text().replace("You are helpful.", "You are helpful!"))
    return fingerprint(folder, f"data.chat_template={path}")


def other_fit(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return fingerprint(folder, "data.image.fit=pad")


def other_precision(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return fingerprint(folder, "train.precision=bf16")


def other_attention(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    from pivot.models.attention import Choice

    return fingerprint(folder, attention=Choice("torch_varlen", {}))


def other_version(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(reference, "LOGPROB_VERSION", reference.LOGPROB_VERSION + 1)
    return fingerprint(folder)


def test_one_changed_byte_is_a_miss(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thing that log-probs depend on, changed alone; an unchanged copy elsewhere is a hit."""
    own = fingerprint(folder)
    for change in (other_weights, other_tokenizer, other_template, other_fit, other_precision, other_attention):
        shutil.copytree(folder / "llava", tmp_path / "llava", dirs_exist_ok=True)
        assert fingerprint(folder, f"data.chat_template={tmp_path}/llava/chat_template.jinja") == own
        assert change(folder, tmp_path, monkeypatch) != own, change.__name__
    assert other_version(folder, tmp_path, monkeypatch) != own
