"""Laws of pack: the output depends on the input alone, an interrupted pack goes on, drops are counted and limited."""

import io
import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from data_tools import filling as filling_module
from data_tools import pack as pack_module
from data_tools.__main__ import main
from data_tools.convert import shrink
from data_tools.pack import PackOptions, pack
from data_tools.shuffle import pack_shuffled
from pivot.data.images import decode_rgb
from pivot.data.index import INDEX_RECORD
from pivot.data.shards import ShardSet
from tests.kit.damage import flip_bit
from tests.kit.images import save, smooth
from tests.kit.packed import contents
from tests.kit.sets import image_bytes, make_rows, make_set, mixed_rows, row_of, write_rows


@pytest.fixture
def source(tmp_path):
    return write_rows(tmp_path / "source", *make_rows(24))


def test_the_number_of_workers_changes_no_byte(source, tmp_path):
    for workers in (1, 2):
        pack(PackOptions(source=source, out=tmp_path / str(workers), workers=workers, samples_per_shard=5))
    found = contents(tmp_path / "1")
    assert found == contents(tmp_path / "2")
    names = {f"{kind}/source-00000{i}.{end}" for i in range(6) for kind, end in (("shards", "tar"), ("index", "idx"))}
    assert set(found) == names | {"manifest.json", "stats.json"}


class Cut(Exception):
    pass


def pack_until(rows, options):
    """A pack that ends behind its first so many rows, as by Ctrl-C."""

    def stop(tally):
        if tally.rows == rows:
            raise Cut

    with pytest.raises(Cut):
        pack(options, stop)


# Pairs with a picture and pairs without fill a shard each. That of the former is full (5) with row 6 and found to be at
# row 7, so shards end before rows 7, 14 and 21 of those with pictures, and before row 20 of those without.
@pytest.mark.parametrize(("row", "goes_on_at"), [(1, 0), (7, 0), (9, 7), (11, 7), (21, 20), (23, 21)])
def test_an_interrupted_pack_goes_on_and_ends_the_same(source, tmp_path, row, goes_on_at):
    options = PackOptions(source=source, out=tmp_path / "cut", samples_per_shard=5)
    pack(PackOptions(source=source, out=tmp_path / "whole", samples_per_shard=5))
    pack_until(row, options)
    with pytest.raises(ValueError, match=r"no manifest.json \(pack did not finish\)"):
        ShardSet.open(tmp_path / "cut")
    seen = []
    assert pack(options, lambda tally: seen.append(tally.rows)).complete
    assert seen[0] == goes_on_at + 1  # it read on behind what the last finished shard had seen
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize("max_open", [3, 64])
@pytest.mark.parametrize("row", [10, 24, 41, 59])
def test_many_shapes_are_packed_the_same_after_a_kill(tmp_path, monkeypatch, row, max_open):
    """Seven shapes that take turns, some begun early and full late, with room for three open shards or for all."""
    monkeypatch.setattr(filling_module, "MAX_OPEN", max_open)
    source = write_rows(tmp_path / "in", *mixed_rows(60))
    options = PackOptions(source=source, out=tmp_path / "cut", samples_per_shard=4)
    most = []

    def stop(tally):
        most.append(len(list((tmp_path / "cut" / "shards").glob("*.part"))))
        if tally.rows == row:
            raise Cut

    with pytest.raises(Cut):
        pack(options, stop)
    assert not list((tmp_path / "cut").rglob("*.part"))
    pack(replace(options, workers=2), lambda tally: most.append(len(list((tmp_path / "cut").rglob("*.part")))))
    pack(replace(options, out=tmp_path / "whole"))
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    opened = ShardSet.open(tmp_path / "cut")
    assert sorted(opened.read_text(row)["id"] for row in range(60)) == sorted(f"source/r{i}" for i in range(60))
    assert all(shard.shape for shard in opened.shards)
    assert max(most) == min(7, max_open)
    assert [shard.name for shard in opened.shards] == [f"source-{i:06d}" for i in range(len(opened.shards))]


