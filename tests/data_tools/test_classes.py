"""A folder a class becomes pairs whose right answer is the folder's name and whose wrong one is another's."""

import shutil
from pathlib import Path

from PIL import Image

from data_tools.__main__ import main
from data_tools.readers import classes, find_reader
from data_tools.records import Drop, Record
from tests.kit.images import save


def make_folders(path: Path) -> Path:
    for name, number in (("dress", 3), ("t_shirt", 2), ("hat", 1)):
        (path / name).mkdir(parents=True)
        for index in range(number):
            (path / name / f"{index}.png").write_bytes(save(Image.new("RGB", (8, 8), (index, 0, 0))))
    return path


def test_each_picture_is_a_pair_of_its_class_and_another(tmp_path):
    folder = make_folders(tmp_path / "set")
    records = list(classes.read(folder, []))
    assert [(record.id, record.chosen) for record in records] == [
        ("dress/0.png", "dress"),
        ("dress/1.png", "dress"),
        ("dress/2.png", "dress"),
        ("hat/0.png", "hat"),
        ("t_shirt/0.png", "t shirt"),
        ("t_shirt/1.png", "t shirt"),
    ]
    for record in records:
        assert record.rejected in {"dress", "hat", "t shirt"} - {record.chosen}
        assert record.answer == record.chosen
        assert "dress, hat, t shirt" in record.prompt


def test_the_wrong_answers_do_not_depend_on_where_the_folder_lies(tmp_path):
    first = make_folders(tmp_path / "set")
    second = tmp_path / "elsewhere" / "set"
    shutil.copytree(first, second)
    wrong = [[record.rejected for record in classes.read(folder, [])] for folder in (first, second)]
    assert wrong[0] == wrong[1]


def test_it_is_recognised_only_where_there_is_nothing_but_classes(tmp_path):
    folder = make_folders(tmp_path / "set")
    assert find_reader(folder)[0] == "classes"
    (folder / ".DS_Store").touch()
    assert find_reader(folder)[0] == "classes"
    (folder / "notes.txt").touch()
    assert not classes.matches(folder)
    (folder / "notes.txt").unlink()
    (folder / "hat" / "labels.json").touch()
    assert not classes.matches(folder)


def test_what_is_no_picture_is_dropped_where_the_format_is_forced(tmp_path):
    folder = make_folders(tmp_path / "set")
    (folder / "hat" / "labels.json").touch()
    found = list(classes.read(folder, []))
    assert [type(record) for record in found].count(Record) == 6
    (dropped,) = [record for record in found if isinstance(record, Drop)]
    assert dropped.id == "hat/labels.json"


def test_one_folder_is_a_sentence(tmp_path, capsys):
    folder = make_folders(tmp_path / "set")
    shutil.rmtree(folder / "hat")
    shutil.rmtree(folder / "t_shirt")
    assert main(["pack", str(folder), "--format", "classes", "--out", str(tmp_path / "out")]) == 2
    assert "expected one a class, at least two" in capsys.readouterr().err
