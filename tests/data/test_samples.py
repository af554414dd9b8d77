"""The sample contract: what is accepted, and that each breach names its field."""

import copy

import pytest

from pivot.data.samples import (
    check_sample,
    completions_of,
    dump_sample,
    image_parts,
    message_text,
    parse_sample,
    sample_shape,
)

SAMPLE = {
    "v": 1,
    "id": "a/1",
    "kind": "preference",
    "prompt": [{"role": "user", "content": [{"type": "image", "image": 0}, {"type": "text", "text": "What?"}]}],
    "chosen": [{"role": "assistant", "content": "A cup."}],
    "rejected": [{"role": "assistant", "content": "Two plates."}],
    "images": [{"member": "jpg", "w": 4, "h": 3, "sha256": "00"}],
}


def test_a_sample_survives_the_round_trip():
    assert parse_sample(dump_sample(SAMPLE)) == SAMPLE
    assert message_text(SAMPLE["prompt"]).strip() == "What?"
    assert len(image_parts(SAMPLE["prompt"])) == 1


def test_roles_follow_the_kind():
    sft = {**SAMPLE, "kind": "sft"}
    assert list(completions_of(SAMPLE, ("chosen",))) == ["chosen"]
    with pytest.raises(ValueError, match="kind sft and has no rejected"):
        completions_of(sft, ("chosen", "rejected"))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["v"], 2, "version 1"),
        (["kind"], "poem", "field kind is 'poem'"),
        (["prompt"], [], "field prompt must be a non-empty list"),
        (["chosen"], None, "field chosen"),
        (["rejected"], [{"content": "x"}], "field rejected"),
        (["prompt", 0, "content"], [{"type": "video"}], "image and text parts"),
        (["prompt", 0, "content", 0, "image"], 1, r"name the images \[1\], but the sample holds 1"),
        (["prompt", 0, "content"], "no image", r"name the images \[\]"),
        (["images"], [], "holds 0 image"),
        (["images", 0, "member"], "pyd", "an image extension"),
        (["images", 0, "member"], "../jpg", "an image extension"),
        (["images", 0, "sha256"], "", "sha256"),
        (["chosen", 0, "content"], [{"type": "image", "image": 0}], "field chosen holds an image part"),
        (["id"], 3, "field id is 3, expected text"),
        (["source"], {"name": "x"}, "field source is {'name': 'x'}, expected text"),
        (["answer"], 3.0, "sample a/1: answer is 3.0, expected a string or a list of strings"),
        (["answer"], {"text": "cup"}, "expected a string or a list of strings"),
        (["answer"], ["cup", None], "expected a string or a list of strings"),
    ],
    ids=str,
)
def test_each_breach_names_its_field(path, value, message):
    sample = copy.deepcopy(SAMPLE)
    place = sample
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        check_sample(sample)


def test_text_that_is_not_json_is_an_error():
    with pytest.raises(ValueError, match="cannot be read"):
        parse_sample(b'{"v": 1')


def test_the_shape_of_a_sample_is_what_arrow_would_infer():
    """Objects in a list are united, whatever their order; nothing else is: an answer, a second image, other members."""

    def sample(*parts, **fields):
        return {"prompt": [{"role": "user", "content": list(parts)}], "answer": None, "images": [], **fields}

    text, image = {"type": "text", "text": "a"}, {"type": "image", "image": 0}
    plain = sample_shape(["json", "jpg"], sample(image, text))
    assert plain.startswith("json+jpg/") and len(plain) == len("json+jpg/") + 8
    same = [
        sample(text, image, text),
        {**sample(image, text), "prompt": sample(image)["prompt"] + sample(text)["prompt"]},
    ]
    assert {sample_shape(["json", "jpg"], one) for one in same} == {plain}
    others = [
        sample_shape(["json", "png"], sample(image, text)),
        sample_shape(["json", "jpg"], sample(text)),
        sample_shape(["json", "jpg"], sample(image, text, answer="yes")),
        sample_shape(["json", "jpg"], sample(image, text, answer=1)),
        sample_shape(["json", "jpg"], sample(image, text, answer=1.0)),
        sample_shape(["json", "jpg"], sample(image, text, images=[{"member": "jpg"}])),
        sample_shape(["json", "jpg"], sample(image, text, meta={"type": "count"})),
    ]
    assert len({plain, *others}) == len(others) + 1