def test_rows_that_were_in_an_open_shard_must_still_be_what_they_were(tmp_path):
    """Their pictures are read again: an annotation that is the same may name a file that is not."""
    rows, images = mixed_rows(24)
    source = write_rows(tmp_path / "in", rows, images)
    options = PackOptions(source=source, out=tmp_path / "set", samples_per_shard=2)
    pack_until(20, options)
    open_rows = json.loads((tmp_path / "set" / "pack.json").read_text())["filling"]
    name = next(rows[row]["image"][0] for shard in open_rows for row in shard["rows"] if rows[row]["image"])
    (tmp_path / "in" / name).write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"row \d+ is not what it was when it was packed"):
        pack(options)
    (tmp_path / "in" / name).write_bytes(images[name])
    assert pack(options).complete


def test_a_complete_pack_is_left_alone(source, tmp_path):
    options = PackOptions(source=source, out=tmp_path / "set")
    first = pack(options)
    before = contents(tmp_path / "set")
    again = pack(options, lambda tally: pytest.fail("it packed again"))
    assert again.shards == first.shards and again.tally == first.tally
    assert contents(tmp_path / "set") == before


def test_another_input_or_other_options_are_refused(source, tmp_path):
    pack(PackOptions(source=source, out=tmp_path / "set"))
    with pytest.raises(ValueError, match="other options .name was 'source', is 'other'"):
        pack(PackOptions(source=source, out=tmp_path / "set", name="other"))
    rows = json.loads(source.read_text())
    source.write_text(json.dumps([*rows, rows[0] | {"chosen": "more"}]))
    with pytest.raises(ValueError, match="the input has more rows now"):
        pack(PackOptions(source=source, out=tmp_path / "set"))
    source.write_text(json.dumps([rows[0] | {"chosen": "changed"}, *rows[1:]]))
    with pytest.raises(ValueError, match="a pack of another input"):
        pack(PackOptions(source=source, out=tmp_path / "set"))
    with pytest.raises(ValueError, match="is not empty and holds no pack"):
        pack(PackOptions(source=source, out=source.parent))


def test_shards_are_cut_by_size(source, tmp_path):
    result = pack(PackOptions(source=source, out=tmp_path / "set", bytes_per_shard=8000))
    assert len(result.shards) > 3
    assert all(shard.bytes <= 8000 + 10_240 for shard in result.shards)  # tar fills up to 10,240
    assert result.num_samples == 24


def test_the_index_says_what_the_samples_are(source, tmp_path):
    pack(PackOptions(source=source, out=tmp_path / "set"))
    opened = ShardSet.open(tmp_path / "set")
    assert INDEX_RECORD.itemsize == 64 and len(opened.index) == 24
    record = opened.index[row_of(opened, 1)]
    assert (record["n_images"], record["img_w"], record["img_h"], record["pixels"]) == (1, 12, 10, 120)
    assert record["chars_chosen"] == len("yesyes1") and record["chars_rejected"] == len("nono1")
    for first, last in pairwise(opened.first_rows):
        spans = opened.index["span"][first:last]
        np.testing.assert_array_equal(opened.index["offset"][first:last], np.cumsum(spans) - spans)


def bad_rows():
    rows, images = make_rows(8)
    images["broken.png"] = image_bytes(50)[:80]
    base = {"prompt": "What?", "chosen": "A", "rejected": "B"}
    bad = [
        base | {"image": "none.png"},
        base | {"image": "../../outside.png"},
        base | {"image": "https://example.org/a.png"},
        base | {"chosen": ""},
        base | {"rejected": "A"},
        base | {"image": "broken.png"},
        base | {"prompt": "<image><image>", "image": "1.png"},
        rows[1] | {"id": "again"},
    ]
    return rows + bad, images


REASONS = {
    "missing image",
    "path outside the roots",
    "URL",
    "zero-length completion",
    "chosen equals rejected",
    "undecodable image",
    "image-token mismatch",
    "duplicate",
}


