"""What every format shares: values that are no text, prompts that answers repeat, files that are not what they say."""

import json

import pytest

from data_tools.__main__ import main
from data_tools.pack import PackOptions, pack
from data_tools.readers import find_reader
from data_tools.readers.rows import Place, accepted_of, label_of
from data_tools.records import Drop, Malformed
from data_tools.where import parse_where
from pivot.data.shards import ShardSet
from pivot.evaluate.answers import accepted_answers, is_right
from tests.kit.sets import image_bytes

PAIR = {"prompt": "What is this?", "chosen": "A cup.", "rejected": "A plate."}


def read(path, *rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return list(find_reader(path)[1].read(path, []))


def read_one(tmp_path, row):
    (found,) = read(tmp_path / "rows.jsonl", row)
    return found


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("cup", "cup"),
        (["cup", "mug"], ("cup", "mug")),
        (["cup"], ("cup",)),
        (["cup", None, float("nan"), "", "7"], ("cup", "7")),
        (None, None),
        (float("nan"), None),
        ("", None),
        ([], None),
        ([None], None),
        ({}, None),
    ],
    ids=str,
)
def test_an_answer_is_text_or_several_or_absent(value, expected):
    assert accepted_of({"answer": value}) == expected


@pytest.mark.parametrize(
    "value", [7, 3.0, 0.5, True, {"text": "cup"}, [["cup"]], ["cup", 3.0], ["cup", 7], [{"answer": "cup"}]], ids=str
)
def test_an_answer_that_is_no_text_is_refused(tmp_path, value):
    with pytest.raises(Malformed, match="field answer holds .*, expected text or a list of equally right texts"):
        accepted_of({"answer": value})
    found = read_one(tmp_path, PAIR | {"answer": value})
    assert isinstance(found, Drop) and found.reason == "malformed row" and "answer" in found.detail


ROWS = {
    "llava_dpo": (PAIR, "answer"),
    "mmpr": ({"question": "What is this?", "chosen": "A cup.", "rejected": "A plate."}, "answer_gt"),
    "trl": ({"prompt": "What?", **{role: [{"role": "assistant", "content": role}] for role in ("chosen", "rejected")}},
            "answer"),
}  # fmt: skip


@pytest.mark.parametrize("format", ROWS)
def test_each_format_that_has_answers_keeps_them_as_they_are(tmp_path, format):
    row, field = ROWS[format]
    found = read(tmp_path / "rows.jsonl", *(row | {field: value} for value in (["a", "b"], float("nan"), "c", 2.0)))
    assert [getattr(one, "answer", "dropped") for one in found] == [("a", "b"), None, "c", "dropped"]


def test_a_list_of_answers_reaches_the_evaluation(tmp_path, capsys):
    """From the row to the shard, to `--where`, to the page and to what counts as right; shards of one shape each."""
    rows = [
        PAIR | {"prompt": f"What is {i}?", "answer": answer} for i, answer in enumerate((["cup", "mug"], "cup", None))
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "set"
    assert main(["pack", str(tmp_path / "rows.jsonl"), "--out", str(out), "--workers", "1"]) == 0
    shards = ShardSet.open(out)
    samples = sorted((shards.read_text(row) for row in range(3)), key=lambda sample: sample["id"])
    assert [sample["answer"] for sample in samples] == [["cup", "mug"], "cup", None]
    assert len({shard.shape for shard in shards.shards}) == 3
    accepted = accepted_answers(samples[0])
    assert is_right("A mug.", accepted) and is_right("cup", accepted) and not is_right("['cup', 'mug']", accepted)
    found = {text: [parse_where(text).holds(0, sample) for sample in samples]
             for text in ("answer=mug", "answer!=mug", "answer~^c", "answer=")}  # fmt: skip
    assert found == {
        "answer=mug": [True, False, False],
        "answer!=mug": [False, True, True],
        "answer~^c": [True, True, False],
        "answer=": [False, False, True],
    }
    assert main(["preview", str(out), "--out", str(tmp_path / "page.html"), "-q"]) == 0
    assert "answer cup or mug" in (tmp_path / "page.html").read_text()
    assert main(["validate", str(out), "-q"]) == 0
    assert main(["pack", str(tmp_path / "rows.jsonl"), "--show-mapping"]) == 0
    assert "cup or mug" in capsys.readouterr().out
    again = pack(PackOptions(source=out / "shards", out=tmp_path / "again"))
    assert again.complete and again.num_samples == 3


# -- labels ------------------------------------------------------------------------------------------------------------


LABELLED = {
    "id": (PAIR, "id"),
    "trl": (ROWS["trl"][0], "source"),
    "rlaif_v": (ROWS["mmpr"][0], "ds_name"),
    "llava": ({"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A."}]}, "data_source"),
}


