"""No picture is lost: every field, part and member that looks like media is read, or drops its row with a reason."""

import base64
import io
import json
import tarfile

import pyarrow as pa
import pytest
from pyarrow import parquet

from data_tools.__main__ import main
from data_tools.pack import PackOptions, pack
from data_tools.readers import find_reader
from data_tools.readers.media import images_of, natural_key
from data_tools.readers.pictures import as_images
from data_tools.records import Drop, ImageBytes, Malformed
from pivot.data.shards import ShardSet
from tests.kit.sets import image_bytes

PAIR = {"prompt": "What is this?", "chosen": "A cup.", "rejected": "A plate."}
PNG, JPEG = image_bytes(1), image_bytes(2, "JPEG")
FILM = b"\0\0\0\x20ftypisom" + bytes(100)
IN_BASE64 = base64.b64encode(JPEG).decode()


def write_lines(folder, rows, files=None):
    folder.mkdir(exist_ok=True)
    for name, data in (files or {}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "rows.jsonl"


def tar_of(path, members):
    """Bytes become files, text the target of a link."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            if isinstance(data, str):
                member.type, member.linkname = tarfile.SYMTYPE, data
                tar.addfile(member)
            else:
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def read(source, **mapping):
    """What the reader gives: the images of a record, or the reason of a drop."""
    _, reader = find_reader(source, "auto", mapping)
    found = list(reader.read(source, [], mapping.get("image")))
    return [row.reason if isinstance(row, Drop) else row.images for row in found]


def read_one(tmp_path, row, **mapping):
    (found,) = read(write_lines(tmp_path, [row]), **mapping)
    return found


@pytest.mark.parametrize(
    "name",
    ["image", "images", "img", "img_path", "image_path", "image_file", "image_url", "imagePath", "picture", "photo",
     "screenshot", "jpg", "decoded_image", "image_1", "input_image", "image_bytes"],
)  # fmt: skip
@pytest.mark.parametrize("format", ["llava_dpo", "trl", "llava", "generic"])
def test_a_picture_is_found_under_the_names_that_people_give_it(tmp_path, name, format):
    """In every format alike: each finds its texts, and the pictures are found in one place."""
    row = {
        "llava_dpo": PAIR,
        "trl": {
            "prompt": [{"role": "user", "content": "What?"}],
            "chosen": [{"role": "assistant", "content": "A"}],
            "rejected": [{"role": "assistant", "content": "B"}],
        },
        "llava": {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A"}]},
        "generic": {"query": "What?", "response": "A"},
    }[format]
    assert read_one(tmp_path, row | {name: "a.png"}) == ("a.png",)


def test_a_column_of_another_name_is_packed_from_csv(tmp_path, capsys):
    (tmp_path / "img").mkdir()
    lines = ["prompt,chosen,rejected,image_path"]
    for i in range(3):
        (tmp_path / "img" / f"{i}.png").write_bytes(image_bytes(i))
        lines.append(f"What is {i}?,cup {i},plate {i},img/{i}.png")
    (tmp_path / "train.csv").write_text("\n".join(lines))
    assert main(["pack", str(tmp_path / "train.csv"), "--out", str(tmp_path / "set"), "--workers", "1"]) == 0
    shown = capsys.readouterr().out
    assert "with images" in shown and "3 images" in shown
    assert [files for _, files in read_all(tmp_path / "set")] == [[image_bytes(i)] for i in range(3)]
    (tmp_path / "texts.csv").write_text("prompt,chosen,rejected\nWhat is it?,a cup,a plate\n")
    assert main(["pack", str(tmp_path / "texts.csv"), "--out", str(tmp_path / "texts"), "--workers", "1"]) == 0
    assert "no sample has an image" in capsys.readouterr().out


def read_all(folder):
    shards = ShardSet.open(folder)
    return [shards.read(row) for row in range(len(shards))]


@pytest.mark.parametrize(
    "fields",
    [
        {"video": "a.mp4"},
        {"videos": ["a.mp4"]},
        {"frames": ["1.jpg", "2.jpg"]},
        {"video_path": "a"},
        {"audio": {"bytes": "x", "path": "a.wav"}},
        {"image": "a.png", "video": "b.mp4"},
        {"file_name": "a.png"},
        {"question_image": "a.png"},
        {"url": "https://example.org/a.png?w=3"},
        {"image_id": "coco/0012.JPG"},
        {"meta": {"source": {"file": "a.tiff"}}},
        {"extra": ["x", {"y": IN_BASE64}]},
        {"thumbnail": f"data:image/jpeg;base64,{IN_BASE64}"},
        {"image": "a.png", "thumbnail": IN_BASE64},
        {"image": "a.png", "photo": "b.png"},
        {"visual": base64.b64encode(JPEG).decode()},
        {"image": "a.png", "images": ["a.png", "b.png"]},
    ],
    ids=str,
)
def test_what_looks_like_media_and_is_not_read_drops_the_row(tmp_path, fields):
    source = write_lines(tmp_path, [PAIR | fields])
    (found,) = find_reader(source)[1].read(source, [])
    assert isinstance(found, Drop) and found.reason == "unread media"
    assert "--map image=" in found.detail and len(found.detail) < 300
    assert read(source, image="") == [()]  # the user says that there is no picture


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"image": None},
        {"image": ""},
        {"images": []},
        {"image": float("nan")},
        {"image": {"bytes": None, "path": None}},
        {"image_id": 12, "image_caption": "A cup.", "num_images": 0, "has_video": False, "video": None, "frame": 7},
        {"id": "a/1.jpg", "answer": "logo.png", "chosen": "cup.jpg"},
        {"note": "The file is called cup.jpg, I think."},
        {"note": "Is it cup.jpg? I think so.", "image_question": "What?", "image_source": "coco"},
    ],
    ids=str,
)
def test_a_row_without_media_stays_a_row_without_media(tmp_path, fields):
    assert read_one(tmp_path, PAIR | fields) == ()


@pytest.mark.parametrize(
    "fields",
    [
        {"image_path": "coco/a.png"},
        {"images": ["x/a.png"]},
        {"image_url": "https://example.org/7"},
        {"coco_url": "https://example.org/7.png", "file_name": "0007.png", "image_id": "7.png"},
        {"rejected_images": ["a.png"]},
    ],
    ids=str,
)
def test_what_only_names_the_same_picture_again_is_no_other(tmp_path, fields):
    assert read_one(tmp_path, PAIR | {"image": "a.png"} | fields) == ("a.png",)


def test_a_picture_of_one_answer_alone_drops_the_row_in_every_format(tmp_path):
    for fields in ({"rejected_image": "b.png"}, {"image_rejected": "b.png"}, {"rejected_images": ["b.png"]}):
        assert read_one(tmp_path, PAIR | {"image": "a.png"} | fields) == "rejected image not supported"


def test_numbered_fields_are_one_series(tmp_path):
    fields = {f"image_{number}": f"{number}.png" for number in (10, 2, 1)} | {"image_3": None}
    assert read_one(tmp_path, PAIR | fields) == ("1.png", "2.png", "10.png")
    assert sorted(["img10", "img2", "a", "img"], key=natural_key) == ["a", "img", "img2", "img10"]


def test_a_mapped_column_is_taken_with_any_format(tmp_path):
    """`file` is what the user names; the other fields are no longer in doubt, and a wrong name is no silence."""
    row = PAIR | {"image": "a.png", "photo": "b.png", "more": {"file": "c.png"}}
    source = write_lines(tmp_path, [row])
    assert read(source, image="photo") == [("b.png",)]
    assert read(source, image="more.file") == [("c.png",)]
    assert read(source, image="nothing") == ["malformed row"]
    assert find_reader(source, "auto", {"image": "photo"})[0] == "llava_dpo"
    (tmp_path / "c.png").write_bytes(PNG)
    command = ["pack", str(source), "--out", str(tmp_path / "set"), "--workers", "1", "-q"]
    assert main([*command, "--map", "image=more.file"]) == 0
    assert read_all(tmp_path / "set")[0][1] == [PNG]
    assert main([*command, "--map", "prompt="]) == 2


def test_embedded_pictures_of_parquet_under_another_name(tmp_path):
    rows = [PAIR | {"picture": {"bytes": PNG, "path": "a.png"}}, PAIR | {"picture": None}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [(ImageBytes(PNG, "a.png"),), ()]
    parquet.write_table(pa.Table.from_pylist([PAIR | {"column": PNG}]), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["unread media"]
    assert read(tmp_path / "a.parquet", image="column") == [(ImageBytes(PNG),)]


# -- base64 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        IN_BASE64,
        f"data:image/jpeg;base64,{IN_BASE64}",
        f"DATA:image/jpeg;charset=x;base64,{IN_BASE64}",
        IN_BASE64.rstrip("="),
        IN_BASE64.replace("+", "-").replace("/", "_"),
        "\n".join(IN_BASE64[i : i + 76] for i in range(0, len(IN_BASE64), 76)),
        {"bytes": IN_BASE64, "path": None},
        {"base64": IN_BASE64},
        {"url": f"data:image/jpeg;base64,{IN_BASE64}"},
        {"image_url": {"url": f"data:image/jpeg;base64,{IN_BASE64}"}},
        {"type": "base64", "media_type": "image/jpeg", "data": IN_BASE64},
    ],
    ids=lambda value: str(value)[:40],
)
def test_base64_is_decoded(value):
    assert as_images(value) == as_images([value]) == (ImageBytes(JPEG),)


@pytest.mark.parametrize("value", [IN_BASE64[:-3] + "*!*", f"data:image/png;base64,{IN_BASE64}%", {"bytes": "no b64"}])
def test_base64_that_is_cut_is_refused_in_a_short_line(value):
    with pytest.raises(Malformed, match="base64 that cannot be decoded") as refused:
        as_images(value)
    assert len(str(refused.value)) < 200 and refused.value.reason == "undecodable image"


def test_no_message_repeats_a_file(tmp_path, capsys):
    """Kilobytes of text where a picture, an id, a part or a rating should be: every example is short."""
    long = "A" * 50_000
    rows = [
        PAIR | {"image": long},
        PAIR | {"image": [7, long]},
        PAIR | {"image": IN_BASE64[:64] + "*" + long},
        PAIR | {"image": f"data:image/png,{long}"},
        PAIR | {"image": f"../{long}.png"},
        PAIR | {"answer": {long: 1}},
        PAIR | {"id": long, "rejected": 5},
        {"prompt": [{"role": long, "content": "x"}], "chosen": "A", "rejected": "B"},
    ]
    source = write_lines(tmp_path / "in", rows)
    command = ["pack", str(source), "--format", "llava_dpo", "--workers", "1"]
    assert main([*command, "--out", str(tmp_path / "set")]) == 1
    assert main([*command, "--show-mapping"]) in (0, 1)
    shown = capsys.readouterr()
    assert "A" * 300 not in "".join(shown.out.split()) and "A" * 300 not in shown.err
    examples = json.loads((tmp_path / "set" / "stats.json").read_text())["examples"]
    assert sum(map(len, examples.values())) >= 6
    assert all(len(example["detail"]) < 700 for found in examples.values() for example in found)


# -- parts of messages -------------------------------------------------------------------------------------------------


def conversation(*parts, answer="A cup."):
    prompt = [{"role": "user", "content": [*parts, {"type": "text", "text": "What is this?"}]}]
    return {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": answer}],
        "rejected": [{"role": "assistant", "content": "A plate."}],
    }


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image", "url": "a.png", "text": None},
        {"type": "image", "path": "a.png"},
        {"image": "a.png"},
        {"type": "input_image", "image_url": "a.png"},
    ],
    ids=str,
)
def test_a_picture_in_a_part_is_read(tmp_path, part):
    assert read_one(tmp_path, conversation(part)) == ("a.png",)
    repeated = conversation(part)
    repeated |= {role: repeated["prompt"] + repeated[role] for role in ("chosen", "rejected")}
    assert read_one(tmp_path, repeated) == ("a.png",)
    del repeated["prompt"]
    assert read_one(tmp_path, repeated) == ("a.png",)


def test_parts_that_name_a_place_leave_the_pictures_to_the_row(tmp_path):
    for part in ({"type": "image"}, {"type": "image", "image": 0}, {"type": "image", "image": None, "text": None}):
        assert read_one(tmp_path, conversation(part) | {"images": ["b.png"]}) == ("b.png",)
    assert read_one(tmp_path, conversation({"type": "image", "image": "x/b.png"}) | {"images": ["b.png"]}) == ("b.png",)
    both = conversation({"type": "image", "image": "a.png"}) | {"images": ["b.png"]}
    assert read_one(tmp_path, both) == "unread media"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video", "video": "a.mp4"},
        {"type": "input_audio", "input_audio": {"data": "x"}},
        {"type": "tool_use", "name": "x"},
        {"type": "text", "text": "x", "image": "a.png"},
        {"type": 7, "text": "x"},
    ],
    ids=str,
)
def test_a_part_of_another_type_drops_the_row(tmp_path, part):
    source = write_lines(tmp_path, [conversation(part)])
    (found,) = find_reader(source)[1].read(source, [])
    assert found.reason == "unread media" and "--map" in found.detail


def test_an_answer_with_a_picture_drops_the_row(tmp_path):
    """It would be trained on as the letters `<image>`."""
    answer = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "This one."}]
    assert read_one(tmp_path, conversation(answer=answer)) == "unread media"
    row = conversation()
    row["chosen"][0]["images"] = ["a.png"]
    assert read_one(tmp_path, row) == "unread media"


def talk(*messages, text="content", role="role", **row):
    """A conversation of (text, fields beside it), the user's first."""
    speakers = ("user", "assistant") if role == "role" else ("human", "gpt")
    said = [{role: speakers[i % 2], text: words, **beside} for i, (words, beside) in enumerate(messages)]
    return {"messages" if role == "role" else "conversations": said, **row}


@pytest.mark.parametrize("form", [{}, {"text": "value", "role": "from"}], ids=["ms_swift", "llava"])
@pytest.mark.parametrize(
    ("questions", "expected"),
    [
        ([("What 1?", {"images": ["a.png"]})], ("a.png",)),
        ([("What 1?", {"image": "a.png"})], ("a.png",)),
        ([("<image>\nWhat 1?", {"image_path": "a.png"})], ("a.png",)),
        ([("What 1?", {"images": [], "weight": 1.0, "name": "Ann"})], ()),
        (
            [("What 1?", {"images": ["a.png"]}), ("What 2?", {"images": ["b.png", "c.png"]})],
            ("a.png", "b.png", "c.png"),
        ),
        ([("What 1?", {}), ("What 2?", {"images": ["b.png"]})], ("b.png",)),
        ([([{"type": "image"}, {"type": "text", "text": "What 1?"}], {"images": ["a.png"]})], ("a.png",)),
        (
            [([{"type": "image"}, {"type": "text", "text": "What 1?"}], {}), ("What?", {"image": "a.png"})],
            "unread media",
        ),
        ([("What 1?", {"video": "a.mp4"})], "unread media"),
        ([("What 1?", {"attachment": "a.png"})], "unread media"),
    ],
    ids=str,
)
def test_a_picture_beside_the_content_of_a_message_is_read(tmp_path, form, questions, expected):
    messages = [message for question in questions for message in (question, ("An answer.", {}))]
    assert read_one(tmp_path, talk(*messages, **form)) == expected


def test_pictures_beside_messages_belong_to_these(tmp_path):
    messages = [("What 1?", {}), ("A cup.", {}), ("What 2?", {"images": ["a.png", "b.png"]}), ("A plate.", {})]
    source = write_lines(tmp_path / "in", [talk(*messages)], {"a.png": image_bytes(1), "b.png": image_bytes(2)})
    assert pack(PackOptions(source=source, out=tmp_path / "set")).complete
    ((sample, files),) = read_all(tmp_path / "set")
    assert files == [image_bytes(1), image_bytes(2)]
    assert [part["type"] for part in sample["prompt"][0]["content"]] == ["text"]
    assert [part["type"] for part in sample["prompt"][2]["content"]] == ["image", "image", "text"]


def test_a_picture_within_the_text_of_rlhf_v_is_read(tmp_path):
    inner = {"question": "What is this?", "chosen": "A cup.", "rejected": "A plate."}
    assert read_one(tmp_path, {"text": json.dumps(inner | {"image": "a.png"})}) == ("a.png",)
    assert read_one(tmp_path, {"text": json.dumps(inner | {"image": "a.png"}), "image": "b/a.png"}) == ("b/a.png",)
    assert read_one(tmp_path, {"text": json.dumps(inner | {"video": "a.mp4"})}) == "unread media"


# -- texts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt",
    ["<video>\nWhat happens?", "What happens? <audio>", "Look:\n<image_1>\nWhat?", "<|image_pad|>What?", "<img> What?"],
)
def test_a_prompt_that_names_media_and_gets_none_drops_the_row(tmp_path, prompt):
    source = write_lines(tmp_path, [PAIR | {"prompt": prompt}])
    (found,) = find_reader(source)[1].read(source, [])
    assert found.reason == "unread media" and "--map image=COLUMN" in found.detail
    assert read(source, image="") == [()]  # the user says that it is a word like others
    with_image = read_one(tmp_path, PAIR | {"prompt": prompt, "image": "a.png"})
    assert with_image == ("unread media" if "video" in prompt or "audio" in prompt else ("a.png",))


