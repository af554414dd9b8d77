"""Settings: typed, merged in order, and refused with the full key before anything is loaded."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest
from omegaconf import MISSING as OMEGACONF_MISSING
from omegaconf import OmegaConf

from pivot.config import KEYS, MISSING, REPOSITORY, Config, ConfigError, DPOConfig, ObjectiveConfig, SFTConfig, flatten
from pivot.config_check import check_config, read_deepspeed_json
from pivot.config_load import REMOVED, load_config, load_saved, read_settings, to_yaml
from pivot.models.attention import BACKENDS
from pivot.objectives import OBJECTIVES
from pivot.system.redact import redact

YAML = """
output_dir: runs/x
init_from: somewhere
data: {train: shards/x}
objective: {dpo: {}}
optim: {lr: 1.0e-6, vision_tower: {lr: 2.0e-6}, projector: {lr: "${optim.lr}"}, language_model: {lr: null}}
train: {global_batch_size: 8, max_steps: 3}
"""


SECTIONS = {"sft": SFTConfig, "dpo": DPOConfig}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(YAML)
    return tmp_path / "run.yaml"


def test_a_key_says_all_of_itself() -> None:
    """What it means, in words of its own; its default is one of the values that it may have."""
    assert MISSING == OMEGACONF_MISSING
    for key in KEYS.values():
        assert key.text and key.text.endswith(".") == (key.section is not None), key.name
        assert "(" not in key.text.split()[0], f"{key.name} has no words but those that dataclass made up"
        if key.section is None and key.default not in (None, MISSING):
            assert not key.choices or key.default in key.choices, key.name
            assert not isinstance(key.default, int | float) or key.low <= key.default <= key.high, key.name
        assert not (key.ranks and not key.resume), f"{key.name}: what differs by machine differs by start"


def test_keys_are_those_of_a_config(run: Path) -> None:
    """Each setting under the name that a value of it has, also in a section that is absent."""
    values = flatten(load_config(run, ["log.compare={name: x, flops: 1}"], "dpo"))
    absent = {name for name in values if KEYS[name].section is not None}
    assert "objective.sft" in absent and all(values[name] is None for name in absent)
    settings = {name for name, key in KEYS.items() if key.section is None}
    assert values.keys() - absent == {name for name in settings if name.rpartition(".")[0] not in absent}
    assert {KEYS["log"].resume, KEYS["log.compare.flops"].resume, KEYS["checkpoint.keep"].resume} == {True}
    assert not KEYS["data"].resume and KEYS["data.workers"].resume and not KEYS["data.max_tokens"].resume


def test_attention_names_its_back_ends() -> None:
    assert all(name in KEYS["train.attention"].text for name in ("auto", *BACKENDS))


@pytest.mark.parametrize("path", sorted((REPOSITORY / "launch/configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_the_runs_that_come_along_load(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    (objective,) = [name for name in OBJECTIVES if re.search(rf"^  {name}:", path.read_text(), re.MULTILINE)]
    assert load_config(path, ["data.train=shards/x"], objective)


@pytest.mark.parametrize("key", REMOVED)
def test_a_removed_key_is_passed_over_at_its_default(run: Path, tmp_path: Path, key: str) -> None:
    """As a config.yaml of an earlier version has it; any other value is refused where a run would start or go on."""
    default, reason = REMOVED[key]
    config, saved = load_config(run, objective="dpo"), tmp_path / "config.yaml"
    assert load_config(run, [f"{key}={str(default).lower()}"], "dpo") == config
    save_earlier(config, {key: default}, saved)
    assert load_config(saved) == load_saved(saved) == read_settings(saved) == config
    save_earlier(config, {key: "other"}, saved)
    assert read_settings(saved) == config
    for load in (load_saved, load_config):
        with pytest.raises(ConfigError, match=f"config.yaml: {key}: found other, but the key is gone: {reason}"):
            load(saved)
    with pytest.raises(ConfigError, match=f"command line '{key}=.*': {key}: found other, but the key is gone"):
        load_config(run, [f"{key}=other"], "dpo")


def save_earlier(config: Config, more: dict[str, object], path: Path) -> None:
    settings = OmegaConf.create(to_yaml(config))
    for key, value in more.items():
        OmegaConf.update(settings, key, value)
    path.write_text(OmegaConf.to_yaml(settings))


def test_defaults_are_those_of_the_documentation(run: Path) -> None:
    config = load_config(run, objective="dpo")
    assert (config.optim.schedule, config.optim.warmup_ratio, config.optim.max_grad_norm) == ("cosine", 0.03, 1.0)
    assert config.objective.dpo is not None and config.objective.dpo.beta == 0.1
    assert (config.checkpoint.every_steps, config.checkpoint.keep, config.checkpoint.resume) == (100, 2, "auto")
    assert (config.checkpoint.asynchronous, config.checkpoint.keep_every_steps) == (False, None)
    assert config.deepspeed == "ds_configs/zero2.json"
    assert config.optim.projector.weight_decay == 0.0


def test_command_line_wins_over_the_file_and_references_follow(run: Path) -> None:
    config = load_config(run, ["optim.lr=5e-6", "train.max_steps=7"], "dpo")
    assert (config.optim.projector.lr, config.optim.vision_tower.lr, config.train.max_steps) == (5e-6, 2e-6, 7)
    assert config.optim.trained() == ("vision_tower", "projector")


def test_what_comes_from_the_environment_is_saved_by_name(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text by what it refers to, a number by its value; and it can be read where the variable is not set."""
    monkeypatch.setenv("PLACE", "hunter2hunter2")
    monkeypatch.setenv("STEPS", "7")
    overrides = ["data.train=[{path: 'https://me:pw@host/${oc.env:PLACE}'}]", "train.max_steps=${oc.env:STEPS}"]
    overrides += ["data.eval=${data.cache_dir}/eval", "data.cache_dir=${oc.env:PLACE}"]
    config = load_config(run, overrides, "dpo")
    assert config.data.train[0]["path"] == "https://me:pw@host/hunter2hunter2" and config.train.max_steps == 7
    saved = to_yaml(config)
    assert "hunter2" not in saved and "pw" not in saved
    for expected in ("https://***@host/${oc.env:PLACE}", "max_steps: 7", "eval: ${data.cache_dir}/eval"):
        assert expected in saved
    (tmp_path / "saved.yaml").write_text(saved)
    assert load_saved(tmp_path / "saved.yaml").data.eval == "hunter2hunter2/eval"
    monkeypatch.delenv("PLACE")
    elsewhere = load_saved(tmp_path / "saved.yaml")
    assert elsewhere.data.cache_dir == "${oc.env:PLACE}"
    assert to_yaml(elsewhere) == saved
    with pytest.raises(ConfigError, match=r"data.train.0.path: found \*\*\* where a password or token was left out"):
        load_config(tmp_path / "saved.yaml", objective="dpo")


