"""What a checkpoint is prompted with is what we train on: template, ids and pixels of its own stock processor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
from PIL import Image
from transformers import AutoProcessor

from pivot.config import DataConfig, ImageConfig, ModelConfig, VisionTowerConfig
from pivot.encoders.library import resolve_encoder
from pivot.encoders.square import fit_square
from pivot.processor import Processor, build_processor
from pivot.processor.stock import choose_image_fit, describe_other_ids, require_same
from tests.kit import tiny
from tests.kit.templates import LLAVA_TEMPLATE, answer

# Takes strings and lists alike, and puts no line break behind an image.
BOTH = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build(folder: Path, fit: str | None = None, **data: Any) -> Processor:
    model = ModelConfig()
    model.vision_tower.path = model.language_model.path = str(folder)
    return build_processor(model, DataConfig(image=ImageConfig(fit), **data))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def stock_ids(folder: Path, messages: list[dict[str, Any]]) -> list[int]:
    """What a user of stock transformers gets, a picture in place of an image part."""
    picture = Image.fromarray(np.zeros((40, 50, 3), dtype=np.uint8))
    shown = [
        {**m, "content": [part | {"image": picture} if part["type"] == "image" else part for part in m["content"]]}
        for m in messages
    ]
    stock: Any = AutoProcessor.from_pretrained(folder)
    found = stock.apply_chat_template(shown, tokenize=True, return_dict=True, add_generation_prompt=True)
    return list(found["input_ids"][0])


QUESTION = [{"role": "user", "content": [{"type": "image", "image": 0}, {"type": "text", "text": "What is it?"}]}]


@pytest.mark.parametrize("template", [LLAVA_TEMPLATE, BOTH, "{{ bos_token }}" + LLAVA_TEMPLATE])
@pytest.mark.parametrize("where", ["chat_template.jinja", "chat_template.json", "processor_config.json"])
def test_prompts_are_those_of_the_checkpoints_own_processor(tmp_path: Path, template: str, where: str) -> None:
    """With one <s>, which the tokenizer puts there unless the template does, wherever the template stands."""
    folder = tiny.tiny_llava(tmp_path / "in", vision="clip", kind="llama", around=("<s>", ""), chat_template=template)
    (folder / "chat_template.jinja").unlink()
    if where == "chat_template.jinja":
        (folder / where).write_text(template)
    elif where == "chat_template.json":
        (folder / where).write_text(json.dumps({"chat_template": template}))
    else:
        edit(folder / where, chat_template=template)
    processor = build(folder)
    encoded = processor.encode(QUESTION, {"chosen": answer("A cup.")})
    ids = encoded.prompt.tolist()
    assert ids == stock_ids(folder, QUESTION)
    assert ids.count(processor.tokenizer.bos_token_id) == 1 and ids[0] == processor.tokenizer.bos_token_id
    assert processor.tokenizer.bos_token_id not in encoded.completions["chosen"]
    assert where in processor.notes[0]
    processor.save_pretrained(tmp_path / "out")
    assert stock_ids(tmp_path / "out", QUESTION) == ids


def test_a_completion_begins_where_the_prompt_ends_whoever_writes_the_first_token(tmp_path: Path) -> None:
    folder = tiny.tiny_llava(tmp_path, around=("<s>", ""), chat_template=LLAVA_TEMPLATE)
    processor = build(folder)
    assert processor.tokenizer.decode(
        processor.encode(QUESTION, {"chosen": answer("A cup.")}).completions["chosen"]
    ) == (" A cup.<|im_end|>")


def test_a_checkpoint_without_template_gets_chatml_and_says_so(tmp_path: Path) -> None:
    folder = tiny.tiny_llava(tmp_path)
    (folder / "chat_template.jinja").unlink()
    assert build(folder).notes[0].startswith(f"prompts    ChatML: no chat template at {folder}, and data.chat_template")


def test_another_template_than_the_checkpoints_is_the_users_choice_and_is_said(tmp_path: Path) -> None:
    folder = tiny.tiny_llava(tmp_path)
    own = (folder / "chat_template.jinja").read_text()
    assert build(folder, chat_template=own).notes[0] == "prompts    data.chat_template"
    processor = build(folder, chat_template=BOTH)
    assert "data.chat_template, which is not the template of" in processor.notes[0]
    assert "You are helpful" not in processor.tokenizer.decode(processor.encode(QUESTION, {}).prompt)


def test_a_file_of_several_templates_gives_its_default_or_is_refused(tmp_path: Path) -> None:
    folder = tiny.tiny_llava(tmp_path)
    both = [{"name": "default", "template": BOTH}, {"name": "tools", "template": "x"}]
    edit(folder / "processor_config.json", chat_template=both)
    assert build(folder).chat_template.endswith(BOTH)
    edit(folder / "processor_config.json", chat_template=both[1:])
    with pytest.raises(ValueError, match="holds those named tools and no default"):
        build(folder)


def test_a_tokenizer_that_ends_each_prompt_is_refused(tmp_path: Path) -> None:
    folder = tiny.tiny_llava(tmp_path, around=("", "</s>"))
    with pytest.raises(ValueError, match="puts </s> behind each text.*add_eos_token"):
        build(folder)


def test_a_processor_that_counts_other_image_tokens_is_refused(tmp_path: Path) -> None:
    """15 and not 16 for the 16 patches: num_additional_image_tokens says there is no CLS, the strategy drops one."""
    folder = tiny.tiny_llava(tmp_path, vision="clip")
    edit(folder / "processor_config.json", num_additional_image_tokens=0)
    with pytest.raises(ValueError, match=r"a conversation with an image is \d+ tokens there and \d+ here"):
        build(folder)


def test_a_processor_that_fails_is_said_not_to_be_compared(tmp_path: Path) -> None:
    """Old folders have an image processor and a tokenizer, and no patch size for a LlavaProcessor."""
    folder = tiny.tiny_llava(tmp_path)
    settings = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").write_text(json.dumps(settings["image_processor"]))
    notes = build(folder).notes
    assert len(notes) == 3 and "not compared" in notes[2] and "TypeError" in notes[2]


def test_ids_that_differ_are_shown(tmp_path: Path) -> None:
    folder = tiny.tiny_llava(tmp_path, chat_template=LLAVA_TEMPLATE)
    other = build(folder, chat_template=BOTH)
    found = describe_other_ids(other, str(folder), images=True, own_template=True)
    assert found is not None and "a conversation of text alone is" in found and "'USER: Wh' there" in found
    assert describe_other_ids(other, str(folder), images=True, own_template=False) is None


# -- pixels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", tiny.IMAGE_PROCESSORS)
def test_images_are_fitted_as_the_encoders_own_processor_does(tmp_path: Path, way: tuple[str, str]) -> None:
    folder = tiny.tiny_vision_tower(tmp_path / "tower", "clip", with_image_processor=False)
    tiny.IMAGE_PROCESSORS[way].save_pretrained(folder)
    section = VisionTowerConfig(path=str(folder))
    found = choose_image_fit(resolve_encoder(section), None)
    assert found == (*way, f"the image processor at {folder}")


@pytest.mark.parametrize("mode, fit", [("squash", "squash"), ("shortest", "crop")])
def test_pixels_of_an_open_clip_encoder_are_its_own(tmp_path: Path, mode: str, fit: str) -> None:
    """Pillow's there: one level a pass, two passes; a crop may start a pixel later where the rest is odd."""
    name = tiny.tiny_open_clip(tmp_path / "config")
    open_clip.create_model(name)
    folder = tmp_path / "clip"
    folder.mkdir()
    settings = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": mode}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": settings})
    )
    section = VisionTowerConfig(path=f"open_clip:local-dir:{folder}")
    encoder = resolve_encoder(section)
    found = choose_image_fit(encoder, None)
    assert (found.fit, found.resample) == (fit, "bicubic")
    transform = open_clip.image_transform(
        tiny.IMAGE_SIZE, is_train=False, mean=(0.5,) * 3, std=(0.5,) * 3, resize_mode=mode, interpolation="bicubic"
    )
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    stock = 255 * (transform(Image.fromarray(image)) * 0.5 + 0.5)
    assert float((fit_square(image, tiny.IMAGE_SIZE, fit, encoder.facts.mean) - stock).abs().max()) <= 2


