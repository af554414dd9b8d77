"""lengths, twins, exclude and simulate --config read a run's YAML as training does."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from data_tools.__main__ import main
from pivot.config import ConfigError, TrainSource
from pivot.config_check import read_train_sources
from pivot.config_load import load_config
from pivot.data.exclude import read_excluded
from pivot.data.loader import Loader
from pivot.data.shards import ShardSet
from tests.kit.batches import take
from tests.kit.damage import flip_bit
from tests.kit.sets import FakeProcessor, make_plan, make_set
from tests.kit.tiny import tiny_language_model, write_vision_json


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A packed set and a tiny model; its tokenizer makes a token of every byte."""
    folder = tmp_path_factory.mktemp("runs")
    make_set(folder, count=40)
    tiny_language_model(folder / "lm")
    write_vision_json(folder / "vision.json")
    return folder


def write_config(place, tmp_path, name="run.yaml", objective="dpo", **changes):
    config = {
        "output_dir": str(tmp_path / "out"),
        "model": {"vision_tower": {"path": str(place / "vision.json")}, "language_model": {"path": str(place / "lm")}},
        "data": {"train": str(place / "set"), "cache_dir": str(tmp_path / "cache")},
        "objective": {objective: {}},
        "optim": {part: {"lr": 1e-3} for part in ("vision_tower", "projector", "language_model")},
        "train": {"global_batch_size": 8, "max_steps": 5, "seed": 1},
    }
    merged = OmegaConf.merge(config, OmegaConf.from_dotlist([f"{key}={value}" for key, value in changes.items()]))
    OmegaConf.save(merged, tmp_path / name)
    return tmp_path / name


