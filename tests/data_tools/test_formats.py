"""The same four pairs in every preference format give equal samples; SFT formats give equal SFT samples."""

import copy
import io
import json
import tarfile

import pyarrow as pa
import pytest
from pyarrow import parquet

from data_tools.__main__ import main
from data_tools.pack import PackOptions, pack
from data_tools.readers import READERS, find_reader
from data_tools.readers.rows import Place, read_row
from data_tools.records import Drop
from pivot.data.shards import ShardSet
from tests.kit.sets import image_bytes

NAMES = ["0.png", "1.png", None, "3.jpg"]
PAIRS = [(f"What is in picture {i}?", f"A cup number {i}.", f"Two plates {i}.") for i in range(4)]


def file_of(name):
    return image_bytes(int(name[0]), "JPEG" if name.endswith("jpg") else "PNG")


def from_human(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def messages(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def struct(name):
    return None if name is None else {"bytes": file_of(name), "path": name}


def shown(name, text):
    return f"<image>\n{text}" if name else text


def rated(text, rating):
    notes = {aspect: {"Rating": rating, "Rationale": "so"} for aspect in ("Helpfulness", "Visual Faithfulness")}
    return {"annotations": notes, "model": "m", "response": text}


def trl_content(name, text):
    image = [{"type": "image", "text": None}] if name else []
    return [*image, {"type": "text", "text": text}]


ROWS = {
    "llava_dpo": lambda i, name, q, c, r: {"prompt": shown(name, q), "chosen": c, "rejected": r, "image": name},
    "rlaif_v": lambda i, name, q, c, r: {"question": q, "chosen": c, "rejected": r, "image": name},
    "rlhf_v": lambda i, name, q, c, r: {"text": json.dumps({"question": q, "chosen": c, "rejected": r}), "image": name},
    "trl": lambda i, name, q, c, r: {
        "prompt": [{"role": "user", "content": trl_content(name, q)}],
        "chosen": [{"role": "assistant", "content": trl_content(None, c)}],
        "rejected": [{"role": "assistant", "content": trl_content(None, r)}],
        "images": [name] if name else [],
    },
    "vlfeedback": lambda i, name, q, c, r: {
        "prompt": q, "models": ["a", "b"], "completions": [rated(r, "2"), rated(c, "4")], "img_path": name
    },
    "povid": lambda i, name, q, c, r: {
        "id": i,
        "image": name,
        "conversations": from_human(shown(name, q), c),
        "rejected_conversations": from_human(q, r),
    },
    "sharegpt": lambda i, name, q, c, r: {
        "conversations": from_human(shown(name, q)),
        "chosen": {"from": "gpt", "value": c},
        "rejected": {"from": "gpt", "value": r},
        "images": [name] if name else [],
    },
    "ms_swift": lambda i, name, q, c, r: {
        "messages": messages(shown(name, q), c), "rejected_response": r, "images": [name] if name else []
    },
}  # fmt: skip


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in filter(None, NAMES):
        (folder / name).write_bytes(file_of(name))
    return folder


def rows_of(format):
    return [ROWS[format](i, name, *pair) for i, (name, pair) in enumerate(zip(NAMES, PAIRS, strict=True))]


def packed(source, out, **options):
    result = pack(PackOptions(source=source, out=out, **options))
    assert result.complete, result.tally
    shards = ShardSet.open(out)
    return [shards.read(row) for row in range(len(shards))]


def contents(samples):
    """What a sample teaches: texts and image files; where it comes from left out."""
    texts = [[sample.get(field) for field in ("kind", "prompt", "chosen", "rejected")] for sample, _ in samples]
    return [(text, files) for text, (_, files) in zip(texts, samples, strict=True)]


@pytest.fixture
def expected(images, tmp_path):
    rows = [{"question": q, "chosen": c, "rejected": r, "image": n} for n, (q, c, r) in zip(NAMES, PAIRS, strict=True)]
    (tmp_path / "mmpr.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "meta.json").write_text(json.dumps({"a": {"root": "images", "annotation": "mmpr.jsonl"}}))
    return contents(packed(tmp_path / "meta.json", tmp_path / "mmpr"))


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("format", ROWS)
def test_json(images, tmp_path, expected, format, suffix):
    path = tmp_path / f"rows{suffix}"
    rows = rows_of(format)
    path.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)))
    assert find_reader(path)[0] == format
    assert contents(packed(path, tmp_path / "out", image_roots=(images,))) == expected


