"""The costs that balance ranks, worked out by hand for a tiny model; and which parts a stage pays for."""

import pytest

from pivot.config import LanguageModelConfig, ModelConfig, VisionTowerConfig
from pivot.flops import _factors, training_costs
from tests.tiny import tiny_open_clip, write_text_json, write_vision_json

ALL = ("vision_tower", "projector", "language_model")


def model_of(tmp_path, **tower):
    tower = {"path": str(write_vision_json(tmp_path / "vision.json")), **tower}
    language = LanguageModelConfig(path=str(write_text_json(tmp_path / "text.json")))
    return ModelConfig(vision_tower=VisionTowerConfig(**tower), language_model=language)


def test_costs_of_a_tiny_model(tmp_path):
    """Width 32, MLP 64, 4 heads of 8 with 2 for keys, 2 blocks, 320 words; encoder 3 blocks of which 2 run, 16 patches.

    A block of the language model: 32 * (32 + 16 + 16 + 32) + 3 * 32 * 64 = 9216 weights, 2 FLOPs each, 2 blocks, and
    three times that for training. An encoder block: 4 * 32² + 2 * 32 * 64 = 8192 weights.
    """
    costs = training_costs(model_of(tmp_path), 16, ALL)
    assert costs.per_token == 3 * 2 * 2 * 9216
    assert costs.per_target == 3 * 2 * 32 * 320
    assert costs.per_attention == 3 * 4 * 2 * 32
    assert costs.per_image_token == 3 * 2 * (2 * 8192 + 4 * 16 * 32) + 3 * 2 * (32 * 32 + 32 * 32)


@pytest.mark.parametrize(
    ("trained", "factors"),
    [
        (ALL, (3, 3, 3)),
        (("projector",), (1, 3, 2)),
        (("projector", "language_model"), (1, 3, 3)),
        (("language_model",), (1, 1, 3)),
        (("vision_tower",), (3, 2, 2)),
    ],
)
def test_frozen_parts_cost_less(trained, factors):
    """A forward, a second one to pass gradients through, a third for the gradient of a part's own weights."""
    assert _factors(trained) == factors


@pytest.mark.parametrize("with_timm", [False, True])
def test_open_clip(tmp_path, with_timm):
    name = tiny_open_clip(tmp_path, with_timm=with_timm)
    assert training_costs(model_of(tmp_path, path=f"open_clip:{name}"), 16, ALL).per_image_token > 0