@pytest.mark.parametrize(
    "override", ["train.hf_token=hunter2", "data.train='https://me:hunter2@h/x?a=hunter2' train", "hf_password:hunter2"]
)
def test_an_error_repeats_no_secret_of_the_command_line(run: Path, override: str) -> None:
    with pytest.raises(ConfigError) as found:
        load_config(run, [override, "train.no_such=1"], "dpo")
    assert "hunter2" not in redact(str(found.value))


def test_an_error_shows_no_line_of_a_broken_yaml(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("a: 1\npassword: [hunter2\nb: 2\n")
    with pytest.raises(ConfigError, match=r"not valid YAML: line \d+, column \d+: did not find expected") as found:
        load_config(tmp_path / "run.yaml", objective="dpo")
    assert "hunter2" not in str(found.value)


def test_resolved_settings_load_back_equal(run: Path, tmp_path: Path) -> None:
    config = load_config(
        run,
        [
            "log.compare={name: a pre-training, gpu_hours: 1e4}",
            "objective.dpo.loss={sigmoid: 0.8, sft: 1.0}",
            "init_parts=[vision_tower]",
            "model.language_model.path=a",
        ],
        "dpo",
    )
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "resolved.yaml", objective="dpo") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_stepps=3", "unknown key 'train.max_stepps'; did you mean 'max_steps'"),
        ("objective.dpo.bta=1", "unknown key 'objective.dpo.bta'; did you mean 'beta'"),
        ("optim.vision.lr=1", "unknown key 'optim.vision'"),
        ("objective.dop={}", "unknown key 'objective.dop'; did you mean 'dpo'"),
        ("train.max_steps=1.5", "train.max_steps: Value '1.5' of type 'float' could not be converted to Integer"),
        ("optim.lr=fast", "could not be converted to Float"),
        ("train=3", "Merge error"),
        ("optim.projector.lr=${optim.rate}", "Interpolation key 'optim.rate' not found"),
        ("optim.projector.lr=-1", r"optim.projector.lr: found -1.0, expected a value in \[0, inf\]"),
        ("optim.lr=inf", "optim.lr: found inf, expected a finite number"),
        ("optim.projector.lr=nan", "optim.projector.lr: found nan, expected a finite number"),
        ("optim.projector.weight_decay=inf", "optim.projector.weight_decay: found inf"),
        ("optim.projector.min_lr_ratio=nan", "optim.projector.min_lr_ratio: found nan"),
        ("optim.eps=nan", "optim.eps: found nan"),
        ("optim.max_grad_norm=-inf", "optim.max_grad_norm: found -inf"),
        ("optim.warmup_ratio=nan", "optim.warmup_ratio: found nan"),
        ("optim.betas=[2,3]", r"optim.betas\[0\]: found 2.0, expected a share of at least 0 and below 1"),
        ("optim.betas=[0.9,1.0]", r"optim.betas\[1\]: found 1.0"),
        ("optim.betas=[0.9,nan]", r"optim.betas\[1\]: found nan, expected a finite number"),
        ("objective.dpo.beta=inf", "objective.dpo.beta: found inf"),
        ("objective.dpo.simpo_gamma=nan", "objective.dpo.simpo_gamma: found nan"),
        ("objective.dpo.loss={sigmoid: .inf}", "objective.dpo.loss.sigmoid: found inf"),
        ("data.train=[{path: x, weight: .nan}]", r"data.train\[0\].weight: found nan"),
        ("data.shard_cache_gb=inf", "data.shard_cache_gb: found inf"),
        ("train.timeout_s=inf", "train.timeout_s: found inf"),
        ("log.compare={name: x, flops: .inf}", "log.compare.flops: found inf"),
        ("optim.schedule=cosin", "optim.schedule: found 'cosin', expected one of cosine, linear, constant"),
        ("checkpoint.keep=1", "checkpoint.keep: found 1"),
        ("checkpoint.keep_every_steps=150", "keep_every_steps: found 150, expected a multiple of .*every_steps .100.;"),
        ("train.num_epochs=3", "exactly one of max_steps and num_epochs"),
        ("objective.sft={}", "both sft and dpo are given"),
        ("objective.dpo.loss={sigmoid: -1}", "objective.dpo.loss.sigmoid: found -1"),
        ("objective.dpo.loss={sigmoid:1}", "put a space behind the colon: sigmoid: 1"),
        ("init_parts=[encoder]", "init_parts: found 'encoder', expected some of vision_tower"),
        ("init_parts=[projector]", "model.vision_tower.path: absent"),
        ("init_from=null", "model.vision_tower.path: absent"),
        ("log.compare={name: x}", "log.compare: 'x' has no number; give flops, samples or gpu_hours"),
        ("log.compare={flops: 1e20}", "log.compare.name: absent"),
        ("log.compare={name: x, flops: 0}", "log.compare.flops: found 0.0"),
        ("log.compare={name: x, flop: 1e20}", "unknown key 'log.compare.flop'; did you mean 'flops'"),
        ("log.profile_steps=-1", "log.profile_steps: found -1"),
        ("deepspeed=nowhere.json", "no file nowhere.json"),
        ("--verbose", "found '--verbose', expected key=value"),
    ],
)
def test_bad_settings_are_refused_by_name(run: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(run, [override], "dpo")


@pytest.mark.parametrize("component", ["vision_tower", "projector", "language_model"])
def test_an_absent_rate_is_an_error_and_freezes_nothing(tmp_path: Path, component: str) -> None:
    text = YAML.replace(f"{component}: {{lr", f"{component}: {{weight_decay")
    (tmp_path / "run.yaml").write_text(text.replace("weight_decay: null", "weight_decay: 0.0"))
    with pytest.raises(ConfigError, match=f"optim.{component}.lr: absent; expected a learning rate, or null to freeze"):
        load_config(tmp_path / "run.yaml", objective="dpo")


def test_a_yaml_for_the_other_script_is_refused(run: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"objective.dpo is given, but this script trains sft; run launch/train_dpo.py"
    ):
        load_config(run, objective="sft")


def test_all_frozen_is_refused(run: Path) -> None:
    overrides = ["optim.vision_tower.lr=null", "optim.projector.lr=null"]
    with pytest.raises(ConfigError, match="nothing would train"):
        load_config(run, overrides, "dpo")


@pytest.mark.parametrize("key", ["train_batch_size", "gradient_clipping", "bf16", "optimizer", "scheduler"])
def test_a_number_has_one_owner(tmp_path: Path, key: str) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, key: 1}))
    with pytest.raises(ConfigError, match=f"sets '{key}', which .* owns; remove it there"):
        read_deepspeed_json(str(tmp_path / "ds.json"))


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("comunication_data_type", "did you mean 'communication_data_type'"),
        ("zero_optimisation", "did you mean 'zero_optimization'"),
        ("wall_clock_breakdown", "expected some of zero_optimization, communication_data_type, aio"),
    ],
)
def test_an_unknown_key_of_deepspeeds_json_is_refused(tmp_path: Path, key: str, hint: str) -> None:
    """DeepSpeed would pass over it in silence, and pivot overrule the last one."""
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, key: True}))
    with pytest.raises(ConfigError, match=f"ds.json: unknown key '{key}'; {hint}"):
        read_deepspeed_json(str(tmp_path / "ds.json"))