@pytest.mark.parametrize("format", ROWS)
def test_parquet_with_the_files_inside(tmp_path, expected, format):
    """As the hub stores them: image structs with bytes; two files in a folder, small row groups."""
    rows = rows_of(format)
    for row, name in zip(rows, NAMES, strict=True):
        if "images" in row:
            row["images"] = [struct(name)] if name else []
        row["image"] = struct(name)
        row.pop("img_path", None)
    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    for number, part in enumerate((rows[:3], rows[3:])):
        parquet.write_table(pa.Table.from_pylist(part), folder / f"train-0000{number}-of-2.parquet", row_group_size=2)
    assert find_reader(tmp_path / "hub")[0] == format
    samples = packed(tmp_path / "hub", tmp_path / "out")
    assert contents(samples) == expected
    assert [image["origin"] for sample, _ in samples for image in sample["images"]] == [n for n in NAMES if n]


@pytest.mark.parametrize("format", ["llava_dpo", "trl"])
def test_tars_of_others(tmp_path, expected, format):
    """Members by name; a pickle among them is not opened, and neither is what it would run."""
    with tarfile.open(tmp_path / "foreign-000.tar", "w") as tar:
        for i, (row, name) in enumerate(zip(rows_of(format), NAMES, strict=True)):
            row.pop("image", None)
            members = [("json", json.dumps(row).encode()), ("pyd", b"cos\nsystem\n(S'touch /tmp/run'\ntR.")]
            for extension, data in [*members, *([(name[2:], file_of(name))] if name else [])]:
                member = tarfile.TarInfo(f"part/{i:05d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    assert find_reader(tmp_path / "foreign-000.tar")[0] == "webdataset"
    assert contents(packed(tmp_path / "foreign-000.tar", tmp_path / "out")) == expected


def test_our_own_tars_can_be_packed_again(tmp_path, expected):
    assert contents(packed(tmp_path / "mmpr" / "shards", tmp_path / "out")) == expected
    with pytest.raises(ValueError, match="is packed already; python -m data_tools reshard"):
        pack(PackOptions(source=tmp_path / "mmpr", out=tmp_path / "other"))


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_tables_with_a_mapping(images, tmp_path, expected, suffix):
    mark = "," if suffix == ".csv" else "\t"
    lines = [mark.join(["Q", "good", "bad", "file"])]
    lines += [mark.join([q, c, r, name or ""]) for name, (q, c, r) in zip(NAMES, PAIRS, strict=True)]
    (tmp_path / f"rows{suffix}").write_text("\n".join(lines))
    mapping = {"prompt": "Q", "chosen": "good", "rejected": "bad", "image": "file"}
    samples = packed(tmp_path / f"rows{suffix}", tmp_path / "out", image_roots=(images,), mapping=mapping)
    assert contents(samples) == expected


def test_a_mapping_reaches_into_nested_columns(images, tmp_path, expected):
    rows = [
        {"q": {"text": q}, "answers": [{"t": r}, {"t": c}], "files": [name] if name else []}
        for name, (q, c, r) in zip(NAMES, PAIRS, strict=True)
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    mapping = {"prompt": "q.text", "chosen": "answers.1.t", "rejected": "answers.0.t", "image": "files"}
    assert contents(packed(path, tmp_path / "out", image_roots=(images,), mapping=mapping)) == expected


def test_the_mapping_is_shown(images, tmp_path, capsys):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"Q": "What?", "good": "A", "bad": "B"}]))
    maps = [f"--map={text}" for text in ("prompt=Q", "chosen=good", "rejected=bad")]
    assert main(["pack", str(path), *maps, "--show-mapping", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["format"] == "generic" and shown["rows"][0]["chosen"] == "A"
    assert main(["pack", str(path), "--map=prompt=nope", "--map=chosen=good", "--show-mapping"]) == 1
    assert "there is no column nope" in capsys.readouterr().out
    assert main(["pack", str(path), "--map=color=Q", "--out", str(tmp_path / "x")]) == 2
    assert main(["pack", str(path), "--out", str(tmp_path / "x")]) == 2
    assert "its rows have the fields Q, good, bad" in capsys.readouterr().err


# -- SFT ---------------------------------------------------------------------------------------------------------------


def test_llava_conversations(images, tmp_path):
    turns = from_human("<image>\nWhat?", "A cup.", "Which colour?", "Red.")
    rows = [
        {"id": "a/1", "image": "0.png", "conversations": turns},
        {"id": "a/2", "image": None, "conversations": from_human("Hello?", "Hi.")},
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    assert find_reader(path)[0] == "llava"
    samples = packed(path, tmp_path / "last", image_roots=(images,))
    assert [sample["kind"] for sample, _ in samples] == ["sft", "sft"] and "rejected" not in samples[0][0]
    assert [message["role"] for message in samples[0][0]["prompt"]] == ["user", "assistant", "user"]
    assert samples[0][0]["prompt"][0]["content"][0] == {"type": "image", "image": 0}
    assert samples[0][0]["chosen"][0]["content"] == "Red."
    assert ShardSet.open(tmp_path / "last").manifest["tally"]["untrained_answers"] == 1
    samples = packed(path, tmp_path / "each", image_roots=(images,), turns="each")
    assert [sample["chosen"][0]["content"] for sample, _ in samples] == ["A cup.", "Red.", "Hi."]
    assert [len(files) for _, files in samples] == [1, 1, 0]
    assert main(["validate", str(tmp_path / "each"), "-q"]) == 0
    assert main(["preview", str(tmp_path / "each"), "--out", str(tmp_path / "x.png"), "-q"]) == 0
    assert main(["info", str(tmp_path / "each"), "-q"]) == 0


def test_images_go_to_the_answers_that_see_them(images, tmp_path):
    turns = from_human("<image>\nThis?", "A cup.", "And <image> this?", "A plate.")
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"id": 1, "image": ["0.png", "1.png"], "conversations": turns}]))
    samples = packed(path, tmp_path / "out", image_roots=(images,), turns="each")
    assert [len(files) for _, files in samples] == [1, 2]