@pytest.mark.parametrize(
    "prompt",
    ["What does the <video> element do?", "<video src='a.mp4'></video>\nMend it.", "<imagine> it", "a < image>"],
)
def test_what_is_a_word_in_a_text_stays_one(tmp_path, prompt):
    assert read_one(tmp_path, PAIR | {"prompt": prompt}) == ()


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize("text", [IN_BASE64, f"![a cup](data:image/jpeg;base64,{IN_BASE64}) What is it?"])
def test_a_picture_in_a_text_is_not_trained_on_as_letters(tmp_path, field, text):
    source = write_lines(tmp_path, [PAIR | {field: text}])
    (found,) = find_reader(source)[1].read(source, [])
    assert found.reason == "unread media" and "--map image=COLUMN" in found.detail and len(found.detail) < 300


def test_a_placeholder_without_a_picture_names_the_way_out(tmp_path):
    source = write_lines(tmp_path, [PAIR | {"prompt": "<image>What?"}])
    result = pack(PackOptions(source=source, out=tmp_path / "set"))
    (example,) = result.tally.examples["image-token mismatch"]
    assert "--map image=COLUMN" in example["detail"]
    assert read_one(tmp_path, conversation(answer=[{"type": "text", "text": 5}])) == "malformed row"


# -- tars --------------------------------------------------------------------------------------------------------------

