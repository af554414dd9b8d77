"""The language model: stock and strict; what the prefix tree would compute wrongly is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    GptOssConfig,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    Phi3Config,
    StableLmConfig,
    XGLMConfig,
)

from pivot.config import VisionTowerConfig
from pivot.encoders.library import resolve_encoder
from pivot.encoders.tower import VisionTower, build_vision_tower
from pivot.models.language import DECODERS, build_language_model, check_positions, check_text_config
from pivot.models.mllm import MLLM
from pivot.models.projector import Projector
from tests.kit import tiny
from tests.kit.trees import build_batch, random_segments


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
        (tiny.tiny_text_config(per_layer_config={"0": {"intermediate_size": 32}}), "layers with settings of their own"),
        (GPT2Config(), "positions other than rotary ones"),
        (GPTBigCodeConfig(), "positions other than rotary ones"),
        (XGLMConfig(), "positions other than rotary ones"),
        (GPTNeoXConfig(), "gpt_neox, and its packed rows are not known to be what stock transformers computes"),
        (StableLmConfig(), "stablelm, and its packed rows"),
        (NemotronConfig(), "nemotron, and its packed rows"),
        (MixtralConfig(), "mixtral, and its packed rows"),
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


# -- what is accepted computes packed rows as stock transformers computes each sequence ------------------------------

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "vocab_size": 320, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL |= {"max_position_embeddings": 64, "initializer_range": 0.2}
OWN: dict[str, dict[str, Any]] = {  # what a default would leave without effect, or on
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    "mistral": {"sliding_window": None},
    "phi3": {"sliding_window": None},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "helium": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
}


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> VisionTower:
    path = tiny.write_vision_json(tmp_path_factory.mktemp("tower") / "vision.json")
    return build_vision_tower(resolve_encoder(VisionTowerConfig(path=str(path))), dtype=torch.float32)


def packed_gap(tower: VisionTower, config: Any, lengths: list[int]) -> float:
    """The most by which a log-prob of sequences in one row differs from that of stock transformers, one by one."""
    torch.manual_seed(0)
    stock: Any = AutoModelForCausalLM.from_config(config).eval()
    halves = random_segments([n for length in lengths for n in (5, length - 5)])
    parents = [parent for i in range(len(lengths)) for parent in (-1, 2 * i)]
    expected = []
    with torch.no_grad():
        for prompt, answer in zip(halves[::2], halves[1::2], strict=True):
            ids = torch.tensor([*prompt, *answer])
            logps = stock(ids[None], use_cache=False).logits[0].log_softmax(-1)[4:-1]
            expected.append(logps.gather(1, ids[5:, None])[:, 0])
        model = MLLM(tower, Projector("mlp2x_gelu", tower.width, config.hidden_size), stock).eval()
        batch = build_batch(halves, parents, image_token_id=319, pixel_values=tiny.random_images(1))
        return float((model(batch) - torch.cat(expected)).abs().max())


@pytest.mark.parametrize("kind", DECODERS)
def test_packed_rows_are_what_stock_transformers_computes(kind: str, tower: VisionTower) -> None:
    """Found: at most 2e-6."""
    config = CONFIG_MAPPING[kind](**(SMALL | OWN.get(kind, {})))
    check_text_config(config, kind)
    assert packed_gap(tower, config, [9, 14, 11]) < 1e-5


LONG = [4.0, 3.0, 2.0, 8.0]
ROPES: dict[str, dict[str, Any]] = {
    "dynamic": {"factor": 4.0},
    "longrope": {"factor": 4.0, "original_max_position_embeddings": 32, "short_factor": [1.0] * 4, "long_factor": LONG},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "linear": {"factor": 4.0},
    "llama3": {"factor": 4.0, "original_max_position_embeddings": 32, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "default": {},
}  # fmt: skip


def rope_config(rope: str) -> Any:
    """Trained on 32 positions, and good for 128 where it says so."""
    limit = 32 if rope == "dynamic" else 128
    settings = {"rope_type": rope, "rope_theta": 100.0} | ROPES[rope]
    return tiny.tiny_text_config("llama", rope_parameters=settings, max_position_embeddings=limit)


@pytest.mark.parametrize("rope", ROPES)
def test_positions_are_exact_in_a_row_that_is_longer_than_any_of_its_pairs(rope: str, tower: VisionTower) -> None:
    """Four pairs of up to 32 tokens in a row of 107; found: at most 1e-6."""
    config = rope_config(rope)
    assert check_positions(config, 32) is None
    assert packed_gap(tower, config, [30, 20, 32, 25]) < 1e-5


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_positions_that_follow_the_rows_longest_pair_are_refused(rope: str, tower: VisionTower) -> None:
    """What is refused is wrong: 0.3 nat for a pair beside a long one."""
    config = rope_config(rope)
    with pytest.raises(ValueError, match=rf"data\.max_tokens: 60 tokens, but .* by {rope}.*to at most 32"):
        check_positions(config, 60)
    assert packed_gap(tower, config, [30, 60, 20]) > 0.05


@pytest.mark.parametrize("rope", ["yarn", "linear", "llama3", "default"])
def test_other_positions_are_exact_beside_a_long_pair(rope: str, tower: VisionTower) -> None:
    config = rope_config(rope)
    assert check_positions(config, 128) is None
    assert check_positions(config, 129) == "129 tokens are more than the 128 that the language model was made for"
    assert packed_gap(tower, config, [30, 60, 20]) < 1e-5


def test_the_trained_length_is_found_where_phi_3_writes_it() -> None:
    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    scaled: dict[str, Any] = {"rope_scaling": {"type": "longrope", **factors}, "max_position_embeddings": 131072}
    config = Phi3Config(original_max_position_embeddings=4096, sliding_window=None, **scaled)
    assert check_positions(config, 4096) is None
    with pytest.raises(ValueError, match="at most 4096"):
        check_positions(config, 4097)