@pytest.mark.parametrize(
    ("strategy", "kept"),
    [("all", 10), ("first:20%", [0, 1]), ("end:3", [7, 8, 9]), ("random:4", 4), ("random:50%", 5)],
)
def test_a_mixing_yaml(tmp_path, strategy, kept):
    (tmp_path / "a.json").write_text(
        json.dumps([{"id": i, "conversations": from_human(f"{i}?", "A")} for i in range(10)])
    )
    path = tmp_path / "mix.yaml"
    path.write_text(f"datasets:\n  - json_path: /elsewhere/a.json\n    sampling_strategy: {strategy}\n")
    assert find_reader(path)[0] == "llava_onevision"
    records = list(READERS["llava_onevision"].read(path, []))
    assert len(records) == kept if isinstance(kept, int) else [r.id for r in records] == [f"a/{i}" for i in kept]
    assert records == list(READERS["llava_onevision"].read(path, []))


@pytest.mark.parametrize("strategy", ["first", "first:x", "first:1%%", "some:3", "random:\u00b2"])
def test_a_wrong_strategy_is_named_with_its_file(tmp_path, strategy):
    (tmp_path / "a.json").write_text(json.dumps([{"id": 1, "conversations": from_human("Q?", "A")}]))
    path = tmp_path / "mix.yaml"
    path.write_text(f"datasets:\n  - json_path: a.json\n    sampling_strategy: {strategy}\n")
    with pytest.raises(
        ValueError, match=rf"mix.yaml: sampling_strategy of a.json is {strategy}, expected all, or first"
    ):
        list(READERS["llava_onevision"].read(path, []))


def test_ms_swift_without_a_rejected_answer_is_sft(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages("What?", "A cup.")}))
    assert packed(tmp_path / "a.jsonl", tmp_path / "out")[0][0]["kind"] == "sft"


def test_a_set_is_of_one_kind(tmp_path):
    rows = [{"messages": messages(f"{i}?", "A")} | ({"rejected_response": "B"} if i % 2 else {}) for i in range(6)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = pack(PackOptions(source=tmp_path / "a.jsonl", out=tmp_path / "out"))
    assert result.tally.kind == "sft" and result.tally.drops == {"another kind": 3} and not result.complete


# -- rows that break their format --------------------------------------------------------------------------------------


def from_mmpr(i, name, q, c, r):
    return {"image": name, "question": q, "chosen": c, "rejected": r, "answer_gt": "a"}


EVERY_ROW = ROWS | {
    "mmpr": from_mmpr,
    "webdataset": ROWS["llava_dpo"],
    "llava": lambda i, name, q, c, r: {"id": f"a/{i}", "image": name, "conversations": from_human(shown(name, q), c)},
    "llava_onevision": lambda i, name, q, c, r: {"image": name, "conversations": from_human(q, c, "And?", c)},
    "generic": lambda i, name, q, c, r: {"query": q, "response": c, "rejected": r, "img_path": name},
}
GONE = object()
ODD = [GONE, None, "", "nan", 7, True, 1e308, 10**400, float("nan"), [], [None], [[7]], {}, {"a": 1}, "\ud800"]


def write_source(folder, format, lines):
    """Lines of JSON as a source of the format."""
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(lines))
    if format == "mmpr":
        (folder / "meta.json").write_text(json.dumps({"a": {"root": "images", "annotation": "rows.jsonl"}}))
        return folder / "meta.json"
    if format == "llava_onevision":
        (folder / "mix.yaml").write_text("datasets: [{json_path: rows.jsonl}]")
        return folder / "mix.yaml"
    if format == "webdataset":
        image = ("png", file_of("0.png"))
        members = [
            (f"{i:05d}.{end}", data) for i, line in enumerate(lines) for end, data in (("json", line.encode()), image)
        ]
        return tar_of(folder / "foreign.tar", members)
    return rows