ROW = json.dumps(PAIR).encode()


def read_tar(tmp_path, *members, **mapping):
    return read(tar_of(tmp_path / "a.tar", members), **mapping)


def test_pictures_of_other_formats_in_a_tar_are_packed(tmp_path):
    formats = {"gif": "GIF", "bmp": "BMP", "tif": "TIFF", "jfif": "JPEG", "png": "PNG"}
    members = []
    for extension, format in formats.items():
        row = json.dumps(PAIR | {"prompt": f"What is this {format}?", "image": f"0.{extension}"}).encode()
        members += [(f"{extension}.json", row), (f"{extension}.{extension}", image_bytes(3, format))]
    source = tar_of(tmp_path / "a.tar", members)
    result = pack(PackOptions(source=source, out=tmp_path / "set"))
    assert result.complete and result.tally.drops == {} and result.tally.with_images == 5
    assert result.tally.recoded == {"GIF": 1, "BMP": 1, "TIFF": 1}
    kinds = [sample["images"][0]["member"] for sample, _ in read_all(tmp_path / "set")]
    assert sorted(kinds) == ["jpg", "png", "png", "png", "png"]


def test_a_member_is_a_picture_by_what_it_is(tmp_path):
    assert read_tar(tmp_path, ("0.json", ROW), ("0.bin", PNG)) == [(ImageBytes(PNG, "0.bin"),)]
    assert read_tar(tmp_path, ("0.json", ROW), ("0.txt", b"a caption"), ("0.cls", b"3")) == [()]


