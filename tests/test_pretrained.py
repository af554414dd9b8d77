"""What a checkpoint's configuration may say: what the network is, and not how it is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pivot.config import Config, VisionTowerConfig
from pivot.encoders.library import resolve_encoder
from pivot.encoders.tower import build_vision_tower
from pivot.models.build import resolve_sources
from pivot.models.skeleton import build_skeleton
from pivot.pretrained import read_config
from tests.kit import tiny

# What transformers would follow: a kernel from a repository, an implementation that is not installed, other outputs.
KEYS: dict[str, Any] = {
    "_attn_implementation": "kernels-community/flash-attn2",
    "attn_implementation": "flash_attention_2",
    "_attn_implementation_internal": "kernels-community/flash-attn2",
    "experts_implementation": "kernels-community/experts",
    "use_kernels": True,
    "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    "output_attentions": True,
    "output_hidden_states": True,
    "return_dict": False,
    "torch_dtype": "float8_e4m3fn",
}


def spoil(folder: Path, part: str | None, **keys: Any) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    (config if part is None else config[part]).update(keys)
    path.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("part", [None, "text_config", "vision_config"])
@pytest.mark.parametrize("key", KEYS)
def test_keys_that_say_how_to_run_a_model_are_ours_to_choose(tmp_path: Path, part: str | None, key: str) -> None:
    folder = spoil(tiny.tiny_llava(tmp_path), part, **{key: KEYS[key]})
    whole: Any = read_config(str(folder), "init_from")
    for config in (whole, whole.text_config, whole.vision_config):
        assert config._attn_implementation == "sdpa" and config.return_dict
        assert not config.output_attentions and not config.output_hidden_states
        assert config.dtype in (torch.float32, None)
    sources = resolve_sources(Config(output_dir="unused", init_from=str(folder)))
    build_skeleton(sources.model, 260)
    tower = build_vision_tower(resolve_encoder(VisionTowerConfig(path=str(folder))), dtype=torch.float32)
    assert tower(tiny.random_images(1)).shape == (1, 16, tiny.WIDTH)


@pytest.mark.parametrize("part", [None, "text_config"])
def test_quantised_weights_are_refused(tmp_path: Path, part: str | None) -> None:
    folder = spoil(tiny.tiny_llava(tmp_path), part, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ValueError, match=r"init_from: '.*' has weights that were quantised \(fp8\)"):
        read_config(str(folder), "init_from")


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    folder = tiny.tiny_language_model(tmp_path)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "elsewhere"}')
    with pytest.raises(ValueError, match="holds an adapter.*merge it into its base model"):
        read_config(str(folder), "model.language_model.path")


def test_a_configuration_that_transformers_cannot_read_is_one_sentence(tmp_path: Path) -> None:
    folder = spoil(tiny.tiny_language_model(tmp_path), None, num_hidden_layers="two")
    with pytest.raises(ValueError, match="no configuration that transformers knows at"):
        read_config(str(folder), "model.language_model.path")


def test_features_of_several_layers_are_refused_before_weights_load(tmp_path: Path) -> None:
    folder = spoil(tiny.tiny_llava(tmp_path), None, vision_feature_layer=[-2, -1])
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"vision_feature_layer=\[-2, -1\].*expected one layer"):
        resolve_sources(Config(output_dir="unused", init_from=str(folder)))
    only = resolve_sources(Config(output_dir="unused", init_from=str(folder), init_parts=["vision_tower"]))
    assert only.taken == ("vision_tower",)


def test_another_layer_than_the_projectors_is_refused_before_weights_load(tmp_path: Path) -> None:
    folder = tiny.tiny_llava(tmp_path, layer=-1)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.vision_tower\.layer: -2, but .* was made with -1"):
        resolve_sources(Config(output_dir="unused", init_from=str(folder)))
