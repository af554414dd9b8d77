"""A packed set reads back as it was, opens in webdataset and tarfile unchanged, and damage has a clear error."""

import io
import json
import os
import pickle
import shutil
import subprocess
import tarfile

import pytest
import webdataset

from data_tools.__main__ import main
from data_tools.pack import PackOptions, pack
from pivot.data import shards as shards_module
from pivot.data.shards import BLOCK, DamagedSample, ShardSet, walk_members
from tests.kit.damage import SMUGGLED, flip_bit, smuggle
from tests.kit.sets import make_rows, make_set, mixed_rows, row_of, write_rows


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def folder(packed, tmp_path):
    """A copy to damage."""
    return shutil.copytree(packed.folder, tmp_path / "set")


def test_every_row_reads_back(packed):
    rows, images = make_rows(24)
    assert len(packed) == 24 and packed.shard_sizes == (5, 5, 5, 5, 1, 3)
    for number, row in enumerate(rows):
        place = row_of(packed, number)
        sample, files = packed.read(place)
        assert sample["chosen"][0]["content"] == row["chosen"]
        assert sample == packed.read_text(place)
        assert files == ([images[row["image"]]] if "image" in row else [])


def test_few_files_stay_open(packed, monkeypatch):
    monkeypatch.setattr(shards_module, "MAX_OPEN_FILES", 2)
    opened = ShardSet.open(packed.folder)
    assert [opened.read(row)[0]["id"] for row in (0, 23, 6, 11, 0)][-1] == "source/r0"
    assert len(opened._files) == 2


def test_a_worker_process_opens_its_own_files(packed):
    packed.read(0)
    copy = pickle.loads(pickle.dumps(packed))
    assert not copy._files and copy.read(7) == packed.read(7)


def test_shards_open_in_tarfile_and_webdataset_unchanged(packed):
    first = packed.folder / "shards" / "tiny-000001.tar"
    with tarfile.open(first) as tar:
        members = tar.getmembers()
    assert all(member.isfile() and member.mtime == 0 for member in members)
    assert members[0].name.endswith(".json")
    urls = [str(packed.folder / "shards" / f"{shard.name}.tar") for shard in packed.shards]
    dataset = webdataset.WebDataset(urls, shardshuffle=False)
    for row, found in enumerate(dataset):
        sample, files = packed.read(row)
        assert json.loads(found["json"]) == sample
        assert [found[image["member"]] for image in sample["images"]] == files
    assert row == len(packed) - 1


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("made_by", ["pack", "reshard", "split", "sample"])
def test_every_shard_opens_in_datasets_unchanged(tmp_path, made_by, streaming):
    """`datasets` asks that all samples of a tar have members of the same names, and JSON of the same types."""
    import datasets  # a second, so not for the other tests

    rows, images = mixed_rows(60)
    pack(PackOptions(source=write_rows(tmp_path / "in", rows, images), out=tmp_path / "pack", samples_per_shard=8))
    commands = {"split": ["--eval", "0.4"], "sample": ["--num", "50"], "reshard": ["--shuffle"]}
    if made_by != "pack":
        options = [str(tmp_path / "pack"), *commands[made_by], "--out", str(tmp_path / made_by), "-q"]
        assert main([made_by, *options]) == 0
    opened = ShardSet.open(tmp_path / ("split/train" if made_by == "split" else made_by))
    assert len({shard.shape for shard in opened.shards}) == 7
    row = 0
    for number in range(len(opened.shards)):
        url = str(opened.fetch(number))
        found = datasets.load_dataset(
            "webdataset", data_files=url, split="train", streaming=streaming, cache_dir=str(tmp_path / "cache")
        )
        raw = iter(webdataset.WebDataset(url, shardshuffle=False))
        for decoded in found.decode(False) if streaming else found:
            sample, files = opened.read(row)
            plain = next(raw)
            assert json.loads(plain["json"]) == sample
            assert decoded["json"]["id"] == sample["id"] and decoded["json"]["answer"] == sample["answer"]
            assert decoded["json"]["chosen"] == sample["chosen"]
            assert [plain[image["member"]] for image in sample["images"]] == files
            for image, data in zip(sample["images"], files, strict=True):
                seen = decoded[image["member"]]
                assert seen["bytes"] == data if streaming else seen.size == (12, 10)
            row += 1
        assert next(raw, None) is None
        subprocess.run(["tar", "tf", url], check=True, capture_output=True)
    assert row == len(opened) >= 36


def test_tar_lists_shards(packed):
    names = subprocess.run(
        ["tar", "tf", packed.folder / "shards" / "tiny-000000.tar"], check=True, capture_output=True, text=True
    ).stdout.split()
    assert len(names) == 5 and all(name.endswith(".json") for name in names)  # of pairs without a picture


def test_no_manifest(folder, tmp_path):
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"no manifest.json \(pack did not finish\); run python -m data_tools pack"):
        ShardSet.open(folder)
    with pytest.raises(ValueError, match="the folder does not exist"):
        ShardSet.open(tmp_path / "nowhere")


def test_a_missing_shard_or_index(folder):
    (folder / "index" / "tiny-000002.idx").unlink()
    with pytest.raises(ValueError, match=r"tiny-000002.idx is missing"):
        ShardSet.open(folder)
    (folder / "shards" / "tiny-000001.tar").unlink()
    with pytest.raises(ValueError, match=r"tiny-000001.tar is missing, though manifest.json lists it"):
        ShardSet.open(folder)