@pytest.mark.parametrize("text", ["{", "[1]", '{"zero_optimization": 2}'])
def test_a_broken_deepspeed_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ConfigError, match="ds.json"):
        read_deepspeed_json(str(tmp_path / "ds.json"))


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "optim: !!python/object/apply:os.system ['true']"])
def test_what_is_not_a_mapping_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match="run.yaml"):
        load_config(tmp_path / "run.yaml", objective="dpo")


def test_a_dot_in_a_key_of_a_yaml_is_no_section(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(YAML + "train.seed: 3\n")
    with pytest.raises(ConfigError, match="run.yaml: unknown key 'train.seed'"):
        load_config(tmp_path / "run.yaml", objective="dpo")


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_every_fractional_setting_must_be_finite(objective: str) -> None:
    """Of all sections, so that a new key cannot be forgotten."""
    keys = [
        key
        for key, value in flatten(Config(objective=ObjectiveConfig(**{objective: SECTIONS[objective]()}))).items()
        if isinstance(value, float)
    ]
    assert len(keys) >= 10
    for key in keys:
        config = Config(objective=ObjectiveConfig(**{objective: SECTIONS[objective]()}))
        section, _, name = key.rpartition(".")
        setattr(functools.reduce(getattr, section.split("."), config), name, float("nan"))
        with pytest.raises(ConfigError, match=f"{key}: found nan, expected a finite number"):
            check_config(config)


SHARED = """
output_dir: ${oc.env:PIVOT_SECRET}/run
init_from: a/llava
data: {train: "hf://datasets/${oc.env:PIVOT_SECRET,none}/set", eval: "${data.train}"}
objective: {dpo: {beta: 0.2}}
optim: {lr: 1e-5, vision_tower: {lr: "${optim.lr}"}, projector: {lr: null}, language_model: {lr: null}}
train: {global_batch_size: 4, max_steps: 2}
deepspeed: not/here.json
"""


def test_settings_of_another_run_are_read_without_our_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What points into the file is followed, what points out of it stays text; no other file is opened."""
    monkeypatch.setenv("PIVOT_SECRET", "hunter2")
    (tmp_path / "config.yaml").write_text(SHARED)
    found = read_settings(tmp_path / "config.yaml")
    assert found.output_dir == "${oc.env:PIVOT_SECRET}/run"
    assert found.data.eval == found.data.train == "hf://datasets/${oc.env:PIVOT_SECRET,none}/set"
    assert found.optim.vision_tower.lr == 1e-5 and found.objective.dpo is not None
    assert "hunter2" not in to_yaml(found) and "${oc.env:PIVOT_SECRET}/run" in to_yaml(found)


def test_a_number_that_only_its_own_environment_knows_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(SHARED.replace("max_steps: 2", "max_steps: '${oc.env:STEPS}'"))
    with pytest.raises(ConfigError, match=r"config\.yaml: train\.max_steps: .*oc\.env:STEPS"):
        read_settings(tmp_path / "config.yaml")