@pytest.mark.parametrize(
    "member", [("0.mp4", FILM), ("0.dat", FILM), ("0.heic", b"\0\0\0\x18ftypheic"), ("0.png", "1.png")], ids=str
)
def test_a_member_that_cannot_be_read_drops_the_sample(tmp_path, member):
    assert read_tar(tmp_path, ("0.json", ROW), member) == ["unread media"]
    assert read_tar(tmp_path, ("0.json", ROW), ("0.jpg", JPEG), ("0.wav", b"RIFF....WAVE")) == ["unread media"]
    assert read_tar(tmp_path, ("0.json", ROW), member, image="") == [()]


def test_a_member_that_is_too_large_is_not_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr("data_tools.readers.tars.MAX_MEMBER_BYTES", len(ROW))
    assert read_tar(tmp_path, ("0.json", ROW), ("0.png", PNG)) == ["unread media"]
    assert read_tar(tmp_path, ("0.json", ROW + b" "), ("0.txt", b"x")) == ["ambiguous key"]


def test_pictures_of_one_key_are_in_the_order_of_their_numbers(tmp_path):
    numbers = (10, 2, 1)
    members = [("0.json", ROW), *((f"0.img{number}.png", image_bytes(number)) for number in numbers)]
    assert read_tar(tmp_path, *members) == [tuple(ImageBytes(image_bytes(n), f"0.img{n}.png") for n in (1, 2, 10))]
    named = json.dumps(PAIR | {"images": ["x/0.img2.png", "x/0.img10.png", "x/0.img1.png"]}).encode()
    (images,) = read_tar(tmp_path, ("0.json", named), *members[1:])
    assert [image.name for image in images] == ["0.img2.png", "0.img10.png", "0.img1.png"]  # as the row says