@pytest.mark.parametrize("value", [None, "", float("nan"), {}, []], ids=str)
@pytest.mark.parametrize("format", LABELLED)
def test_a_label_that_is_absent_is_that_of_the_file(tmp_path, format, value):
    row, field = LABELLED[format]
    found = read_one(tmp_path, row | {field: value})
    assert (found.source, found.id) == ("rows", "rows/000000000")


@pytest.mark.parametrize("value", [3.0, True, {"a": 1}, ["x"], [None, "x"]], ids=str)
@pytest.mark.parametrize("format", LABELLED)
def test_a_label_that_is_no_text_drops_the_row(tmp_path, format, value):
    row, field = LABELLED[format]
    found = read_one(tmp_path, row | {field: value})
    assert isinstance(found, Drop) and (found.reason, found.id) == ("malformed row", "rows/000000000")
    assert found.detail == f"field {field} holds {value}, expected text or a whole number"


def test_a_label_is_text_or_a_whole_number():
    assert [label_of({"id": value}, "id") for value in ("x", 12, 0)] == ["x", "12", "0"]
    assert Place("set", "7").id_of({"id": 0}) == "set/0"


# -- prompts that answers repeat ---------------------------------------------------------------------------------------


def said(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


PROMPTS = [said("What is this?"), "What is this?", said("Hello.", "Hi.", "<image>What is this?")]


@pytest.mark.parametrize("prompt", PROMPTS, ids=str)
def test_whole_conversations_lose_the_prompt_once(tmp_path, prompt):
    messages = said("What is this?") if isinstance(prompt, str) else prompt
    bare = [message | {"content": message["content"].replace("<image>", "")} for message in messages]
    answers = {role: [*bare, {"role": "assistant", "content": role}] for role in ("chosen", "rejected")}
    repeated = read_one(tmp_path, {"prompt": prompt, **answers})
    plain = {role: messages[-1:] for role, messages in answers.items()}
    assert repeated == read_one(tmp_path, {"prompt": prompt, **plain})
    assert (repeated.chosen, repeated.rejected) == ("chosen", "rejected")


def test_another_conversation_is_not_taken_for_the_prompt(tmp_path):
    row = {
        "prompt": said("What is this?"),
        "chosen": said("What is that?", "A"),
        "rejected": said("What is this?", "B"),
    }
    assert "alone or behind the messages of the prompt" in read_one(tmp_path, row).detail
    swift = {"messages": said("What is this?", "A"), "rejected_messages": said("What is this?", "B")}
    assert read_one(tmp_path, swift).rejected == "B"


def test_sharegpt_answers_may_be_whole_conversations(tmp_path):
    human = [{"from": "human", "value": "What is this?"}]
    row = {
        "conversations": human,
        **{role: [*human, {"from": "gpt", "value": role}] for role in ("chosen", "rejected")},
    }
    found = read_one(tmp_path, row)
    assert (found.prompt, found.chosen, found.rejected) == ("What is this?", "chosen", "rejected")


@pytest.mark.parametrize("between", [" ", "\n", "\n\nASSISTANT: "])
@pytest.mark.parametrize("mark", ["", "<image>\n"])
def test_texts_lose_the_prompt_once(tmp_path, capsys, mark, between):
    answers = {role: f"{mark}{PAIR['prompt']}{between}{PAIR[role]}" for role in ("chosen", "rejected")}
    found = read_one(tmp_path, PAIR | answers)
    rest = between.strip() and f"{between.strip()} "
    assert (found.chosen, found.rejected) == (f"{rest}A cup.", f"{rest}A plate.") and found.prompt_taken_off
    assert main(["pack", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "set"), "--workers", "1"]) == 0
    assert "both answers of 1 pair began with the prompt; it was taken off" in capsys.readouterr().out


@pytest.mark.parametrize(
    "row",
    [
        PAIR | {"chosen": "What is this? A cup."},  # one answer alone
        {"prompt": "The end", "chosen": "The end is near", "rejected": "The end is far"},  # by chance
        {"prompt": "Is it a cup", "chosen": "Is it a cupboard?", "rejected": "Is it a cup, no"},  # within a word
        PAIR | {"chosen": "What is this?", "rejected": "What is this? No."},  # nothing would be left
        {"query": "What is this?", "response": "What is this? A cup."},  # SFT: may be meant
    ],
    ids=str,
)
def test_what_is_no_repetition_is_kept(tmp_path, row):
    found = read_one(tmp_path, row)
    assert found.chosen == row.get("chosen", row.get("response")) and not found.prompt_taken_off
    assert found.rejected == row.get("rejected")


