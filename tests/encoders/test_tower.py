"""The vision tower: features equal to those of its own library, and nothing run that is not used."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel, SiglipConfig, SiglipModel, SiglipVisionModel

from pivot.config import VisionTowerConfig
from pivot.encoders.library import resolve_encoder
from pivot.encoders.tower import build_vision_tower
from tests.kit import tiny
from tests.kit.encoders import IMAGES, build, normalise

STOCK: dict[str, Any] = {"siglip": SiglipVisionModel, "clip": CLIPVisionModel}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("vision")
    return {kind: str(tiny.tiny_vision_tower(root / kind, kind)) for kind in STOCK}


@pytest.fixture(scope="module", params=[False, True], ids=["native", "timm"])
def clip_name(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.tiny_open_clip(tmp_path_factory.mktemp("open_clip"), with_timm=request.param)


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("layer", [-1, -2, 1, 3])
@pytest.mark.parametrize("kind, cls", [("siglip", "drop"), ("clip", "drop"), ("clip", "keep")])
def test_features_are_the_stock_hidden_state(folders: dict, kind: str, cls: str, layer: int, post_norm: bool) -> None:
    """The selection of HF LLaVA. 1e-5: normalisation in another order of operations (found: up to 4e-7)."""
    tower = build(folders[kind], layer=layer, post_norm=post_norm, cls=cls)
    stock = STOCK[kind].from_pretrained(folders[kind])
    expected = stock(normalise(IMAGES, tower), output_hidden_states=True).hidden_states[layer]
    expected = stock.post_layernorm(expected) if post_norm else expected
    expected = expected[:, 1:] if kind == "clip" and cls == "drop" else expected
    found = tower(IMAGES)
    assert found.shape == (2, tower.num_features, tower.width) == (2, 16 + (cls == "keep"), tiny.WIDTH)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", STOCK)
def test_another_image_size_interpolates_as_transformers_does(folders: dict, kind: str) -> None:
    tower = build(folders[kind], image_size=48)
    images = tiny.random_images(2, 48)
    stock = STOCK[kind].from_pretrained(folders[kind])
    states = stock(normalise(images, tower), output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
    found = tower(images)
    assert found.shape[1] == tower.num_features == 36
    torch.testing.assert_close(found, states[-2][:, -36:], atol=1e-5, rtol=1e-5)
    assert tower.model.config.image_size == 48


@pytest.mark.parametrize("kind, heads", [("siglip", {"head", "post_layernorm"}), ("clip", {"post_layernorm"})])
def test_what_lies_behind_the_layer_is_set_aside_and_the_rest_trains(folders: dict, kind: str, heads: set) -> None:
    tower = build(folders[kind])
    stored = load_file(Path(folders[kind]) / "model.safetensors")
    stored = {name.removeprefix("vision_model."): value for name, value in stored.items()}
    assert {name.split(".")[0] for name in tower.set_aside} - {"encoder"} == heads
    assert {name.split(".")[2] for name in tower.set_aside if name.startswith("encoder")} == {"2"}
    for name, value in tower.set_aside.items():
        assert torch.equal(value, stored[name])
    kept = {name.removeprefix("model.") for name in tower.state_dict()}
    assert kept | tower.set_aside.keys() == stored.keys()
    assert not kept & tower.set_aside.keys()
    tower(IMAGES).pow(2).sum().backward()
    assert all(parameter.grad is not None for parameter in tower.parameters())
    with_norm = build(folders[kind], post_norm=True)
    assert not any(name.startswith("post_layernorm") for name in with_norm.set_aside)


def test_set_aside_values_are_read_inside_the_gather_context(folders: dict) -> None:
    gathered: list[torch.nn.Parameter] = []

    @contextmanager
    def gather(parameters: list[torch.nn.Parameter]) -> Any:
        gathered.extend(parameters)
        yield

    tower = build_vision_tower(
        resolve_encoder(VisionTowerConfig(path=folders["clip"])), dtype=torch.float32, gather=gather
    )
    assert len(gathered) == len(tower.set_aside) == 18  # 16 of a block, 2 of the norm


def test_checkpointing_gives_every_parameter_the_same_gradient(folders: dict, clip_name: str) -> None:
    """Reentrant checkpointing would leave every block without one: pixels need no gradient."""
    for path in (*folders.values(), f"open_clip:{clip_name}"):
        grads = []
        for checkpointing in (False, True):
            torch.manual_seed(0)
            tower = build(path).train()
            if checkpointing:
                tower.enable_activation_checkpointing()
            tower(IMAGES).pow(2).sum().backward()
            grads.append({name: parameter.grad for name, parameter in tower.named_parameters()})
        for name, grad in grads[0].items():
            assert grad is not None
            torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_pixels_are_normalised_in_float32_before_the_cast(folders: dict) -> None:
    tower = build(folders["siglip"], dtype=torch.bfloat16)
    seen: dict[str, Tensor] = {}
    tower.model.embeddings.register_forward_pre_hook(lambda module, args: seen.update(pixels=args[0]))
    assert tower(IMAGES).dtype == torch.bfloat16
    assert torch.equal(seen["pixels"], normalise(IMAGES, tower).bfloat16())


def test_a_configuration_gives_random_weights_that_follow_the_seed(tmp_path: Path) -> None:
    path = str(tiny.write_vision_json(tmp_path / "vision.json"))
    towers = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        towers.append(build(path, dtype=torch.bfloat16))
    assert next(towers[0].parameters()).dtype == torch.bfloat16
    features = [tower(IMAGES) for tower in towers]
    assert torch.equal(features[0], features[1])
    assert not torch.equal(features[0], features[2])


@pytest.mark.parametrize("kind", STOCK)
def test_a_whole_clip_or_siglip_gives_its_encoder(tmp_path: Path, kind: str) -> None:
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 64, "max_position_embeddings": 8, "projection_size": 16}
    config_class, model_class = {"siglip": (SiglipConfig, SiglipModel), "clip": (CLIPConfig, CLIPModel)}[kind]
    config = config_class(text_config=text, vision_config=tiny.tiny_vision_config(kind).to_dict())
    whole: Any = model_class(config).eval()
    whole.save_pretrained(tmp_path)
    tower = build(str(tmp_path))
    states = whole.vision_model(normalise(IMAGES, tower), output_hidden_states=True).hidden_states
    torch.testing.assert_close(tower(IMAGES), states[-2][:, -16:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("damage, text", [("missing", "lacks 1 tensors"), ("extra", "holds"), ("shape", "shape")])
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path, damage: str, text: str) -> None:
    folder = tiny.tiny_vision_tower(tmp_path)
    state = load_file(folder / "model.safetensors")
    name = next(key for key in state if key.endswith("encoder.layers.1.mlp.fc1.bias"))
    if damage == "missing":
        state.pop(name)
    elif damage == "extra":
        state[name.replace("fc1.bias", "fc3.bias")] = torch.zeros(3)
    else:
        state[name] = torch.zeros(3)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=text):
        build(str(folder))


def test_remote_code_is_never_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "code.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="remote code is never run"):
        build(str(tmp_path))
    assert not canary.exists()


def test_pickled_weights_are_never_unpickled(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self) -> Any:
            return (open, (str(canary), "w"))

    folder = tiny.tiny_vision_tower(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"x": Payload()}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights[_ ]only|unpickl"):
        build(str(folder))
    assert not canary.exists()


def test_other_encoders_are_refused(tmp_path: Path) -> None:
    tiny.write_text_json(tmp_path / "text.json")
    with pytest.raises(ValueError, match="is a qwen2; expected one of"):
        build(str(tmp_path / "text.json"))
    with pytest.raises(ValueError, match="knows no model 'nothing'"):
        build("open_clip:nothing")
    with pytest.raises(ValueError, match="is not a ViT"):
        build("open_clip:RN50")
    name = tiny.tiny_open_clip(tmp_path)
    with pytest.raises(ValueError, match="no_such_tag"):
        build(f"open_clip:{name}@no_such_tag")
    name = tiny.tiny_open_clip(tmp_path, with_timm=True)
    with pytest.raises(ValueError, match="cannot save its timm encoder"):
        build(f"open_clip:{name}", image_size=48)