def test_every_drop_is_counted_with_examples(tmp_path, capsys):
    source = write_rows(tmp_path / "in" / "source", *bad_rows())
    (tmp_path / "outside.png").write_bytes(image_bytes(60))
    out = tmp_path / "set"
    assert main(["pack", str(source), "--out", str(out), "--workers", "1"]) == 1
    shown = capsys.readouterr()
    assert "7 of 16 rows were dropped (43.8%; duplicates do not count), more than --max-drop 0.01" in shown.err
    assert not (out / "manifest.json").exists()
    stats = json.loads((out / "stats.json").read_text())
    assert stats["drops"] == dict.fromkeys(REASONS, 1) and stats["rows"] == 16 and stats["samples"] == 8
    assert set(stats["examples"]) == REASONS
    assert all(reason.split()[0] in shown.out for reason in REASONS)
    # Every sample is packed already: a larger limit only writes the manifest.
    assert main(["pack", str(source), "--out", str(out), "--workers", "1", "--max-drop", "0.5"]) == 0
    assert ShardSet.open(out).manifest["drops"] == stats["drops"]
    assert all(image_bytes(60) not in path.read_bytes() for path in (out / "shards").iterdir())


def test_a_duplicate_of_a_finished_shard_is_known_after_a_resume(tmp_path):
    rows, images = make_rows(10)
    source = write_rows(tmp_path / "source", [*rows, rows[0]], images)
    options = PackOptions(source=source, out=tmp_path / "set", samples_per_shard=3, max_drop=0.5)
    pack_until(9, options)
    assert pack(options).tally.drops == {"duplicate": 1}


def test_nothing_left_is_an_error(tmp_path):
    source = write_rows(tmp_path / "source", [{"prompt": "What?", "chosen": "A", "rejected": "A"}])
    with pytest.raises(ValueError, match="no sample is left"):
        pack(PackOptions(source=source, out=tmp_path / "set", max_drop=1.0))


def test_sources_and_their_repeat_time_are_in_the_manifest(tmp_path):
    folder = tmp_path / "mmpr"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "a.png").write_bytes(image_bytes(1))
    row = {"image": "a.png", "question": "What?", "chosen": "A.", "rejected": "B."}
    (folder / "rows.jsonl").write_text(json.dumps(row))
    meta = {"part": {"root": "images", "annotation": "rows.jsonl", "repeat_time": 2.5}}
    (folder / "meta.json").write_text(json.dumps(meta))
    assert main(["pack", str(folder), "--out", str(tmp_path / "set"), "--workers", "1"]) == 0
    opened = ShardSet.open(tmp_path / "set")
    assert opened.manifest["sources"] == {"part": {"samples": 1, "repeat_time": 2.5}}
    assert opened.name == "mmpr"


def test_both_layouts_give_equal_samples(tmp_path):
    """The same pairs as MMPR and as LLaVA DPO: equal keys, and all but id, source and origin alike."""
    (tmp_path / "images").mkdir()
    rows = []
    for i in range(4):
        (tmp_path / "images" / f"{i}.png").write_bytes(image_bytes(i))
        rows.append({"image": f"{i}.png", "question": f"What {i}?", "chosen": "A.", "rejected": "B."})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "meta.json").write_text(json.dumps({"a": {"root": "images", "annotation": "rows.jsonl"}}))
    llava = [
        {
            "id": i,
            "prompt": "<image>\n" + r["question"],
            "chosen": "A.",
            "rejected": "B.",
            "image": "images/" + r["image"],
        }
        for i, r in enumerate(rows)
    ]
    (tmp_path / "llava.json").write_text(json.dumps(llava))
    pack(PackOptions(source=tmp_path / "meta.json", out=tmp_path / "one"))
    pack(PackOptions(source=tmp_path / "llava.json", out=tmp_path / "two"))
    one, two = ShardSet.open(tmp_path / "one"), ShardSet.open(tmp_path / "two")
    np.testing.assert_array_equal(one.index["key_hash"], two.index["key_hash"])
    for row in range(4):
        (left, left_files), (right, right_files) = one.read(row), two.read(row)
        assert left_files == right_files
        assert all(left[field] == right[field] for field in ("prompt", "chosen", "rejected", "kind"))