def test_a_shard_cut_in_half_is_an_error_at_open(folder):
    path = folder / "shards" / "tiny-000003.tar"
    size = path.stat().st_size
    os.truncate(path, size // 2)
    with pytest.raises(ValueError, match=rf"tiny-000003.tar holds {size // 2} bytes, manifest.json says {size}"):
        ShardSet.open(folder)


def test_a_damaged_index(folder):
    path = folder / "index" / "tiny-000000.idx"
    data = bytearray(path.read_bytes())
    data[9] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"tiny-000000.idx: sha256 differs"):
        ShardSet.open(folder)


def test_an_edited_manifest(folder):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][0]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="does not match its shard list"):
        ShardSet.open(folder)
    manifest["shards"][0]["name"] = "../outside"
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"shard name '../outside'"):
        ShardSet.open(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("shards"), "shards is missing, expected a list"),
        (lambda m: m.pop("fingerprint"), "fingerprint is missing, expected a text"),
        (lambda m: m.pop("name"), "name is missing, expected a text"),
        (lambda m: m.update(name=7), "name is 7, expected a text"),
        (lambda m: m.pop("kind"), "kind is missing, expected a text"),
        (lambda m: m.update(kind="binary"), "kind is 'binary', expected preference or sft"),
        (lambda m: m.update(shards={"a": 1}), "shards is {'a': 1}, expected a list"),
        (lambda m: m.update(shards=["a"]), r"shards\[0\] is 'a', expected an object"),
        (lambda m: m["shards"][1].update(size=1), r"shards\[1\] has a field 'size', expected name, samples, bytes"),
        (lambda m: m["shards"][1].pop("bytes"), r"shards\[1\].bytes is missing, expected a whole number above 0"),
        (lambda m: m["shards"][0].update(samples="9"), r"shards\[0\].samples is '9', expected a whole number above 0"),
        (lambda m: m["shards"][0].update(samples=-9), r"shards\[0\].samples is -9, expected a whole number above 0"),
    ],
)
def test_a_damaged_manifest(folder, change, message):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"^{path}: {message}.*; the file was edited .* copy the data set again"):
        ShardSet.open(folder)


def test_an_older_manifest_may_lack_the_shapes(folder, packed):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for entry in manifest["shards"]:
        del entry["shape"]
    path.write_text(json.dumps(manifest))
    assert {shard.shape for shard in ShardSet.open(folder).shards} == {""}


def test_sound_shards_open_where_others_are_missing_or_cut(folder, packed):
    assert ShardSet.open_sound(folder)[1] == []
    (folder / "shards" / "tiny-000001.tar").unlink()
    os.truncate(folder / "index" / "tiny-000003.idx", 64)
    sound, problems = ShardSet.open_sound(folder)
    assert [shard.name for shard in sound.shards] == [f"tiny-00000{number}" for number in (0, 2, 4, 5)]
    assert [sound.read(row)[0]["id"] for row in (0, 5)] == [packed.read(row)[0]["id"] for row in (0, 10)]
    assert len(problems) == 2 and "tiny-000001.tar is missing" in problems[0]
    assert "tiny-000003.idx holds 64 bytes, expected 64 for each of 5 samples" in problems[1]


@pytest.mark.parametrize("what", SMUGGLED)
def test_what_a_sample_does_not_list_is_never_read_and_never_copied(folder, packed, what):
    smuggle(folder, [7], SMUGGLED[what], tarfile.SYMTYPE if what == "link" else tarfile.REGTYPE)
    opened = ShardSet.open(folder)
    assert opened.read_entries(6) == packed.read_entries(6)
    assert opened.read(7) == packed.read(7)
    name = SMUGGLED[what].replace("{key}", r"\w+") + (r" \(type 2\)" if what == "link" else "")
    with pytest.raises(ValueError, match=rf"row 7\): holds the members .*'{name}'\], expected .* pack {folder}/shards"):
        opened.read_entries(7)


def test_a_picture_that_is_not_listed_is_left_alone_and_copied(folder, packed):
    smuggle(folder, [7], "{key}.mask.png")
    opened = ShardSet.open(folder)
    assert opened.read(7) == packed.read(7)
    _, entries = opened.read_entries(7)
    key = packed.read_span(7)[:BLOCK].split(b".")[0].decode()
    assert [name for name, _ in walk_members(entries)] == [f"{key}.json", f"{key}.png", f"{key}.mask.png"]


def test_a_flipped_bit_is_found_in_its_sample_only(folder):
    opened = ShardSet.open(folder)
    flip_bit(opened, 6)
    with pytest.raises(DamagedSample, match=r"tiny-000001.tar sample 1 \(row 6\): crc32 differs"):
        opened.read(6)
    assert opened.read(5) and opened.read(7)


def test_a_shard_cut_after_open_is_found(folder):
    opened = ShardSet.open(folder)
    os.truncate(folder / "shards" / "tiny-000005.tar", 600)
    with pytest.raises(DamagedSample, match="the shard is cut"):
        opened.read(21)


def test_members_are_walked_without_tarfile():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in (("a.json", b"{}"), ("a.jpg", bytes(513)), ("a.pyd", b"")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        end = tar.offset
    buffer = file.getvalue()[:end]
    assert [(name, len(body)) for name, body in walk_members(buffer)] == [("a.json", 2), ("a.jpg", 513), ("a.pyd", 0)]
    with pytest.raises(ValueError, match="no tar member"):
        list(walk_members(buffer[: 3 * BLOCK]))


@pytest.mark.parametrize(
    "size", [b"-0000001000", b"\x80" + b"\0" * 11, b"\xff" * 12, b"99999999999", b"77777777777", b"0o7"]
)
def test_a_size_that_is_no_octal_number_is_no_member(size):
    """-512 led back to the same header, without end."""
    header = bytearray(tarfile.TarInfo("a.json").tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = size.ljust(12, b"\0")
    with pytest.raises(ValueError, match="no tar member at byte 0"):
        list(walk_members(bytes(header) + bytes(BLOCK)))
