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
from tests.data.fakes import make_rows, make_set, mixed_rows, row_of, write_rows


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


def flip_bit(opened, row):
    """Change one bit of the last byte block of a sample on the disk."""
    shard, _ = opened.locate(row)
    path = opened.folder / "shards" / f"{opened.shards[shard].name}.tar"
    record = opened.index[row]
    with path.open("r+b") as file:
        place = int(record["offset"]) + int(record["span"]) - BLOCK
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 4]))
