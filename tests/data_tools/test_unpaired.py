"""Single answers with a label, from TRL's unpaired format to packed sets, and in every command that shows a set."""

from __future__ import annotations

import csv
import json

import pytest

from data_tools.__main__ import main
from data_tools.letters import LetterProcessor, letter_lengths
from data_tools.preview import read_shown, to_html
from data_tools.readers import find_reader
from data_tools.records import Drop
from data_tools.sheet import draw_sheet
from data_tools.validate import validate
from data_tools.where import parse_where
from pivot.data.samples import all_completions, check_sample
from pivot.data.shards import ShardSet
from tests.kit.sets import answer_rows, make_answer_set, write_rows


def pack(source, out, *more: str) -> int:
    return main(["pack", str(source), "--out", str(out), *more])


def test_trls_unpaired_rows_are_found_out_and_packed(tmp_path):
    """24 answers, every third of them bad; nothing but the label says which."""
    shards = make_answer_set(tmp_path)
    assert (shards.kind, len(shards)) == ("unpaired", 24)
    samples = [shards.read_text(row) for row in range(24)]
    assert sum(sample["label"] for sample in samples) == 16
    for sample in samples:
        number = int(sample["id"].rpartition("r")[2])
        assert sample["label"] == (number % 3 != 2) and len(sample["images"]) == bool(number % 7)
        assert list(all_completions(sample)) == ["chosen" if sample["label"] else "rejected"]
        assert "chosen" not in sample and "rejected" not in sample
    assert validate(shards.folder).problems == []


@pytest.mark.parametrize(("label", "wanted"), [(True, True), (False, False), (1, True), (0, False), ("False", False)])
def test_texts_will_do_and_labels_have_many_spellings(tmp_path, label, wanted):
    row = {"prompt": "What is it?", "completion": "A cup.", "label": label}
    name, reader = find_reader(write_rows(tmp_path, [row]))
    [record] = reader.read(tmp_path / "source.json", [])
    assert name == "trl" and (record.label, record.kind, record.chosen) == (wanted, "unpaired", "A cup.")


def test_a_csv_of_answers(tmp_path):
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("prompt", "completion", "label"), ("What?", "A cup.", "True"), ("What?", "No.", "false")])
    assert pack(tmp_path / "rows.csv", tmp_path / "set") == 0
    shards = ShardSet.open(tmp_path / "set")
    assert sorted(shards.read_text(row)["label"] for row in range(2)) == [False, True]


@pytest.mark.parametrize("label", [None, 3, "good", [True], 0.5])
def test_a_label_that_says_neither_is_a_drop(tmp_path, label):
    rows = [{"prompt": "What?", "completion": "A cup.", "label": True}]
    rows.append({"prompt": "Where?", "completion": "There.", "label": label})
    _, reader = find_reader(write_rows(tmp_path, rows))
    good, bad = reader.read(tmp_path / "source.json", [])
    assert good.label is True
    assert isinstance(bad, Drop) and "field label holds" in bad.detail and "expected true" in bad.detail


def test_a_column_can_be_named_as_the_label(tmp_path):
    rows = [{"question": "What?", "response": "A cup.", "liked": liked} for liked in (True, False)]
    source = write_rows(tmp_path, rows)
    mapping = [f"--map={field}" for field in ("prompt=question", "chosen=response", "label=liked")]
    assert pack(source, tmp_path / "set", *mapping) == 0
    shards = ShardSet.open(tmp_path / "set")
    assert shards.kind == "unpaired" and len(shards) == 2  # one answer with both labels is two samples


def test_our_own_shards_can_be_packed_again(tmp_path):
    shards = make_answer_set(tmp_path)
    assert pack(shards.folder / "shards", tmp_path / "again") == 0
    again = ShardSet.open(tmp_path / "again")
    facts = [
        sorted(
            (s["label"], json.dumps(s["prompt"]), json.dumps(s["completion"])) for s in map(one.read_text, range(24))
        )
        for one in (shards, again)
    ]
    assert again.kind == "unpaired" and facts[0] == facts[1]


def test_pairs_and_single_answers_do_not_go_into_one_set(tmp_path):
    rows, images = answer_rows(4)
    messages = [{"role": "user", "content": "What?"}]
    pair = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    source = write_rows(tmp_path, [*rows, {"prompt": messages, **pair}], images)
    assert pack(source, tmp_path / "set", "--max-drop", "0.5") == 0
    assert ShardSet.open(tmp_path / "set").manifest["drops"] == {"another kind": 1}


def test_info_counts_the_labels(tmp_path, capsys):
    shards = make_answer_set(tmp_path)
    assert main(["info", str(shards.folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["labels"] == {"desirable": 16, "undesirable": 8}
    assert facts["letters"]["rejected"]["min"] == len("no idea") and facts["letters"]["chosen"]["min"] == len("red")
    assert main(["info", str(shards.folder)]) == 0
    assert "16 desirable, 8 undesirable" in capsys.readouterr().out


def test_previews_show_the_label(tmp_path):
    shards = make_answer_set(tmp_path)
    rows = [next(row for row in range(24) if shards.read_text(row)["label"] == label) for label in (True, False)]
    page = to_html(shards, read_shown(shards, rows), "answers")
    assert "<h3>desirable<" in page and "<h3>undesirable<" in page and 'class="rejected"' in page
    assert draw_sheet(read_shown(shards, rows), "answers").size[1] > 100


def test_conditions_read_a_desirable_answer_as_chosen(tmp_path):
    shards = make_answer_set(tmp_path)
    for row in range(24):
        sample = shards.read_text(row)
        assert parse_where("words_rejected>0").holds(row, sample) == (not sample["label"])
        assert parse_where("chosen~red").holds(row, sample) == (sample["label"] and "red" in str(sample["completion"]))


def test_letters_stand_in_for_tokens(tmp_path):
    """As the loader would check it: each row has one answer, by its label."""
    shards = make_answer_set(tmp_path)
    lengths = letter_lengths(shards)
    for row in range(24):
        sample = shards.read_text(row)
        encoded = LetterProcessor().encode(sample["prompt"], all_completions(sample)).completions
        assert lengths.chosen[row] == len(encoded.get("chosen", ()))
        assert lengths.rejected[row] == len(encoded.get("rejected", ()))


@pytest.mark.parametrize("command", ["simulate", "split"])
def test_other_commands_take_the_kind(tmp_path, command):
    shards = make_answer_set(tmp_path)
    more = {
        "simulate": ["--global-batch-size", "8", "--steps", "2"],
        "split": ["--eval", "0.3", "--out", str(tmp_path / "o")],
    }
    assert main([command, str(shards.folder), *more[command]]) == 0
    if command == "split":
        assert {ShardSet.open(tmp_path / "o" / name).kind for name in ("train", "eval")} == {"unpaired"}


def test_the_contract_of_a_sample():
    sample = {"v": 1, "id": "a", "kind": "unpaired", "prompt": [{"role": "user", "content": "What?"}], "images": []}
    answer = {"completion": [{"role": "assistant", "content": "A cup."}]}
    check_sample(sample | answer | {"label": False})
    with pytest.raises(ValueError, match="field label is None, expected true"):
        check_sample(sample | answer)
    with pytest.raises(ValueError, match="field completion must be a non-empty list"):
        check_sample(sample | {"label": True})