def test_a_row_that_names_more_pictures_than_the_tar_has(tmp_path):
    named = json.dumps(PAIR | {"images": ["a.png", "b.png"]}).encode()
    assert read_tar(tmp_path, ("0.json", named), ("0.png", PNG)) == ["unread media"]
    assert read_tar(tmp_path, ("0.json", named), ("0.png", PNG), image="png") == [(ImageBytes(PNG, "0.png"),)]
    result = pack(PackOptions(source=tar_of(tmp_path / "b.tar", [("0.json", named), ("1.json", ROW)]),
                              out=tmp_path / "set", max_drop=0.5))  # fmt: skip
    assert result.tally.drops == {"missing image": 1}


def test_what_a_row_says_about_its_member_is_no_other_picture(tmp_path):
    """As img2dataset writes it: where the picture was found, and what it was called."""
    row = PAIR | {
        "url": "https://example.org/x/7.jpg?w=3",
        "file_name": "7.jpg",
        "image": "7.jpg",
        "image_source": "web",
    }
    assert read_tar(tmp_path, ("0.json", json.dumps(row).encode()), ("0.jpg", JPEG)) == [(ImageBytes(JPEG, "0.jpg"),)]
    film = json.dumps(PAIR | {"video": "a.mp4"}).encode()
    assert read_tar(tmp_path, ("0.json", film), ("0.jpg", JPEG)) == ["unread media"]
    assert read_tar(tmp_path, ("0.json", film), ("0.jpg", JPEG), image="jpg") == [(ImageBytes(JPEG, "0.jpg"),)]