def test_a_processor_that_leaves_its_normalisation_to_its_class_counts(tmp_path: Path) -> None:
    folder = tiny.tiny_vision_tower(tmp_path, "clip", with_image_processor=False)
    settings = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}, "crop_size": tiny.SQUARE}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    section = VisionTowerConfig(path=str(folder))
    assert choose_image_fit(resolve_encoder(section), None).fit == "crop"


def test_random_weights_and_bare_configurations_squash_and_say_so(tmp_path: Path) -> None:
    paths = [f"open_clip:{tiny.tiny_open_clip(tmp_path)}", str(tiny.write_vision_json(tmp_path / "vision.json"))]
    for path in paths:
        section = VisionTowerConfig(path=path)
        found = choose_image_fit(resolve_encoder(section), None)
        assert found == ("squash", "bicubic", f"no image processor at {path}")


def test_another_fit_than_the_checkpoints_is_the_users_choice_and_is_said(tmp_path: Path) -> None:
    folder = tiny.tiny_llava(tmp_path, vision="clip")
    processor = build(folder, fit="pad")
    assert processor.geometry.fit == "pad"
    assert processor.notes[1] == f"pixels     pad, bicubic: data.image.fit; the image processor at {folder} would crop"
    assert build(folder, fit="crop").notes[1] == "pixels     crop, bicubic: data.image.fit"


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"size": {"shortest_edge": 40}}, r"neither those of a squash nor of a crop or pad"),
        ({"crop_size": {"height": 24, "width": 24}}, "24 pixels a side, and the encoder takes 32"),
        ({"do_rescale": False}, "neither those of"),
        ({"resample": 0}, "neither those of"),
        ({"do_center_crop": False}, r"shape \[3, 32, 46\]; expected one square"),
    ],
)
def test_a_processor_that_does_otherwise_is_refused_unless_a_fit_is_asked_for(
    tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    folder = tiny.tiny_vision_tower(tmp_path, "clip")
    edit(folder / "preprocessor_config.json", **changes)
    section = VisionTowerConfig(path=str(folder))
    encoder = resolve_encoder(section)
    with pytest.raises(ValueError, match=rf"{text}.*set data\.image\.fit"):
        choose_image_fit(encoder, None)
    assert "cannot be followed" in choose_image_fit(encoder, "crop").source


def test_another_image_size_keeps_the_way_of_fitting(tmp_path: Path) -> None:
    section = VisionTowerConfig(path=str(tiny.tiny_vision_tower(tmp_path, "clip")), image_size=48)
    assert choose_image_fit(resolve_encoder(section), None).fit == "crop"


def test_an_export_that_would_prompt_otherwise_is_not_left(tmp_path: Path) -> None:
    folder = tiny.tiny_llava(tmp_path / "in", vision="clip")
    processor = build(folder)
    processor.save_pretrained(tmp_path / "out")
    require_same(processor, str(tmp_path / "out"))
    shutil.copytree(tmp_path / "out", tmp_path / "ids")
    (tmp_path / "ids" / "chat_template.jinja").write_text(BOTH)
    with pytest.raises(RuntimeError, match="does not prompt as the run did: a conversation"):
        require_same(processor, str(tmp_path / "ids"))
    settings = json.loads((tmp_path / "out" / "processor_config.json").read_text())
    settings["image_processor"]["do_normalize"] = False
    (tmp_path / "out" / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(RuntimeError, match="a pixel differs by"):
        require_same(processor, str(tmp_path / "out"))