def run(capsys, *arguments, code=0):
    assert main([*map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_lengths_of_a_run(place, tmp_path, capsys):
    config = write_config(place, tmp_path)
    found = run(capsys, "lengths", "--config", config, "--workers", 2, "--limit", 100, "--limit", 10)
    assert found["samples"] == 40 and found["tokens_per_image"] == 16
    assert found["over"]["10"]["share"] == 1.0 and 0 <= found["over"]["100"]["share"] < 1.0
    assert len(list((tmp_path / "cache" / "lengths").rglob("*.npy"))) == 8
    one = {path.name: path.read_bytes() for path in (tmp_path / "cache").rglob("*.npy")}
    run(capsys, "lengths", "--config", config, f"data.cache_dir={tmp_path}/other", "--workers", 0)
    assert one == {path.name: path.read_bytes() for path in (tmp_path / "other").rglob("*.npy")}


def test_lengths_from_parts(place, tmp_path, capsys):
    parts = ["--tokenizer", place / "lm", "--vision-tower", place / "vision.json", "--cache-dir", tmp_path / "c"]
    assert run(capsys, "lengths", place / "set", *parts, "--dry-run") == {"missing": 40}
    found = run(capsys, "lengths", place / "set", *parts)
    longest = found["percentiles"]["longest"]
    assert longest == sorted(longest) and found["cache_dir"] == str(tmp_path / "c")
    assert main(["lengths", str(place / "set")]) == 2
    assert "--vision-tower" in capsys.readouterr().err


def test_simulate_a_run(place, tmp_path, capsys):
    config = write_config(place, tmp_path)
    plain = run(capsys, "simulate", "--config", config, "--steps", 5)
    real = run(capsys, "simulate", "--config", config, "--steps", 5, "--world-size", 2, "--real", "--workers", 1)
    ids = [[sorted(i for rank in step["ranks"] for i in rank) for step in found["steps"]] for found in (plain, real)]
    assert ids[0] == ids[1] and plain["steps_per_epoch"] == 5.0
    short = run(capsys, "simulate", "--config", config, "data.max_tokens=75", "--steps", 1)
    assert 0 < short["steps_per_epoch"] < 5


def test_twins(place, tmp_path, capsys):
    sft = write_config(place, tmp_path, "sft.yaml", "sft", **{"train.max_tokens_per_micro_batch": 2048})
    dpo = write_config(place, tmp_path, "dpo.yaml", "dpo", **{"train.max_tokens_per_micro_batch": 32768})
    assert run(capsys, "twins", sft, dpo)["twins"] is True
    other = write_config(place, tmp_path, "other.yaml", "dpo", **{"train.seed": 2})
    found = run(capsys, "twins", sft, other, code=1)
    assert found["twins"] is False and found["differing"] == ["seed: 1 and 2"]
    larger = write_config(place, tmp_path, "larger.yaml", "dpo", **{"train.global_batch_size": 4})
    assert "global_batch_size" in run(capsys, "twins", sft, larger, code=1)["differing"][0]


def test_dry_runs_write_nothing(place, tmp_path, capsys):
    """Where token counts are missing they say what would be counted; where they are not, the result."""
    config = write_config(place, tmp_path)
    for command in (
        ["simulate", "--config", config, "--steps", 2],
        ["twins", config, config],
        ["lengths", "--config", config],
    ):
        assert main([*map(str, command), "--dry-run"]) == 0
        assert (
            f"would count the tokens of 40 samples in 8 shards, into {tmp_path}/cache/lengths"
            in capsys.readouterr().out
        )
        assert run(capsys, *command, "--dry-run")["missing"] in (40, [40, 40])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml"]
    run(capsys, "lengths", "--config", config)
    counted = sorted(tmp_path.rglob("*"))
    for command in ["simulate", "--config", config, "--steps", 2], ["twins", config, config]:
        assert run(capsys, *command, "--dry-run") == run(capsys, *command)
    assert main(["lengths", "--config", str(config), "--dry-run"]) == 0
    assert "holds the counts of all samples; nothing would be written" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == counted


@pytest.mark.parametrize("command", ["simulate", "lengths"])
def test_settings_without_a_config_are_refused_and_with_one_taken_as_they_are(place, tmp_path, capsys, command):
    assert main([command, str(place / "set"), "train.seed=3"]) == 2
    assert "train.seed=3: key=value settings need the --config RUN.yaml" in capsys.readouterr().err
    assert main([command, "--config", str(write_config(place, tmp_path)), "data.train=pipe://x"]) == 2
    assert "pipe://x: pipe: would run a command" in capsys.readouterr().err


def test_a_mixture_of_sets_in_a_run(place, tmp_path, capsys):
    make_set(tmp_path / "more", count=30, samples_per_shard=7)
    # The same rows packed under another name are another set only if their content differs.
    second = tmp_path / "second"
    rows = [{"prompt": f"Other {i}?", "chosen": "A", "rejected": "B"} for i in range(20)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert main(["pack", str(tmp_path / "rows.json"), "--out", str(second), "-q"]) == 0
    mixture = f"[{{path: {place / 'set'}, weight: 1}}, {{path: {second}, weight: 1}}]"
    config = write_config(place, tmp_path)
    found = run(capsys, "simulate", "--config", config, f"data.train={mixture}", "--steps", 25, "--world-size", 2)
    ids = [id for step in found["steps"] for rank in step["ranks"] for id in rank]
    share = sum(id.startswith("rows/") for id in ids) / len(ids)
    assert 0.3 < share < 0.7
    twice = f"[{place / 'set'}, {place / 'set'}]"
    assert main(["simulate", "--config", str(config), f"data.train={twice}"]) == 2
    assert "occurs twice" in capsys.readouterr().err


def test_what_runs_met_is_left_out_of_the_next(place, tmp_path, capsys):
    folder = tmp_path / "set"
    shutil.copytree(place / "set", folder)
    shards = ShardSet.open(folder)
    flip_bit(shards, 6)
    flip_bit(shards, 33)
    plan = make_plan(ShardSet.open(place / "set"), tmp_path / "l", world_size=1, global_batch_size=40)
    take(Loader(shards, plan, FakeProcessor(), bad_samples_dir=tmp_path), 1)
    log, out = tmp_path / "bad-samples-rank0.jsonl", tmp_path / "exclude.json"
    found = run(capsys, "exclude", folder, "--from", log, log, "--out", out)
    assert len(found["samples"]) == 2
    assert np.flatnonzero(read_excluded(out, shards)).tolist() == [6, 33]
    config = write_config(place, tmp_path)
    simulated = run(capsys, "simulate", "--config", config, f"data.exclude={out}", "--steps", 8)
    ids = {id for step in simulated["steps"] for rank in step["ranks"] for id in rank}
    assert simulated["steps_per_epoch"] == 38 / 8
    assert len(ids) == 38 and not ids & {shards.read_text(row)["id"] for row in (6, 33)}
    assert main(["exclude", str(folder), "--from", str(place / "vision.json"), "--out", str(out)]) == 2
    for missing in tmp_path / "none.jsonl", tmp_path:
        capsys.readouterr()
        assert main(["exclude", str(folder), "--from", str(missing), "--out", str(out)]) == 2
        assert f"--from {missing}: no such text file; name bad-samples-rank*.jsonl" in capsys.readouterr().err
    (tmp_path / "foreign.json").write_text(json.dumps({"format": 1, "samples": [{"shard": "0", "ordinal": 1}]}))
    with pytest.raises(ValueError, match="none of them in data.train"):
        read_excluded(tmp_path / "foreign.json", shards)
    with pytest.raises(ValueError, match="is no list made by"):
        read_excluded(place / "vision.json", shards)


@pytest.mark.slow
def test_stdout_holds_the_document_alone(place, tmp_path):
    """Also in a process of its own, where DeepSpeed says on stdout which accelerator it found."""
    config = write_config(place, tmp_path)
    command = [sys.executable, "-m", "data_tools", "simulate", "--config", str(config), "--steps", "2", "--json"]
    shown = subprocess.run(command, cwd=Path(__file__).parents[2], check=True, capture_output=True, text=True).stdout
    assert set(json.loads(shown)) == {"balance", "steps_per_epoch", "steps"}


def test_the_forms_of_data_train(place, tmp_path):
    assert read_train_sources("a") == [TrainSource("a")]
    assert read_train_sources(["a", {"path": "b", "repeat": 2.5}]) == [TrainSource("a"), TrainSource("b", repeat=2.5)]
    assert read_train_sources({"path": "b", "choose": 5}) == [TrainSource("b", choose=5)]
    config = write_config(place, tmp_path)
    loaded = load_config(config, [f"data.train=[{{path: {place / 'set'}, weight: 2}}]"])
    assert read_train_sources(loaded.data.train) == [TrainSource(str(place / "set"), weight=2)]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([], "an empty list"),
        ([""], r"train\[0\]: found ''"),
        ([{"path": "a", "wieght": 1}], r"expected a folder, or a mapping of path, weight, repeat, choose"),
        ([{"path": "a", "weight": 1}, "b"], "b has no weight but a has"),
        ([{"path": "a", "weight": 1, "repeat": 2}], "expected one of weight, repeat, choose"),
        ([{"path": "a", "choose": 1.5}], r"choose: found 1.5, expected a whole number above 0"),
        ([{"path": "a", "repeat": 0}], r"repeat: found 0"),
    ],
)
def test_forms_that_are_refused(train, message):
    with pytest.raises(ConfigError, match=message):
        read_train_sources(train)
