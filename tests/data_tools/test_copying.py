"""split, sample, reshard: the samples are copied byte for byte; an image never lies on two sides; draws are as told."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import webdataset

from data_tools.__main__ import main
from data_tools.copying import Choice, copy_samples, cut_rows
from data_tools.draw import Filters, draw
from data_tools.journal import Journal
from data_tools.pack import PackOptions, pack
from data_tools.where import parse_where
from data_tools.writer import ShardWriter
from pivot.data.shards import ShardSet
from tests.kit.damage import flip_bit, smuggle
from tests.kit.packed import contents
from tests.kit.sets import image_bytes, make_rows, make_set, write_rows
from tests.kit.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("copy"), count=40)


def samples_of(shards):
    shards = shards if isinstance(shards, ShardSet) else ShardSet.open(shards)
    return [shards.read(row) for row in range(len(shards))]


def images_of(folder):
    return {image["sha256"] for sample, _ in samples_of(folder) for image in sample["images"]}


def run(capsys, *arguments):
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_split_keeps_images_on_one_side(packed, tmp_path, capsys):
    found = run(capsys, "split", packed.folder, "--eval", "0.3", "--seed", 1, "--out", tmp_path / "s")
    assert found["train"] + found["eval"] == 40 and 8 <= found["eval"] <= 12
    train, held_out = tmp_path / "s" / "train", tmp_path / "s" / "eval"
    assert not images_of(train) & images_of(held_out)
    together = sorted(json.dumps(sample) for side in (train, held_out) for sample, _ in samples_of(side))
    assert together == sorted(json.dumps(sample) for sample, _ in samples_of(packed.folder))
    assert main(["validate", str(train), "-q"]) == main(["validate", str(held_out), "-q"]) == 0
    assert ShardSet.open(held_out).manifest["made_by"]["command"] == "split"


def test_split_follows_the_images_and_not_their_order(packed, tmp_path):
    main(["reshard", str(packed.folder), "--shuffle", "--out", str(tmp_path / "mixed"), "-q"])
    for name, folder in (("a", packed.folder), ("b", tmp_path / "mixed")):
        main(["split", str(folder), "--eval", "0.3", "--out", str(tmp_path / name), "-q"])
    assert images_of(tmp_path / "a" / "eval") == images_of(tmp_path / "b" / "eval")


def test_a_sample_with_two_images_ties_their_groups(tmp_path):
    images = {f"{i}.png": image_bytes(i) for i in range(6)}
    base = {"chosen": "A", "rejected": "B"}
    rows = [base | {"prompt": f"What {i}?", "image": f"{i}.png"} for i in range(6)]
    rows += [
        base | {"prompt": "Same?", "image": ["0.png", "1.png"]},
        base | {"prompt": "Same?", "image": ["1.png", "2.png"]},
    ]
    pack(PackOptions(source=write_rows(tmp_path / "in", rows, images), out=tmp_path / "set"))
    for seed in range(6):
        main(
            [
                "split",
                str(tmp_path / "set"),
                "--eval",
                "0.7",
                "--seed",
                str(seed),
                "--out",
                str(tmp_path / f"{seed}"),
                "-q",
            ]
        )
        assert not images_of(tmp_path / f"{seed}" / "train") & images_of(tmp_path / f"{seed}" / "eval")


def test_split_sets_apart_at_least_one_group(tmp_path, capsys):
    shards = make_set(tmp_path, count=5)
    assert run(capsys, "split", shards.folder, "--eval", "0.01", "--out", tmp_path / "s")["eval"] == 1
    rows = [{"prompt": f"{i}?", "chosen": "A", "rejected": "B", "image": "a.png"} for i in range(3)]
    pack(PackOptions(source=write_rows(tmp_path / "in", rows, {"a.png": image_bytes(1)}), out=tmp_path / "one"))
    assert main(["split", str(tmp_path / "one"), "--out", str(tmp_path / "t")]) == 2
    assert "all 3 samples hang together" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()
    assert main(["split", str(tmp_path / "one"), "--eval", "1.5", "--out", str(tmp_path / "t")]) == 2


def test_reshard_keeps_bytes_and_joins_sets(packed, tmp_path, capsys):
    other = make_rows(46)[0][40:]
    source = write_rows(tmp_path / "other", other, make_rows(46)[1])
    pack(PackOptions(source=source, out=tmp_path / "more"))
    found = run(
        capsys, "reshard", packed.folder, tmp_path / "more", "--samples-per-shard", 7, "--out", tmp_path / "both"
    )
    assert (found["samples"], found["shards"]) == (46, 7)
    both, parts = samples_of(tmp_path / "both"), [*samples_of(packed.folder), *samples_of(tmp_path / "more")]
    for with_picture in (True, False):  # each in its shards, in the order that they had
        kept = [[pair for pair in pairs if bool(pair[1]) == with_picture] for pairs in (both, parts)]
        assert kept[0] == kept[1]
    assert main(["validate", str(tmp_path / "both"), "-q"]) == 0
    manifest = ShardSet.open(tmp_path / "both").manifest
    assert manifest["sources"]["source"]["samples"] == 46 and manifest["name"] == "tiny"


@pytest.fixture(scope="module")
def overlapping(packed, tmp_path_factory):
    """Samples 30 to 39 of `packed` and six more."""
    rows, images = make_rows(46)
    folder = tmp_path_factory.mktemp("overlapping")
    pack(PackOptions(source=write_rows(folder / "source", rows[30:], images), out=folder / "set"))
    return ShardSet.open(folder / "set")


@pytest.mark.parametrize("shuffle", [[], ["--shuffle"]], ids=["in order", "shuffled"])
def test_sets_that_share_samples_become_one_without_the_second_copies(packed, overlapping, tmp_path, capsys, shuffle):
    """40 and 16 samples, 10 of them twice: 46, and every shard opens in webdataset and datasets."""
    import datasets  # a second, so not for the other tests

    command = ["reshard", packed.folder, overlapping.folder, *shuffle, "--out", tmp_path / "both"]
    tried = run(capsys, *command, "--dry-run")
    found = run(capsys, *command)
    assert tried == found and found["samples"] == 46 and found["drops"] == {"duplicate": 10}
    assert main(["validate", str(tmp_path / "both"), "-q"]) == 0
    both = ShardSet.open(tmp_path / "both")
    assert both.manifest["drops"] == {"duplicate": 10} and both.manifest["sources"]["source"]["samples"] == 46
    expected = {json.dumps(sample): files for shards in (overlapping, packed) for sample, files in samples_of(shards)}
    assert {json.dumps(sample): files for sample, files in samples_of(both)} == expected
    seen = 0
    for number, shard in enumerate(both.shards):
        url = str(both.fetch(number))
        assert sum(1 for _ in webdataset.WebDataset(url, shardshuffle=False)) == shard.samples
        opened = datasets.load_dataset("webdataset", data_files=url, split="train", cache_dir=str(tmp_path / "cache"))
        seen += len(opened)
    assert seen == 46
    assert main([*map(str, command)]) == 0
    assert "46 samples in 2 shards; 10 duplicates left out" in capsys.readouterr().out


def test_a_set_that_holds_a_sample_twice_is_copied_by_reshard_alone(packed, tmp_path, capsys):
    out = tmp_path / "twice"
    with Journal(out, {}) as journal:
        writer = ShardWriter(out, "twice-000000")
        for row in (0, 1, 2, 1):
            writer.add_raw(packed.read_span(row), packed.index[row], packed.shards[0].shape)
        journal.finish([writer.close()], name="twice", kind="preference", sources={})
    for command in ["split", "--eval", "0.5"], ["sample", "--num", "4"]:
        assert main([command[0], str(out), *command[1:], "--out", str(tmp_path / "x")]) == 2
        assert "run python -m data_tools reshard on it, which keeps the first of each" in capsys.readouterr().err
    assert main(["validate", str(out)]) == 1
    assert "occurs more than once; python -m data_tools reshard keeps the first" in capsys.readouterr().err
    run(capsys, "reshard", out, "--out", tmp_path / "once")
    assert samples_of(tmp_path / "once") == [packed.read(row) for row in (0, 1, 2)]


@pytest.mark.parametrize("command", [["reshard"], ["split", "--eval", "0.5"], ["sample", "--num", "23"]], ids=str)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_members_that_no_sample_lists_are_not_copied(tmp_path, capsys, command, workers):
    shards = make_set(tmp_path)
    smuggle(shards.folder, range(24), "{key}.pyd")
    options = ["--workers", workers, "--out", str(tmp_path / "out")]
    assert main([command[0], str(shards.folder), *command[1:], *options]) == 2
    assert f"python -m data_tools pack {shards.folder}/shards --out NEW leaves it out" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.tar*")) and not list((tmp_path / "out").rglob("manifest.json"))


@pytest.mark.parametrize("command", [["reshard"], ["split", "--eval", "0.5"], ["sample", "--num", "24"]], ids=str)
def test_damage_says_what_to_do(tmp_path, capsys, command):
    shards = make_set(tmp_path)
    flip_bit(shards, 6)
    assert main([command[0], str(shards.folder), *command[1:], "--out", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().err
    assert (
        "tiny-000001.tar sample 1 (row 6): crc32 differs from the index; the shard is damaged: copy it again" in shown
    )
    assert "python -m data_tools validate lists all damage" in shown and "`exclude`" in shown


def test_a_dry_run_refuses_what_the_run_refuses(packed, tmp_path, capsys):
    """A folder with another set, also where only the second of two outputs has one, and a set upon itself."""
    out = tmp_path / "out"
    run(capsys, "split", packed.folder, "--eval", "0.3", "--seed", 1, "--out", out)
    shutil.rmtree(out / "eval")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    another = "holds a set made by another command; choose another --out"
    for command, message in (
        (["split", "--eval", "0.3", "--seed", "2", "--out", out], "train holds a pack with other options"),
        (["reshard", "--out", out / "train"], another),
        (["reshard", "--out", packed.folder], another),
        (["sample", "--num", "3", "--out", packed.folder], another),
        (["sample", "--num", "3", "--out", tmp_path / "notes"], "is not empty and holds no pack"),
        (["sample", "--num", "3", "--name", "a.b", "--out", tmp_path / "x"], "expected at most 73 letters"),
    ):
        before = contents(tmp_path)
        for extra in ([], ["--dry-run"]):
            assert main([command[0], str(packed.folder), *map(str, command[1:]), *extra]) == 2
            assert message in capsys.readouterr().err
        assert contents(tmp_path) == before and not (out / "eval").exists()
    again = ["split", packed.folder, "--eval", "0.3", "--seed", 1, "--out", out]
    assert run(capsys, *again, "--dry-run") == run(capsys, *again)


def test_workers_change_no_byte_and_a_cut_run_goes_on(packed, tmp_path):
    choice = Choice((str(packed.folder),), np.arange(39, -1, -1), "back", {"command": "test"}, samples_per_shard=6)
    copy_samples(choice, tmp_path / "one")
    copy_samples(choice, tmp_path / "two", workers=2)

    class Cut(Exception):
        pass

    def stop(done, total):
        if done >= 18:
            raise Cut

    with pytest.raises(Cut):
        copy_samples(choice, tmp_path / "cut", progress=stop)
    seen = []
    copy_samples(choice, tmp_path / "cut", progress=lambda done, total: seen.append(done))
    assert seen == [24, 30, 36, 40]
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "cut")
    with pytest.raises(ValueError, match="holds a pack with other options"):
        copy_samples(Choice((str(packed.folder),), np.arange(3), "back", {"command": "test"}), tmp_path / "one")


def test_shards_are_cut_by_samples_and_bytes():
    assert cut_rows(np.array([10] * 7), 3, 1000) == [0, 3, 6, 7]
    assert cut_rows(np.array([10, 50, 10, 10, 70]), 9, 60) == [0, 2, 4, 5]  # the last is over the limit alone


def test_dry_runs_write_nothing(packed, tmp_path):
    for command in (["split"], ["reshard"], ["sample", "--num", "3"]):
        assert main([*command, str(packed.folder), "--out", str(tmp_path / "x"), "--dry-run", "-q"]) == 0
    assert (
        main(
            [
                "pack",
                str(packed.folder.parent / "source" / "source.json"),
                "--out",
                str(tmp_path / "x"),
                "--dry-run",
                "-q",
            ]
        )
        == 0
    )
    assert main(["preview", str(packed.folder), "--out", str(tmp_path / "x.html"), "--dry-run", "-q"]) == 0
    assert not list(tmp_path.iterdir())


def test_a_uniform_draw(packed, tmp_path, capsys):
    found = run(capsys, "sample", packed.folder, "--num", 12, "--seed", 5, "--out", tmp_path / "a")
    assert found["samples"] == 12 and found["draw"]["by"] == "rows" and found["draw"]["seed"] == 5
    drawn = [sample["id"] for sample, _ in samples_of(tmp_path / "a")]
    assert len(set(drawn)) == 12
    assert ShardSet.open(tmp_path / "a").manifest["made_by"]["by"] == "rows"
    other = draw(packed, 12, 6)
    assert other.rows.tolist() != draw(packed, 12, 5).rows.tolist() == sorted(draw(packed, 12, 5).rows.tolist())
    # A larger draw with the same seed holds the smaller one.
    assert set(draw(packed, 12, 5).rows) < set(draw(packed, 20, 5).rows)


def test_every_row_is_as_likely(packed):
    """400 draws of 10 from 40: each row 100 times, standard deviation 8.7; measured 76 to 124."""
    counts = Counter(int(row) for seed in range(400) for row in draw(packed, 10, seed).rows)
    assert min(counts.values()) > 60 and max(counts.values()) < 140


def weighted_set(tmp_path):
    """Two sources of 60 rows each, of repeat_time 3 and 1."""
    meta = {}
    for name, repeat_time in (("often", 3), ("seldom", 1)):
        rows = [{"question": f"{name} {i}?", "chosen": "A", "rejected": "B"} for i in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        meta[name] = {"root": "", "annotation": f"{name}.jsonl", "repeat_time": repeat_time}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    pack(PackOptions(source=tmp_path / "meta.json", out=tmp_path / "set"))
    return ShardSet.open(tmp_path / "set")


def test_a_draw_by_repeat_time(tmp_path):
    """Draws of 4 of 120 rows, 200 of them: three of four from the source of weight 3; by rows one of two."""
    shards = weighted_set(tmp_path)
    shares = {}
    for by in ("rows", "repeat_time"):
        rows = np.concatenate([draw(shards, 4, seed, by=by).rows for seed in range(200)])
        shares[by] = float((rows < 60).mean())
    assert abs(shares["rows"] - 0.5) < 0.06 and abs(shares["repeat_time"] - 0.75) < 0.06


def test_filters_say_what_they_refused(packed):
    filters = Filters(conditions=(parse_where("images=1"),), max_words=3, without=("yesyesyes",))
    found = draw(packed, None, 0, filters=filters)
    for row in found.rows:
        sample = packed.read_text(int(row))
        assert len(sample["images"]) == 1 and "yesyesyes" not in sample["chosen"][0]["content"]
    assert found.refused["--where"] == 10 and found.refused["special tokens"] > 0
    with pytest.raises(ValueError, match=r"only \d+ of 40 samples pass the filters"):
        draw(packed, 39, 0, filters=filters)


def test_pivots_draw_as_a_preset(tmp_path, capsys):
    """One image, no <image> in an answer, prompt and chosen of at most 1500 tokens (here: bytes); seed 777, by rows."""
    images = {"a.png": image_bytes(1), "b.png": image_bytes(2)}
    good = {"prompt": "What?", "chosen": "A", "rejected": "B", "image": "a.png"}
    rows = [good | {"prompt": f"What {i}?"} for i in range(5)]
    rows += [good | {"chosen": "x" * 1496}, good | {"chosen": "x" * 1495}]
    rows += [good | {"rejected": "see <image>"}, good | {"image": ["a.png", "b.png"]}, {**good, "image": None}]
    pack(PackOptions(source=write_rows(tmp_path / "in", rows, images), out=tmp_path / "set"))
    out = ["--out", str(tmp_path / "out")]
    assert main(["sample", str(tmp_path / "set"), "--preset", "pivot-20k", *out]) == 2
    assert "needs --tokenizer" in capsys.readouterr().err
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    found = run(capsys, "sample", tmp_path / "set", "--preset", "pivot-20k", "--num", 6, "--tokenizer", tokenizer, *out)
    assert found["draw"]["seed"] == 777 and found["draw"]["preset"] == "pivot-20k"
    chosen = {len(sample["chosen"][0]["content"]) for sample, _ in samples_of(tmp_path / "out")}
    assert chosen == {1, 1495}


def test_a_shard_that_mixes_shapes_is_found_and_resharded(packed, tmp_path, capsys):
    """As packs before shapes wrote them: what a sample's shape is then stands in the sample alone."""
    out, rows = tmp_path / "old", np.random.default_rng(0).permutation(40)
    with Journal(out, {}) as journal:
        writer = ShardWriter(out, "old-000000")
        for row in rows.tolist():
            writer.add_raw(packed.read_span(row), packed.index[row], packed.shards[packed.locate(row)[0]].shape)
        shard = writer.close()
        assert shard.shape == ""
        journal.finish([shard], name="old", kind="preference", sources={})
    assert main(["validate", str(out)]) == 1
    assert "old-000000.tar mixes samples of 2 shapes, so `datasets` does not open it" in capsys.readouterr().err
    assert run(capsys, "info", out)["shapes"] == [{"members": "mixed", "samples": 40, "shards": ["old-000000"]}]
    run(capsys, "reshard", out, "--out", tmp_path / "new")
    assert main(["validate", str(tmp_path / "new"), "-q"]) == 0
    shapes = run(capsys, "info", tmp_path / "new")["shapes"]
    assert {shape["members"]: shape["samples"] for shape in shapes} == {"json": 10, "json+png": 30}
    assert len(run(capsys, "info", packed.folder)["shapes"]) == 2
    new = ShardSet.open(tmp_path / "new")
    assert {shard.shape for shard in new.shards} == {shard.shape for shard in packed.shards}
