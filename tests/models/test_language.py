"""The language model: stock and strict; what the prefix tree would compute wrongly is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GptOssConfig, MistralConfig

from pivot.models.language import build_language_model
from tests import tiny


@pytest.mark.parametrize("kind, tie", [("qwen2", False), ("qwen2", True), ("llama", False), ("llama", True)])
def test_loads_the_stock_model(tmp_path: Path, kind: str, tie: bool) -> None:
    folder = tiny.tiny_language_model(tmp_path, kind, tie)
    model = build_language_model(str(folder), dtype=torch.float32)
    ids = torch.arange(10)[None]
    assert torch.equal(model(ids).logits, AutoModelForCausalLM.from_pretrained(folder)(ids).logits)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tie


def test_a_configuration_gives_random_weights_that_follow_the_seed(tmp_path: Path) -> None:
    path = str(tiny.write_text_json(tmp_path / "text.json", tie=True))
    models: list[Any] = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(build_language_model(path, dtype=torch.bfloat16))
    weights = [model.get_input_embeddings().weight for model in models]
    assert weights[0].dtype == torch.bfloat16 and models[0].lm_head.weight is weights[0]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = tiny.tiny_language_model(tmp_path)
    state = load_file(folder / "model.safetensors")
    state.pop("lm_head.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors \(lm_head.weight\)"):
        build_language_model(str(folder), dtype=torch.float32)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no weights"):
        build_language_model(str(folder), dtype=torch.float32)


@pytest.mark.parametrize(
    "config, text",
    [
        (MistralConfig(sliding_window=8), "sliding-window"),
        (tiny.tiny_text_config("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1), "sliding"),
        (Gemma2Config(), "sliding-window"),
        (Gemma2Config(layer_types=["full_attention"] * 26), "soft-capping"),
        (GptOssConfig(layer_types=["full_attention"] * 36), "sinks"),
        (CohereConfig(logit_scale=0.0625), "scaled logits"),
        (tiny.tiny_vision_config(), "expected a causal language model"),
    ],
)
def test_what_the_tree_does_not_compute_is_refused(tmp_path: Path, config: Any, text: str) -> None:
    config.to_json_file(tmp_path / "config.json", use_diff=False)
    with pytest.raises(ValueError, match=text):
        build_language_model(str(tmp_path), dtype=torch.float32)


def test_plain_causal_relatives_are_accepted(tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    settings: dict[str, Any] = shape | {"num_hidden_layers": 1, "vocab_size": 32, "sliding_window": None}
    config = MistralConfig(**settings)
    config.to_json_file(tmp_path / "config.json", use_diff=False)
    assert build_language_model(str(tmp_path / "config.json"), dtype=torch.float32).config.model_type == "mistral"
