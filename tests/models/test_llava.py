"""To and from HF LLaVA: equal to stock transformers, bit for bit there and back, and loud where it cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoProcessor, LlavaForConditionalGeneration

from pivot.config import DataConfig, ModelConfig, VisionTowerConfig
from pivot.encoders.library import resolve_encoder
from pivot.encoders.tower import build_vision_tower
from pivot.models.language import build_language_model, fit_vocabulary
from pivot.models.llava import (
    LlavaParts,
    load_llava,
    to_llava_state_dict,
    write_llava,
)
from pivot.models.mllm import MLLM
from pivot.models.projector import Projector
from pivot.processor import Processor, build_processor
from tests.kit import tiny

CASES = [("siglip", "qwen2", False), ("siglip", "qwen2", True), ("clip", "llama", False), ("clip", "llama", True)]


def read(folder: Path, *, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[LlavaParts, Processor]:
    model = ModelConfig()
    model.vision_tower = VisionTowerConfig(path=str(folder), **settings)
    model.language_model.path = str(folder)
    return load_llava(str(folder), model, dtype=dtype), build_processor(model, DataConfig())


def our_state_dict(parts: LlavaParts | MLLM) -> dict[str, Tensor]:
    names = ("vision_tower", "projector", "language_model")
    return nn.ModuleDict({name: getattr(parts, name) for name in names}).state_dict()


def our_logits(parts: LlavaParts, images: Tensor, ids: Tensor, image_token_id: int) -> Tensor:
    embeddings = parts.language_model.get_input_embeddings()(ids)
    features = parts.projector(parts.vision_tower(images))
    embeddings[ids == image_token_id] = features.flatten(0, 1)
    return parts.language_model(inputs_embeds=embeddings).logits


@pytest.mark.parametrize("vision, kind, tie", CASES)
def test_parts_compute_what_the_stock_llava_computes(tmp_path: Path, vision: str, kind: str, tie: bool) -> None:
    folder = tiny.tiny_llava(tmp_path, vision=vision, kind=kind, tie=tie)
    parts, processor = read(folder)
    prompt = [{"role": "user", "content": [{"type": "image", "image": 0}, {"type": "text", "text": "What?"}]}]
    ids = torch.from_numpy(processor.encode(prompt, {}).prompt)[None]
    images = tiny.random_images(1)
    stock = LlavaForConditionalGeneration.from_pretrained(folder)
    mean, std = (torch.tensor(x)[:, None, None] for x in (processor.geometry.mean, processor.geometry.std))
    with torch.no_grad():
        expected = stock(input_ids=ids, pixel_values=(images / 255 - mean) / std).logits
        found = our_logits(parts, images, ids, processor.image_token_id)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)  # found: up to 2e-6
    head, embedding = parts.language_model.lm_head.weight, parts.language_model.get_input_embeddings().weight
    assert (head is embedding) == tie
    assert not any(parameter.is_meta for parameter in parts.language_model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vision, kind, tie", CASES)
def test_round_trip_is_bit_equal(tmp_path: Path, vision: str, kind: str, tie: bool, dtype: torch.dtype) -> None:
    """Read, written and read by stock code: the same tensors, blocks behind the feature layer included."""
    source, target = tiny.tiny_llava(tmp_path / "in", vision=vision, kind=kind, tie=tie), tmp_path / "out"
    parts, processor = read(source, dtype=dtype)
    write_llava(target, parts, our_state_dict(parts), processor)
    before, after = load_file(source / "model.safetensors"), load_file(target / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].to(dtype), after[name]) for name in before)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, target)]
    for key in ("image_token_index", "image_seq_length", "vision_feature_layer", "vision_feature_select_strategy"):
        assert configs[0][key] == configs[1][key]
    assert configs[1]["tie_word_embeddings"] == tie
    assert type(AutoProcessor.from_pretrained(target)).__name__ == "LlavaProcessor"
    assert read(target)[1].fingerprint == processor.fingerprint


def test_trained_values_are_written_and_those_set_aside_stay(tmp_path: Path) -> None:
    source, target = tiny.tiny_llava(tmp_path / "in"), tmp_path / "out"
    parts, processor = read(source)
    with torch.no_grad():
        for parameter in our_state_dict(parts).values():
            parameter.add_(1)
    write_llava(target, parts, our_state_dict(parts), processor)
    before, after = load_file(source / "model.safetensors"), load_file(target / "model.safetensors")
    aside = {name.removeprefix("encoder.") for name in parts.vision_tower.set_aside}
    for name in before:
        stays = any(name.endswith(end) for end in aside) and "vision_tower" in name
        assert torch.equal(after[name], before[name] if stays else before[name] + 1), name


def test_an_mllm_whose_head_and_attention_are_ours_is_written_as_a_stock_model(tmp_path: Path) -> None:
    source = tiny.tiny_llava(tmp_path / "in", vision="clip", tie=True)
    parts, processor = read(source)
    model = MLLM(parts.vision_tower, parts.projector, parts.language_model)
    write_llava(tmp_path / "out", model, model.state_dict(), processor)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_parts_made_from_single_models_become_a_llava(tmp_path: Path) -> None:
    """Another image size and a vocabulary that must grow: stock code loads it and generates from an image."""
    model = ModelConfig()
    model.vision_tower.path = str(tiny.tiny_vision_tower(tmp_path / "clip", "clip"))
    model.vision_tower.image_size = 48
    model.language_model.path = str(tiny.tiny_language_model(tmp_path / "lm", "llama", vocab_size=259))
    processor = build_processor(model, DataConfig())
    assert processor.image_token_id == 259  # the first id that has no row
    tower = build_vision_tower(resolve_encoder(model.vision_tower), dtype=torch.float32)
    language_model: Any = build_language_model(model.language_model.path, dtype=torch.float32)
    assert fit_vocabulary(language_model, len(processor.tokenizer))
    assert language_model.get_input_embeddings().weight.shape[0] == 320  # 260, padded to a multiple of 64
    assert not fit_vocabulary(language_model, len(processor.tokenizer))
    parts = MLLM(tower, Projector("mlp2x_gelu", tiny.WIDTH, tiny.WIDTH), language_model)
    write_llava(tmp_path / "out", parts, our_state_dict(parts), processor)
    stock: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    image = Image.fromarray(tiny.random_images(1, 60)[0].permute(1, 2, 0).numpy())
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]
    batch = AutoProcessor.from_pretrained(tmp_path / "out").apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert (batch["input_ids"] == 259).sum() == stock.config.image_seq_length == 36
    assert stock.generation_config.eos_token_id == processor.end_of_turn_id
    assert stock.generate(**batch, max_new_tokens=2, do_sample=False).shape[1] > batch["input_ids"].shape[1]


def test_names_become_those_of_the_stock_llava(tmp_path: Path) -> None:
    folder = tiny.tiny_llava(tmp_path)
    parts, _ = read(folder)
    values = our_state_dict(parts)
    renamed = to_llava_state_dict(values, parts.vision_tower.set_aside, tied=False)
    assert renamed.keys() == LlavaForConditionalGeneration.from_pretrained(folder).state_dict().keys()
    with pytest.raises(RuntimeError, match="belongs to none"):
        to_llava_state_dict({"connector.weight": torch.zeros(1)}, {}, tied=False)
    with pytest.raises(RuntimeError, match="tied, but their values differ"):
        to_llava_state_dict(values, {}, tied=True)


def test_what_llava_cannot_express_is_refused(tmp_path: Path) -> None:
    folder = tiny.tiny_llava(tmp_path / "llava")
    parts, processor = read(folder)
    tower, state = parts.vision_tower, our_state_dict(parts)
    parts.projector = Projector("linear", tiny.WIDTH, tiny.WIDTH)
    with pytest.raises(ValueError, match=r"model\.projector is linear.*export the encoder alone"):
        write_llava(tmp_path / "out", parts, state, processor)
    parts, processor = read(folder)
    tower.section.post_norm = True
    parts.vision_tower = tower
    with pytest.raises(ValueError, match="post_norm is true.*export the encoder alone"):
        write_llava(tmp_path / "out", parts, state, processor)
    section = VisionTowerConfig(path=f"open_clip:{tiny.tiny_open_clip(tmp_path / 'open_clip')}")
    parts.vision_tower = build_vision_tower(resolve_encoder(section), dtype=torch.float32)
    with pytest.raises(ValueError, match="open_clip encoder.*export the encoder alone"):
        write_llava(tmp_path / "out", parts, state, processor)
    assert not (tmp_path / "out").exists()


def test_values_that_do_not_fit_are_not_written(tmp_path: Path) -> None:
    parts, processor = read(tiny.tiny_llava(tmp_path / "llava"))
    good = our_state_dict(parts)
    name = "projector.linear_1.bias"
    for bad in (
        {key: value for key, value in good.items() if key != name},
        good | {name: torch.zeros(3)},
        good | {"projector.linear_3.bias": torch.zeros(3)},
    ):
        with pytest.raises(RuntimeError, match=r"multi_modal_projector\.linear_[13]\.bias"):
            write_llava(tmp_path / "out", parts, bad, processor)
    with pytest.raises(RuntimeError, match="of one dtype"):
        write_llava(tmp_path / "out", parts, good | {name: good[name].bfloat16()}, processor)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage, text", [("missing", "lacks 1 tensors"), ("extra", "holds"), ("shape", "shape")])
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path, damage: str, text: str) -> None:
    folder = tiny.tiny_llava(tmp_path)
    state = load_file(folder / "model.safetensors")
    name = "multi_modal_projector.linear_1.bias"
    assert name in state
    state[{"extra": name.replace("linear_1", "linear_3")}.get(damage, name)] = torch.zeros(3)
    if damage == "missing":
        state.pop(name)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=text):
        read(folder)


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"layer": -1}, r"model\.vision_tower\.layer: -1, but .* with -2"),
        ({"cls": "keep"}, r"model\.vision_tower\.cls: keep, but .* with drop"),
        ({"post_norm": True}, r"model\.vision_tower\.post_norm"),
    ],
)
def test_a_disagreement_with_the_folder_is_refused(tmp_path: Path, settings: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        read(tiny.tiny_llava(tmp_path, vision="clip"), **settings)


def test_an_encoder_alone_may_be_taken_at_another_layer(tmp_path: Path) -> None:
    folder = str(tiny.tiny_llava(tmp_path, vision="clip"))
    model = ModelConfig(projector="linear")
    model.vision_tower = VisionTowerConfig(path=folder, layer=-1, cls="keep")
    taken = load_llava(folder, model, dtype=torch.float32, parts=("vision_tower",)).vision_tower
    images = tiny.random_images(1)
    found = build_vision_tower(resolve_encoder(model.vision_tower), dtype=torch.float32)(images)
    stock: Any = LlavaForConditionalGeneration.from_pretrained(folder).model.vision_tower
    expected = stock(taken.normalise(images), output_hidden_states=True).hidden_states[-1]
    assert torch.equal(found, expected) and torch.equal(taken(images), expected)


def test_only_a_llava_folder_is_read(tmp_path: Path) -> None:
    folder = tiny.tiny_language_model(tmp_path)
    with pytest.raises(ValueError, match="is a qwen2; expected a LlavaFor"):
        load_llava(str(folder), ModelConfig(), dtype=torch.float32)