def test_wrong_commands_end_with_2(source, tmp_path, capsys):
    assert main(["pack", str(tmp_path / "nothing"), "--out", str(tmp_path / "set")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["pack", str(source), "--out", str(tmp_path / "set"), "--name", "a.b"]) == 2
    assert "letters, digits" in capsys.readouterr().err
    assert main(["info", str(tmp_path)]) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-drop", "1.5"], "--max-drop is 1.5, expected a share of the rows from 0 to 1"),
        (["--max-drop", "nan"], "--max-drop is nan"),
        (["--max-drop", "-0.1"], "--max-drop is -0.1"),
        (["--shuffle", "--seed", "-1"], f"--seed: expected a whole number from 0 to {2**64 - 1}, found '-1'"),
        (["--shuffle", "--seed", str(2**64)], "--seed: expected a whole number"),
        (["--max-side", "0"], "--max-side: expected a whole number of at least 1, found '0'"),
        (["--samples-per-shard", "0"], "--samples-per-shard: expected a whole number"),
        (["--megabytes-per-shard", "-5"], "--megabytes-per-shard: expected a whole number"),
        (["--image-root", "/nowhere"], "--image-root /nowhere: there is no such folder"),
        (["--allow-root", "/nowhere"], "--allow-root /nowhere: there is no such folder"),
        (["--format", "webdataset"], "source.json holds no row of the format webdataset"),
        (["--format", "mmpr"], "source.json: entry '' has no annotation file"),
    ],
    ids=str,
)
@pytest.mark.parametrize("extra", [[], ["--dry-run"]], ids=str)
def test_a_wrong_option_is_named_before_anything_is_written(source, tmp_path, capsys, options, said, extra):
    try:
        code = main(["pack", str(source), "--out", str(tmp_path / "set"), *options, *extra])
    except SystemExit as stopped:  # by argparse
        code = stopped.code
    assert code == 2
    assert said in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("extra", [[], ["--dry-run"]], ids=str)
