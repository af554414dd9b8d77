"""Each format is told apart and read; malformed rows are dropped one by one."""

import json

import pytest

from data_tools.__main__ import main
from data_tools.readers import READERS, find_reader, mmpr
from data_tools.records import Drop

GOOD = {"question": "What?", "chosen": "A cup.", "rejected": "No."}


@pytest.fixture
def mmpr_folder(tmp_path):
    """Two sets as MMPR is released: paths of the first count from the folder, of the second from the one above."""
    folder = tmp_path / "MMPR-v1.2"
    (folder / "annotations").mkdir(parents=True)
    rows = [GOOD | {"image": "a.png"}, GOOD | {"image": ["a.png", "b.png"], "answer_gt": "7"}, GOOD]
    (folder / "annotations" / "one.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (folder / "annotations" / "two.jsonl").write_text('{"question": 1}\n[]\n{"question"\n' + json.dumps(GOOD))
    meta = {
        "one": {"root": "images/one", "annotation": "annotations/one.jsonl", "repeat_time": 0.5, "length": 3},
        "two": {"root": "MMPR-v1.2/images", "annotation": "MMPR-v1.2/annotations/two.jsonl"},
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def test_mmpr(mmpr_folder):
    records = list(mmpr.read(mmpr_folder, []))
    assert [record.id for record in records[:3]] == ["one/000000", "one/000001", "one/000002"]
    assert [record.images for record in records[:3]] == [("a.png",), ("a.png", "b.png"), ()]
    assert records[0].folders[0] == str(mmpr_folder / "images" / "one")
    assert (records[1].answer, records[1].repeat_time, records[1].source) == ("7", 0.5, "one")
    assert [drop.reason for drop in records[3:6]] == ["malformed row"] * 3
    assert records[6].prompt == "What?"
    assert str(mmpr_folder / "images") in records[6].folders


def test_mmpr_takes_the_folder_or_its_meta(mmpr_folder):
    assert find_reader(mmpr_folder, "auto")[0] == find_reader(mmpr_folder / "meta.json", "auto")[0] == "mmpr"
    assert list(mmpr.read(mmpr_folder, [])) == list(mmpr.read(mmpr_folder / "meta.json", []))


def test_mmpr_by_another_name(mmpr_folder):
    (mmpr_folder / "meta.json").rename(mmpr_folder / "meta_small.json")
    assert find_reader(mmpr_folder / "meta_small.json", "auto")[0] == "mmpr"


def test_mmpr_without_its_annotation_names_it(mmpr_folder):
    (mmpr_folder / "annotations" / "two.jsonl").unlink()
    with pytest.raises(
        ValueError, match=r"annotation MMPR-v1.2/annotations/two.jsonl of two is not there.*--image-root"
    ):
        list(mmpr.read(mmpr_folder, []))


@pytest.mark.parametrize(
    ("key", "value"),
    [("repeat_time", None), ("repeat_time", "x"), ("repeat_time", "2"), ("repeat_time", True), ("repeat_time", [1]),
     ("repeat_time", -1), ("repeat_time", float("nan")), ("repeat_time", float("inf")), ("repeat_time", 10**400),
     ("root", 5), ("root", ["images"])],
)  # fmt: skip
def test_a_wrong_entry_of_mmprs_meta_is_named(mmpr_folder, tmp_path, capsys, key, value):
    """Before anything is packed, though the entry is the last."""
    meta = json.loads((mmpr_folder / "meta.json").read_text())
    meta["two"][key] = value
    (mmpr_folder / "meta.json").write_text(json.dumps(meta))
    assert main(["pack", str(mmpr_folder), "--out", str(tmp_path / "set")]) == 2
    shown = capsys.readouterr().err
    assert f"{mmpr_folder}/meta.json: {key} of 'two' is {json.loads(json.dumps(value))!r}, expected" in shown
    assert not (tmp_path / "set").exists()


ROWS = [
    {"id": "x/1", "prompt": "<image>\nWhat?", "chosen": "A.", "rejected": "B.", "image": "a.png", "answer": "A"},
    {"prompt": "What?", "chosen": "A.", "rejected": "B."},
    {"id": 3, "prompt": "What?", "chosen": "A.", "rejected": None},
    {"id": 4, "prompt": "What?", "chosen": "A.", "rejected": "B.", "image": 5},
    {"id": 5, "prompt": "What?", "chosen": "A.", "rejected": "B.", "image": "a.png", "image_rejected": "b.png"},
    "text",
]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_llava_dpo(tmp_path, suffix):
    path = tmp_path / f"pairs{suffix}"
    path.write_text(json.dumps(ROWS) if suffix == ".json" else "\n".join(map(json.dumps, ROWS)))
    assert find_reader(path, "auto")[0] == "llava_dpo"
    records = list(READERS["llava_dpo"].read(path, [tmp_path / "coco"]))
    assert (records[0].id, records[0].images, records[0].answer) == ("pairs/x/1", ("a.png",), "A")
    assert records[0].folders == (str(tmp_path / "coco"), str(tmp_path))
    assert (records[1].id, records[1].images) == ("pairs/000000001", ())
    assert [drop.reason for drop in records[2:]] == [
        "malformed row",
        "malformed row",
        "rejected image not supported",
        "malformed row",
    ]
    assert all(isinstance(drop, Drop) for drop in records[2:])


def test_an_unknown_source_is_an_error(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="none of the known formats"):
        find_reader(tmp_path / "x.json", "auto")
    with pytest.raises(ValueError, match="does not exist"):
        find_reader(tmp_path / "y.json", "auto")
