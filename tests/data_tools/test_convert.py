"""Each bad record is dropped for its own reason; a good one becomes a sample with its files unchanged."""

import os

import pytest

from data_tools.convert import Packed, convert, split_messages
from data_tools.records import Drop, Record
from tests.kit.sets import image_bytes

SECRET = b"secret"


@pytest.fixture
def root(tmp_path):
    """root/images with one picture; a secret outside of it."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(image_bytes(1))
    (tmp_path / "images" / "broken.jpg").write_bytes(image_bytes(1, "JPEG")[:300])
    (tmp_path / "images" / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.png").write_bytes(image_bytes(2))
    return tmp_path


def make(root, trusted=("images",), **fields):
    defaults = {"id": "s/1", "source": "s", "prompt": "What?", "chosen": "A cup.", "rejected": "No."}
    record = Record(**{**defaults, "folders": (str(root / "images"),), **fields})
    return convert(record, [root / name for name in trusted])


def test_a_good_record_keeps_its_bytes(root):
    packed = make(root, images=("a.png",), answer="a cup")
    assert isinstance(packed, Packed)
    assert [name for name, _ in packed.members] == ["json", "png"]
    assert packed.members[1][1] == image_bytes(1)
    assert packed.sample["images"][0] | {"w": 12, "h": 10, "origin": "a.png"} == packed.sample["images"][0]
    assert packed.sample["answer"] == "a cup"


def test_several_images_are_numbered(root):
    packed = make(root, images=("a.png", "a.png"))
    assert [name for name, _ in packed.members] == ["json", "img0.png", "img1.png"]


def test_the_key_is_the_contents_not_the_origins(root):
    one, other = make(root, images=("a.png",)), make(root, images=("./a.png",), id="t/9", source="t")
    assert one.key == other.key
    assert make(root, images=("a.png",), chosen="Another.").key != one.key


IMAGE0, IMAGE1 = ({"type": "image", "image": number} for number in (0, 1))


@pytest.mark.parametrize(
    ("prompt", "num_images", "parts"),
    [
        ("What?", 0, ["What?"]),
        ("What?", 1, [IMAGE0, "What?"]),
        ("What?", 2, [IMAGE0, IMAGE1, "What?"]),
        ("<image>\nWhat?", 1, [IMAGE0, "What?"]),
        ("What?\n<image>", 1, ["What?\n", IMAGE0]),
        ("One: <image>\nTwo: <image>\nSame?", 2, ["One: ", IMAGE0, "Two: ", IMAGE1, "Same?"]),
    ],
)
def test_placeholders_become_parts(prompt, num_images, parts):
    expected = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    assert split_messages([("user", prompt)], num_images) == [{"role": "user", "content": expected}]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"chosen": " \n"}, "zero-length completion"),
        ({"rejected": ""}, "zero-length completion"),
        ({"rejected": "A cup. "}, "chosen equals rejected"),
        ({"prompt": ""}, "empty prompt"),
        ({"prompt": "<image> <image>", "images": ("a.png",)}, "image-token mismatch"),
        ({"prompt": "<image>"}, "empty prompt"),
        ({"prompt": "<image> What?"}, "image-token mismatch"),
        ({"images": ("none.png",)}, "missing image"),
        ({"images": ("",)}, "missing image"),
        ({"images": ("a\0.png",)}, "missing image"),
        ({"images": ("broken.jpg",)}, "undecodable image"),
        ({"images": ("drawing.svg",)}, "undecodable image"),
        ({"images": ("http://127.0.0.1:9/a.png",)}, "URL"),
        ({"images": ("file:///etc/passwd",)}, "URL"),
        ({"images": ("../elsewhere/b.png",)}, "path outside the roots"),
        ({"images": ("/etc/passwd",)}, "path outside the roots"),
        ({"chosen": "\ud83d"}, "malformed row"),
    ],
    ids=str,
)
def test_each_bad_record_has_its_reason(root, fields, reason):
    drop = make(root, **fields)
    assert isinstance(drop, Drop) and drop.reason == reason and drop.id == "s/1"


def test_links_lead_out_only_where_that_is_allowed(root):
    os.symlink(root / "elsewhere" / "b.png", root / "images" / "link.png")
    os.symlink(root / "images" / "a.png", root / "images" / "inner.png")
    assert isinstance(make(root, images=("inner.png",)), Packed)
    drop = make(root, images=("link.png",))
    assert drop.reason == "path outside the roots" and f"--allow-root {root / 'elsewhere'}" in drop.detail
    assert make(root, images=("link.png",), trusted=("images", "elsewhere")).members[1][1] == image_bytes(2)


def test_a_path_may_wander_inside_the_root(root):
    assert isinstance(make(root, images=("../images/a.png",)), Packed)
    assert isinstance(make(root, images=(str(root / "images" / "a.png"),)), Packed)
