"""launch/recipe.py: the chain, its settings at two sizes, and a frozen encoder that must not move."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pivot.config import REPOSITORY
from pivot.config_load import load_config
from pivot.models.parts import digest_encoder
from tests.kit.tiny import tiny_llava

sys.path.insert(0, str(REPOSITORY / "launch"))  # as for a script
import recipe

# recipe.md's table: stage -> samples, epochs, steps at a global batch of 256.
STEPS = {
    "1a_align": (558_000, 1, 2_180),
    "1b_pretrain": (3_200_000, 1, 12_500),
    "2_sft": (20_000, 3, 234),
    "2_dpo": (20_000, 3, 234),
    "2_mpo": (20_000, 3, 234),
    "3a_swap_align": (558_000, 1, 2_180),
    "3b_swap_instruct": (737_000, 1, 2_879),
}


def config_of(name: str):
    objective = "dpo" if name in ("2_dpo", "2_mpo") else "sft"
    return load_config(recipe.CONFIGS / f"{name}.yaml", [], objective)


def test_every_stage_starts_from_one_before_it() -> None:
    chain = recipe.make_chain(["base", "sft", "dpo"])
    names = [stage.name for stage in chain]
    assert names == [
        *("1a_align", "1b_pretrain", "2_sft", "2_dpo"),
        *("3a_base", "3b_base", "3a_sft", "3b_sft", "3a_dpo", "3b_dpo"),
    ]
    for place, stage in enumerate(chain[1:], 1):
        assert stage.before in names[:place]
    assert {stage.name: stage.before for stage in chain}["3a_base"] == "1b_pretrain"
    with pytest.raises(ValueError, match="found ppo, expected some of base"):
        recipe.make_chain(["base", "ppo"])


@pytest.mark.parametrize("name", STEPS)
def test_sizes_and_rates_are_the_papers(name: str) -> None:
    config, (samples, epochs, steps) = config_of(name), STEPS[name]
    assert config.train.global_batch_size == 256 and config.train.num_epochs == epochs
    assert round(samples * epochs / 256) == pytest.approx(steps, rel=0.001)
    optim = config.optim
    rates = [optim.component(part).lr for part in ("vision_tower", "projector", "language_model")]
    expected = {"1a": [None, 1e-3, None], "1b": [2e-6, 1e-5, 1e-5], "3a": [None, 1e-3, None], "3b": [None, 1e-5, 1e-5]}
    twins = {"2_sft": [5e-6] * 3, "2_dpo": [1e-6] * 3, "2_mpo": [1e-6] * 3}
    assert rates == (twins.get(name) or expected[name[:2]])
    assert (optim.schedule, optim.warmup_ratio, config.data.max_tokens) == ("cosine", 0.03, 2048)
    assert all(optim.component(part).weight_decay == 0 for part in ("vision_tower", "projector", "language_model"))
    assert config.data.image.fit == "squash" and config.model.vision_tower.layer == -2


def test_the_twins_of_stage_2_differ_in_nothing_but_the_objective_and_its_rate() -> None:
    from pivot.config import flatten

    sft, dpo = flatten(config_of("2_sft")), flatten(config_of("2_dpo"))
    differing = {name.split(".")[0] for name in {**sft, **dpo} if sft.get(name) != dpo.get(name)}
    assert differing == {"objective", "output_dir", "optim"}


def test_settings_of_the_size_and_of_the_user_win_in_this_order(tmp_path: Path) -> None:
    size = tmp_path / "size.yaml"
    size.write_text("all: [data.workers=0]\n2_dpo: ['optim.lr=5e-4', 'data.train={data}/pairs']\n")
    layers = [recipe.read_size(size, tmp_path), recipe.split_overrides(["2_dpo.optim.lr=1e-4", "train.seed=3"])]
    chain = {stage.name: stage for stage in recipe.make_chain(["base", "dpo"])}
    words = recipe.words_of(chain["2_dpo"], tmp_path, layers)
    assert words[1:3] == [f"output_dir={tmp_path}/2_dpo", f"init_from={tmp_path}/1b_pretrain/export"]
    assert words[3:] == [
        *("data.workers=0", "optim.lr=5e-4", f"data.train={tmp_path}/data/pairs"),
        *("train.seed=3", "optim.lr=1e-4"),
    ]
    assert "optim.lr=1e-4" not in recipe.words_of(chain["3b_dpo"], tmp_path, layers)


def test_a_stage_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    size = tmp_path / "size.yaml"
    size.write_text("4_more: [data.workers=0]\n")
    with pytest.raises(ValueError, match="there is no stage 4_more; expected all or one of 1a_align"):
        recipe.read_size(size, tmp_path)


def test_the_demo_size_is_a_run_that_loads_at_every_stage(tmp_path: Path) -> None:
    layers = [recipe.read_size(REPOSITORY / "launch/sizes/demo.yaml", tmp_path)]
    for stage in recipe.make_chain(["base", "sft", "dpo", "mpo"]):
        words = recipe.words_of(stage, tmp_path, layers)
        config = load_config(words[0], words[1:], "dpo" if stage.script == "train_dpo.py" else "sft")
        assert config.train.max_steps is not None and config.train.num_epochs is None
        assert (config.optim.vision_tower.lr is None) == stage.freezes_encoder


def test_sets_that_are_missing_are_named_before_anything_trains(tmp_path: Path) -> None:
    chain = recipe.make_chain(["base"])
    with pytest.raises(
        ValueError, match=r"1a_align: shards/llava-pretrain holds no packed set.*1a_align.data.train=SET"
    ):
        recipe.check_all(chain, tmp_path, [])


def test_a_frozen_encoder_that_moved_is_found(tmp_path: Path) -> None:
    before, after = tiny_llava(tmp_path / "before"), tiny_llava(tmp_path / "after")
    values = load_file(after / "model.safetensors")
    other = next(name for name in values if "language_model" in name)
    values[other] = values[other] + 1
    save_file(values, after / "model.safetensors", metadata={"format": "pt"})
    assert digest_encoder(before) == digest_encoder(after)
    recipe.require_same_encoder(before, after)
    weight = next(name for name in values if "vision_tower" in name)
    flat = values[weight].view(-1)
    flat[0] = torch.nextafter(flat[0], torch.tensor(float("inf")))
    save_file(values, after / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="though it was frozen"):
        recipe.require_same_encoder(before, after)