def odd_rows(row):
    """The row with each of its values, at any depth, taken out or replaced by each of ODD."""

    def places(value, path=()):
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            yield (*path, key)
            yield from places(inner, (*path, key))

    for *path, last in places(row):
        for value in ODD:
            changed = copy.deepcopy(row)
            inside = changed
            for key in path:
                inside = inside[key]
            if value is GONE:
                del inside[last]
            else:
                inside[last] = value
            yield changed


@pytest.mark.parametrize("format", EVERY_ROW)
def test_odd_rows_cost_nothing_but_themselves(images, tmp_path, format):
    """Good rows around hundreds that break the format, each in another way: all good ones become samples."""
    make = EVERY_ROW[format]
    good = [make(i, "0.png", *pair) for i, pair in enumerate(PAIRS)]
    odd = list(odd_rows(make(9, "0.png", "Odd?", "Yes.", "No.")))
    lines = [json.dumps(row) for row in [*good[:2], *odd, *good[2:]]]
    lines[2:2] = ["", "[]", "null", '"text"', "{", '{"id": "odd"}', "[" * 100_000, "[" * 800 + "]" * 800]
    source = write_source(tmp_path, format, lines)
    assert find_reader(source)[0] == format
    out = tmp_path / "out"
    command = ["pack", str(source), "--out", str(out), "--image-root", str(images), "--max-drop", "1", "--workers", "1"]
    assert main([*command, "-q"]) == 0
    shards = ShardSet.open(out)
    samples = [shards.read_text(row) for row in range(len(shards))]
    texts = [[part["text"] for part in sample["prompt"][0]["content"] if part["type"] == "text"] for sample in samples]
    assert [[q] for q, _, _ in PAIRS] == [text for text in texts if text and text[0].startswith("What")]
    broken = [row for row in odd if "NaN" not in json.dumps(row)]  # NaN is no value, as null is none
    assert shards.manifest["drops"]["malformed row"] >= len(broken) // 4
    for tar in (out / "shards").iterdir():
        assert not any(word in tar.read_bytes() for word in (b"NaN", b"Infinity")), "that is no JSON"
    details = [row.detail for row in READERS[format].read(source, [images]) if isinstance(row, Drop)]
    assert details and not [detail for detail in details if "it breaks its format" in detail]


class Careless:
    """A format that takes a row's field for what it should be."""

    def fits(self, row):
        return True

    def read_row(self, row, place):
        assert row["number"] != 13, "our own bug"
        yield 1 / row["number"]


@pytest.mark.parametrize("row", [{"id": "x"}, {"id": "x", "number": "7"}, {"id": "x", "number": 0}], ids=str)
def test_what_a_format_does_not_foresee_is_a_drop(row):
    (drop,) = read_row(Careless(), row, Place("source", "7"))
    assert (drop.reason, drop.id) == ("malformed row", "source/x") and "it breaks its format (" in drop.detail
    with pytest.raises(AssertionError, match="our own bug"):
        list(read_row(Careless(), {"number": 13}, Place("source", "7")))


def test_a_file_nested_too_deeply_is_named(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"deep.json is not JSON \(it is nested too deeply\)"):
        list(READERS["llava"].read(tmp_path / "deep.json", []))
    with pytest.raises(ValueError, match=r"deep.json looks like none of the known formats"):
        find_reader(tmp_path / "deep.json")


def records(tmp_path, row):
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    return list(find_reader(tmp_path / "rows.json")[1].read(tmp_path / "rows.json", []))