def test_a_row_in_a_tar_may_hold_its_own_picture(tmp_path):
    row = json.dumps(PAIR | {"image": IN_BASE64}).encode()
    assert read_tar(tmp_path, ("0.json", row)) == [(ImageBytes(JPEG),)]


def test_a_tar_whose_keys_are_not_together_is_refused(tmp_path, capsys):
    """All rows, then all pictures: read in one go every sample would be without its picture."""
    members = [(f"{i}.json", ROW) for i in range(3)] + [(f"{i}.png", image_bytes(i)) for i in range(3)]
    source = tar_of(tmp_path / "unsorted.tar", members)
    assert main(["pack", str(source), "--out", str(tmp_path / "set")]) == 2
    shown = capsys.readouterr().err
    assert "unsorted.tar: its members are not sorted, those of key 0 are not together" in shown
    assert "tar --sort=name" in shown and not (tmp_path / "set").exists()
    tar_of(source, sorted(members))
    assert main(["pack", str(source), "--out", str(tmp_path / "set"), "--max-drop", "1", "-q"]) == 0


def test_what_the_mac_adds_to_a_tar_is_no_member(tmp_path):
    members = [("0.json", ROW), ("._0.png", b"\0\5\x16\7"), ("0.png", PNG), ("._1.json", b"\0"), ("1.json", ROW)]
    assert read_tar(tmp_path, *members) == [(ImageBytes(PNG, "0.png"),), ()]


def test_images_of_needs_no_file(tmp_path):
    assert images_of({"image": "a.png"}, "") == ()
    assert images_of({"x": ["a.png"]}, "x.0") == ("a.png",)