@pytest.mark.parametrize("shuffle", [[], ["--shuffle"]], ids=str)
def test_an_out_that_is_taken_is_refused_at_once(source, tmp_path, capsys, monkeypatch, shuffle, extra):
    """By a dry run too: a file, a folder with something else, a file on the way, another pack, one of another input."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("x")
    assert main(["pack", str(source), "--out", str(tmp_path / "set"), "-q", *shuffle]) == 0
    plain = ["pack", str(source), "--workers", "1", *shuffle]
    other = ["--samples-per-shard", "7"]
    before = contents(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(pack_module, "convert", lambda *_, **__: pytest.fail("a row was converted"))
        for out, more, said in (
            ("file", [], f"{tmp_path}/file is a file, expected a folder"),
            ("file/below", [], f"{tmp_path}/file is a file, expected a folder"),
            ("notes", [], "notes is not empty and holds no pack"),
            ("set", other, "holds a set made otherwise" if shuffle else "samples_per_shard was 2000, is 7"),
        ):
            assert main([*plain, "--out", str(tmp_path / out), *more, *extra]) == 2, out
            assert said in capsys.readouterr().err
        rows = json.loads(source.read_text())
        source.write_text(json.dumps(rows[:-1]))
        assert main([*plain, "--out", str(tmp_path / "set"), *extra]) == 2
        assert "holds a pack of another input" in capsys.readouterr().err
        source.write_text(json.dumps(rows))
        assert main([*plain, "--out", str(tmp_path / "set"), *extra]) == 0
        assert ("is complete: nothing would be written" in capsys.readouterr().out) == bool(extra)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("extra", [[], ["--dry-run"]], ids=str)
def test_a_dry_run_ends_as_the_run_would(tmp_path, capsys, extra):
    """No rows, none that is left, too many that are dropped, all well."""
    row = {"prompt": "What?", "chosen": "A", "rejected": "B"}
    same = row | {"rejected": "A"}
    for number, (rows, more, code, said) in enumerate(
        (
            ([], ["--format", "llava_dpo"], 2, "holds no row of the format llava_dpo"),
            ([same], ["--max-drop", "1"], 2, "no sample is left (chosen equals rejected: 1)"),
            ([same, row], [], 1, "1 of 2 rows were dropped"),
            ([row], [], 0, ""),
        )
    ):
        source = write_rows(tmp_path / str(number), rows)
        out = tmp_path / f"out{number}"
        assert main(["pack", str(source), "--out", str(out), "--workers", "1", *more, *extra]) == code
        shown = capsys.readouterr()
        assert said in shown.err
        assert (out.exists() and bool(list(out.iterdir()))) == (not extra and bool(rows))
    assert "1 sample" in shown.out and "1 samples" not in shown.out


@pytest.mark.parametrize("extra", [[], ["--dry-run"]], ids=str)
def test_an_unfinished_pack_of_another_input_is_refused(source, tmp_path, capsys, extra):
    options = PackOptions(source=source, out=tmp_path / "cut", samples_per_shard=5)
    pack_until(20, options)
    command = ["pack", str(source), "--out", str(options.out), "--samples-per-shard", "5", "--workers", "1", *extra]
    rows = json.loads(source.read_text())
    source.write_text(json.dumps(rows[1:]))
    assert main(command) == 2
    assert "choose another --out" in capsys.readouterr().err
    source.write_text(json.dumps(rows))
    assert main(command) == 0


def test_info_and_validate(tmp_path, capsys):
    packed = make_set(tmp_path)
    assert main(["info", str(packed.folder)]) == 0
    assert packed.fingerprint[:16] in capsys.readouterr().out
    assert main(["validate", str(packed.folder)]) == 0
    flip_bit(packed, 6)
    assert main(["validate", str(packed.folder)]) == 1
    shown = capsys.readouterr().err
    assert "tiny-000001.tar: sha256 differs" in shown and "(row 6): crc32 differs" in shown


def test_a_bounded_number_of_records_is_under_way():
    """Two workers: at most 3 chunks each wait while the first result is taken."""
    taken = []
    results = pack_module.ordered_map(abs, (taken.append(i) or -i for i in range(1000)), workers=2)
    assert next(results) == (0, 0)
    assert len(taken) == 6 * pack_module.CHUNK
    assert [result for _, result in results] == list(range(1, 1000))


def test_larger_images_are_made_smaller_and_others_keep_their_bytes(tmp_path, capsys):
    """With --max-side 12: 24 x 8 becomes 12 x 4, the picture turned by EXIF is 8 x 24 and becomes 4 x 12."""
    turned = Image.Exif()
    turned[0x0112] = 6
    wide = Image.fromarray(smooth(24, 8))
    images = {
        "wide.png": save(wide),
        "turned.jpg": save(wide, "JPEG", exif=turned),
        "small.png": image_bytes(3),
        "line.png": save(Image.fromarray(smooth(190, 1))),
    }
    rows = [{"id": n, "prompt": "What?", "chosen": n, "rejected": "B", "image": n} for n in images]
    source = write_rows(tmp_path / "in", rows, images)
    assert main(["pack", str(source), "--out", str(tmp_path / "set"), "--max-side", "12", "-q"]) == 0
    opened = ShardSet.open(tmp_path / "set")
    read = [opened.read(row) for row in range(4)]
    found = {sample["images"][0]["origin"]: (sample["images"][0], files[0]) for sample, files in read}
    sizes = {name: (image["member"], image["w"], image["h"]) for name, (image, _) in found.items()}
    assert sizes["wide.png"] == ("jpg", 12, 4) and sizes["turned.jpg"] == ("jpg", 4, 12)
    assert sizes["small.png"] == ("png", 12, 10) and sizes["line.png"] == ("jpg", 12, 1)
    assert found["small.png"][1] == images["small.png"]
    small, squares = shrink(smooth(240, 160), 120)[0], smooth(240, 160).reshape(80, 2, 120, 2, 3).mean(axis=(1, 3))
    assert np.abs(decode_rgb(small) - squares).mean() < 1.5  # 0.82 was seen
    assert Image.open(io.BytesIO(found["turned.jpg"][1])).getexif() == {}
    assert main(["validate", str(tmp_path / "set"), "-q"]) == 0
    assert main(["pack", str(source), "--out", str(tmp_path / "set"), "--max-side", "13", "-q"]) == 2
    assert "max_side was 12, is 13" in capsys.readouterr().err


def test_a_shuffled_pack_goes_on_after_a_kill(source, tmp_path, monkeypatch):
    """Killed while it packs, while it copies, and when the copy is done: the end is that of an unbroken one."""
    whole, cut = (PackOptions(source=source, out=tmp_path / name, samples_per_shard=5) for name in ("whole", "cut"))
    first = pack_shuffled(whole, seed=3)
    assert first.num_samples == 24 and not (tmp_path / "whole-unshuffled").exists()

    def stop(*_, **options):
        raise Cut

    with pytest.raises(Cut):
        pack_shuffled(cut, 3, lambda tally: stop() if tally.rows == 20 else None)
    with pytest.raises(Cut):
        pack_shuffled(cut, 3, copied=lambda done, of: stop() if done > 8 else None)
    assert not (tmp_path / "cut" / "manifest.json").exists() and (tmp_path / "cut-unshuffled").is_dir()
    with monkeypatch.context() as patched:
        patched.setattr("data_tools.shuffle.shutil.rmtree", stop)
        with pytest.raises(Cut):
            pack_shuffled(cut, 3)
    assert pack_shuffled(cut, 3, stop).shards == first.shards
    assert not (tmp_path / "cut-unshuffled").exists()
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    plain = pack(replace(whole, out=tmp_path / "plain"))
    ids = [[ShardSet.open(tmp_path / name).read_text(row)["id"] for row in range(24)] for name in ("plain", "whole")]
    assert ids[0] != ids[1] and sorted(ids[0]) == sorted(ids[1])
    manifest = ShardSet.open(tmp_path / "whole").manifest
    assert manifest["tally"]["rows"] == 24 and manifest["made_by"] == {"command": "pack", "shuffle_seed": 3}
    assert manifest["sources"] == ShardSet.open(tmp_path / "plain").manifest["sources"] and plain.complete
    with pytest.raises(ValueError, match="holds a set made otherwise"):
        pack_shuffled(whole, seed=4)
    source.write_text(json.dumps(json.loads(source.read_text())[:-1]))
    with pytest.raises(ValueError, match="a pack of another input"):
        pack_shuffled(whole, seed=3)


def test_shares_that_several_machines_pack_make_the_set_of_one(source, tmp_path, capsys):
    """24 rows in 3 shares; joined, they hold each sample of the whole pack once, in whatever order."""
    pack(PackOptions(source=source, out=tmp_path / "whole", samples_per_shard=5))
    shares = [str(tmp_path / f"share-{i}") for i in (1, 2, 3)]
    for number, share in enumerate(shares, 1):
        assert main(["pack", str(source), "--out", share, "--share", f"{number}/3", "--quiet"]) == 0
    assert [len(ShardSet.open(share)) for share in shares] == [8, 8, 8]
    assert main(["reshard", *shares, "--out", str(tmp_path / "joined"), "--quiet"]) == 0
    whole, joined = ShardSet.open(tmp_path / "whole"), ShardSet.open(tmp_path / "joined")
    assert sorted(samples(joined)) == sorted(samples(whole))


def samples(shards):
    return [json.dumps(sample) + str(images) for sample, images in map(shards.read, range(len(shards)))]


def test_a_share_goes_on_as_the_same_share_only(source, tmp_path):
    half = PackOptions(source=source, out=tmp_path / "set", samples_per_shard=3, share=(2, 2))
    pack_until(7, half)
    for other in ((1, 2), (1, 1), (2, 3)):
        with pytest.raises(ValueError, match="holds a pack with other options \\(share was"):
            pack(replace(half, share=other))
    assert pack(half).tally.rows == 12


def test_more_shares_than_rows_are_refused(source, tmp_path):
    with pytest.raises(ValueError, match="holds fewer than 25 rows; take fewer than 30 shares"):
        pack(PackOptions(source=source, out=tmp_path / "set", share=(25, 30)))
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("share", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_a_share_that_is_none_is_refused(source, tmp_path, share, capsys):
    with pytest.raises(SystemExit):
        main(["pack", str(source), "--out", str(tmp_path / "set"), f"--share={share}"])
    assert "expected I/N with I from 1 to N" in capsys.readouterr().err