def test_vlfeedback_pairs(tmp_path):
    """Four completions of mean rating 4, 4, 1 and N/A: two pairs, the tie and the unrated one make none."""
    completions = [rated("a", "4"), rated("b", "4"), rated("c", "1"), rated("d", "N/A")]
    found = records(tmp_path, {"id": "x", "prompt": "What?", "completions": completions, "img_path": "a.png"})
    assert [(r.id, r.chosen, r.rejected, r.margin) for r in found] == [
        ("rows/x#0", "a", "c", 3.0),
        ("rows/x#1", "b", "c", 3.0),
    ]
    columns = {
        "annotations": {"Helpfulness": {"Rating": ["4", "4", "1", "N/A"], "Rationale": [""] * 4}},
        "model": list("wxyz"),
        "response": list("abcd"),
    }
    again = records(tmp_path, {"id": "x", "prompt": "What?", "completions": columns, "img_path": "a.png"})
    assert again == found
    assert records(tmp_path, {"prompt": "What?", "completions": completions[:2]})[0].reason == "no pair"


@pytest.mark.parametrize("rating", ["nan", "inf", float("nan"), 1e999, 10**400, None, "N/A"])
def test_a_rating_that_is_no_number_makes_no_pair(tmp_path, rating):
    completions = [rated("a", "4"), rated("b", rating), rated("c", "1")]
    (found,) = records(tmp_path, {"id": "x", "prompt": "What?", "completions": completions})
    assert (found.chosen, found.rejected, found.margin) == ("a", "c", 3.0)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Q", "chosen": "A", "rejected": "B", "image_rejected": "b.png"}, "rejected image not supported"),
        ({"messages": messages("Q", "A"), "rejected_response": "B", "images": ["a"], "rejected_images": ["b"]},
         "rejected image not supported"),
        ({"conversations": from_human("Q", "A"), "rejected_conversations": from_human("R", "B")}, "malformed row"),
        ({"conversations": from_human("Q", "A", "Q2"), "chosen": {"from": "gpt"}, "rejected": None}, "malformed row"),
        ({"conversations": from_human("Q")}, "malformed row"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "malformed row"),
        ({"messages": messages("Q", "A"), "rejected_messages": messages("other", "B")}, "malformed row"),
        ({"prompt": messages("Q", "A"), "chosen": messages("x")[:1], "rejected": "B"}, "malformed row"),
        ({"prompt": "Q", "chosen": "A", "rejected": "B", "image": {"url": "x"}}, "malformed row"),
        ({"prompt": "Q", "completions": {"response": ["a"], "annotations": [{}, {}]}}, "malformed row"),
        ({"prompt": "Q", "completions": {"response": ["a"], "annotations": {"x": {"Rating": None}}}}, "malformed row"),
    ],
    ids=str,
)  # fmt: skip
def test_a_row_that_breaks_its_format(tmp_path, row, reason):
    (drop,) = records(tmp_path, row)
    assert isinstance(drop, Drop) and drop.reason == reason


def test_trls_implicit_prompt(tmp_path):
    row = {"chosen": messages("Q", "A"), "rejected": messages("Q", "B")}
    (record,) = records(tmp_path, row)
    assert (record.prompt, record.chosen, record.rejected) == ("Q", "A", "B")
    (drop,) = records(tmp_path, {"chosen": messages("Q", "A"), "rejected": messages("R", "B")})
    assert drop.reason == "malformed row"


def tar_of(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


ROW = json.dumps({"prompt": "Q", "chosen": "A", "rejected": "B"}).encode()


def test_dotted_and_repeated_keys_are_dropped(tmp_path):
    members = [("img.v1.a.json", ROW), ("img.v1.b.json", ROW), ("x.json", ROW), ("x.json", ROW), ("y.json", ROW)]
    members += [("z.json", b"{"), ("w.jpg", b"no json"), ("v.json", b'{"a": 1}')]
    path = tar_of(tmp_path / "a.tar", members)
    found = list(READERS["webdataset"].read(path, []))
    reasons = [getattr(item, "reason", "kept") for item in found]
    assert reasons == ["ambiguous key", "ambiguous key", "kept", "malformed row", "ambiguous key", "malformed row"]


@pytest.mark.parametrize("keep", [512, 700, 1024, 1536, 2560])
def test_a_cut_tar_is_an_error(tmp_path, keep):
    """Every cut, also between two members, where readers see a shorter tar."""
    path = tar_of(tmp_path / "a.tar", [("a.json", ROW), ("b.json", ROW), ("c.json", ROW)])
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"a.tar.*(cut|damaged).*fetch"):
        list(READERS["webdataset"].read(path, []))


def test_broken_files_are_errors(tmp_path):
    for name, data in (("a.parquet", b"PAR1 no"), ("a.json", b"[{]"), ("a.csv", b"\xff\xfe\x00")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name):
            list(READERS["generic"].read(tmp_path / name, []))
