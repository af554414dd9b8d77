"""The page shows every sample with the answers' difference marked, escapes every text, and runs nothing."""

import html.parser
import io
import json

import pytest
from PIL import Image

from data_tools.__main__ import main
from data_tools.pack import PackOptions, pack
from data_tools.preview import choose, difference, read_shown, to_html
from data_tools.sheet import draw_sheet
from data_tools.where import parse_where
from pivot.data.shards import ShardSet
from tests.kit.damage import flip_bit
from tests.kit.sets import image_bytes, make_set, row_of, write_rows

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> & </p></article>"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("preview"))


@pytest.fixture
def evil(tmp_path):
    row = {"id": EVIL, "prompt": f"<image>{EVIL}", "chosen": f"yes {EVIL}", "rejected": f"no {EVIL}", "answer": EVIL}
    source = write_rows(
        tmp_path / "in", [row | {"image": EVIL.replace("/", "_")}], {EVIL.replace("/", "_"): image_bytes(1)}
    )
    pack(PackOptions(source=source, out=tmp_path / "evil"))
    return ShardSet.open(tmp_path / "evil")


class Tags(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.sources = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        assert not any(name.startswith("on") for name, _ in attributes)

    def handle_data(self, data):
        self.texts.append(data)


def test_words_that_differ_are_marked():
    chosen, rejected = difference("A red cup on the table.", "A big blue cup on a table.")
    assert chosen == [("A ", False), ("red", True), (" cup on ", False), ("the", True), (" table.", False)]
    assert [text for text, differs in rejected if differs] == ["big blue", "a"]
    assert difference("same", "same") == ([("same", False)], [("same", False)])
    assert difference("", "all") == ([], [("all", True)])


def test_every_text_comes_back_whole():
    one, other = "a  b\nc, d!", "b c\n\nd? e"
    for text, pieces in zip((one, other), difference(one, other), strict=True):
        assert "".join(piece for piece, _ in pieces) == text


def test_texts_are_escaped_and_nothing_is_loaded(evil):
    page = to_html(evil, read_shown(evil, [0]), evil.name)
    found = Tags(page)
    assert "script" not in found.tags and found.tags.count("img") == 1 and found.tags.count("article") == 1
    assert all(source.startswith("data:image/jpeg;base64,") for source in found.sources)
    assert "".join(found.texts).count("<script>alert(1)</script>") == 5  # id, answer, prompt, chosen, rejected
    assert "default-src 'none'" in page


def test_the_sheet_is_a_picture(packed, evil):
    for shards in (packed, evil):
        shown = read_shown(shards, choose(shards, 4, seed=0))
        sheet = draw_sheet(shown, shards.name)
        assert sheet.width == (2184 if len(shown) > 1 else 1120) and len(sheet.getcolors(1 << 24)) > 100
    dark = draw_sheet(shown, "x", dark=True)
    assert dark.getpixel((0, 0)) == (0x13, 0x14, 0x16)


def test_samples_are_drawn_by_seed_and_condition(packed):
    assert choose(packed, 5, seed=1) == choose(packed, 5, seed=1) != choose(packed, 5, seed=2)

    def drawn(*conditions, number=100):
        return sorted(rows.index(row) for row in choose(packed, number, 0, [parse_where(text) for text in conditions]))

    rows = [row_of(packed, number) for number in range(24)]
    assert drawn("images=0") == [0, 4, 8, 12, 16, 20]
    assert drawn("images=0", f"row>{rows[8]}", f"row<={rows[16]}") == [12, 16]
    assert drawn("chosen~^yesyes[0-9]$") == [1, 6]
    assert drawn("id=source/r7", number=1) == [7]


@pytest.mark.parametrize("text", ["color=red", "images", "images=many", "chosen>3", "chosen~(", "images~3"])
def test_conditions_that_make_no_sense(text):
    with pytest.raises(ValueError, match="--where"):
        parse_where(text)


def test_the_command(packed, tmp_path, capsys):
    page, sheet = tmp_path / "a" / "x.html", tmp_path / "x.png"
    assert main(["preview", str(packed.folder), "--out", str(page), "--out", str(sheet), "--n", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [found["samples"] for found in result["files"].values()] == [3, 3]
    assert page.read_text().count("<article") == 3 and Image.open(io.BytesIO(sheet.read_bytes())).format == "PNG"
    assert main(["preview", str(packed.folder), "--out", str(tmp_path / "x.gif")]) == 2
    assert main(["preview", str(packed.folder), "--where", "source=none", "--out", str(page)]) == 2
    assert "no sample of" in capsys.readouterr().err


def test_a_damaged_sample_is_left_out_and_told(tmp_path, capsys):
    shards = make_set(tmp_path, count=5)
    flip_bit(shards, 2)
    assert [shown.row for shown in read_shown(shards, range(5))] == [0, 1, 3, 4]
    assert main(["preview", str(shards.folder), "--out", str(tmp_path / "x.html")]) == 0
    shown = capsys.readouterr().out
    assert (
        "4 samples" in shown
        and f"1 of 5 cannot be read and is not shown; python -m data_tools validate {shards.folder}" in shown
    )