# -- JSON by another name ----------------------------------------------------------------------------------------------

TWO = [PAIR, PAIR | {"chosen": "A mug."}]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(TWO),
        json.dumps(TWO, indent=2),
        "\n".join(map(json.dumps, TWO)),
        "\n\n" + "\r\n".join(map(json.dumps, TWO)) + "\n",
        "\ufeff" + "\n".join(map(json.dumps, TWO)),
        "\ufeff" + json.dumps(TWO),
    ],
    ids=range(6),
)
def test_an_array_and_lines_are_told_by_their_text(tmp_path, text, suffix):
    path = tmp_path / f"rows{suffix}"
    path.write_text(text)
    assert find_reader(path)[0] == "llava_dpo"
    assert [row.chosen for row in find_reader(path)[1].read(path, [])] == ["A cup.", "A mug."]


def test_one_row_alone_is_a_row(tmp_path):
    assert read(tmp_path / "a.json", PAIR)[0].chosen == "A cup."
    (tmp_path / "b.json").write_text(json.dumps({"data": TWO}, indent=1))
    with pytest.raises(ValueError, match="b.json holds a dict, expected a list of rows, or a row a line"):
        list(find_reader(tmp_path / "b.json", "llava_dpo")[1].read(tmp_path / "b.json", []))


def test_a_line_that_is_no_row_does_not_make_an_array_of_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_text("[]\n" + json.dumps(PAIR) + "\n[1, 2]\n{\n")
    found = list(find_reader(tmp_path / "a.jsonl", "llava_dpo")[1].read(tmp_path / "a.jsonl", []))
    assert [isinstance(row, Drop) for row in found] == [True, False, True, True]


def test_an_annotation_of_mmpr_may_be_an_array(tmp_path):
    row, _ = ROWS["mmpr"]
    (tmp_path / "a.jsonl").write_text(json.dumps([row, row]))
    (tmp_path / "meta.json").write_text(json.dumps({"a": {"root": ".", "annotation": "a.jsonl"}}))
    assert [found.id for found in find_reader(tmp_path)[1].read(tmp_path, [])] == ["a/000000", "a/000001"]


# -- the pack as a whole -----------------------------------------------------------------------------------------------


def test_duplicates_do_not_count_against_the_limit(tmp_path):
    """Half of the rows are dropped and nothing is lost; one more row that is lost is over the limit."""
    rows = [PAIR | {"prompt": f"What is {i}?"} for i in range(4)] * 2
    source = tmp_path / "rows.json"
    source.write_text(json.dumps(rows))
    result = pack(PackOptions(source=source, out=tmp_path / "set"))
    assert result.complete and result.tally.drops == {"duplicate": 4} and result.tally.drop_ratio == 0
    source.write_text(json.dumps([*rows, PAIR | {"chosen": ""}]))
    result = pack(PackOptions(source=source, out=tmp_path / "other"))
    assert not result.complete and result.tally.drop_ratio == 1 / 9


class Cut(Exception):
    pass


def test_neither_workers_nor_an_interruption_change_anything_of_it(tmp_path):
    """Images that are written as PNG, lists of answers, a duplicate and a drop: the same set and the same report."""
    rows = []
    for i in range(40):
        format = ("GIF", "BMP", "PNG")[i % 3]
        (tmp_path / f"{i}.{format}").write_bytes(image_bytes(i, format))
        rows.append(PAIR | {"prompt": f"What is {i}?", "img_path": f"{i}.{format}", "answer": ["a", "b"][: i % 3]})
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(map(json.dumps, [*rows, rows[0], PAIR | {"video": "a.mp4"}])))

    def stop(tally):
        if tally.rows == 30:
            raise Cut

    settings = {"source": source, "max_drop": 0.1, "samples_per_shard": 7}
    with pytest.raises(Cut):
        pack(PackOptions(out=tmp_path / "set2", **settings), stop)
    results = [pack(PackOptions(out=tmp_path / f"set{n}", workers=n, **settings)) for n in (1, 2)]
    assert results[0] == results[1] and results[0].tally.drops == {"duplicate": 1, "unread media": 1}
    assert results[0].tally.recoded == {"GIF": 14, "BMP": 13} and results[0].tally.with_images == 40
    one, other = (ShardSet.open(tmp_path / f"set{n}") for n in (1, 2))
    assert one.fingerprint == other.fingerprint
