"""`validate` lists every problem and goes on: shards that are gone, members that nobody listed, samples that repeat."""

import hashlib
import json
import os
import shutil
import tarfile

import pytest

from data_tools.__main__ import main
from data_tools.validate import validate
from pivot.data.manifest import set_fingerprint
from pivot.data.shards import BLOCK, ShardSet
from tests.kit.damage import SMUGGLED, flip_bit, smuggle
from tests.kit.sets import make_set


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("validate"))


@pytest.fixture
def folder(packed, tmp_path):
    """A copy to damage."""
    return shutil.copytree(packed.folder, tmp_path / "set")


def test_missing_and_cut_shards_are_listed_and_the_others_checked(folder, capsys):
    """Shards of 5, 5, 5, 5, 1 and 3 samples: without the second and the fourth 14 are left, one of them damaged."""
    flip_bit(ShardSet.open(folder), 12)
    (folder / "shards" / "tiny-000001.tar").unlink()
    cut = folder / "shards" / "tiny-000003.tar"
    os.truncate(cut, cut.stat().st_size // 2)
    for options, num_problems in (["--workers", "1"], 4), (["--workers", "2"], 4), (["--fast"], 2):
        assert main(["validate", str(folder), "--json", *options]) == 1
        shown = capsys.readouterr()
        found = json.loads(shown.out)
        assert found["samples"] == 14 and len(found["problems"]) == num_problems
        assert "tiny-000001.tar is missing, though manifest.json lists it" in shown.err
        assert "tiny-000003.tar holds" in shown.err and "the copy is cut: repeat it" in shown.err
        assert options == ["--fast"] or "tiny-000002.tar sample 2" in shown.err
    for shard in ("000000", "000002", "000004", "000005"):
        (folder / "shards" / f"tiny-{shard}.tar").unlink()
    assert validate(folder).num_samples == 0 and len(validate(folder).problems) == 6
    (folder / "manifest.json").unlink()
    assert main(["validate", str(folder)]) == 2


@pytest.mark.parametrize("what", SMUGGLED)
@pytest.mark.parametrize("rows", [[7], range(24)], ids=["one", "all"])
def test_a_member_that_no_sample_lists_is_an_error(folder, capsys, what, rows):
    """Also where index and manifest agree with it; `reshard` is no way out, since it copies what is there."""
    smuggle(folder, rows, SMUGGLED[what], tarfile.SYMTYPE if what == "link" else tarfile.REGTYPE)
    assert main(["validate", str(folder)]) == 1
    shown = capsys.readouterr().err
    assert shown.count("holds the members") == len(rows)
    assert f"python -m data_tools pack {folder}/shards --out NEW leaves it out" in shown and "reshard" not in shown


def test_what_lies_behind_the_last_sample_is_an_error(folder, packed):
    opened = ShardSet.open(folder)
    entry = tarfile.TarInfo("behind.pyd").tobuf(tarfile.USTAR_FORMAT)
    path = opened.fetch(1)
    data = path.read_bytes()
    end = int(opened.index[9]["offset"]) + int(opened.index[9]["span"])
    path.write_bytes(data[:end] + entry + bytes(2 * BLOCK))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][1] |= {
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    shards = [type(opened.shards[0])(**shard) for shard in manifest["shards"]]
    (folder / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": set_fingerprint(shards)}))
    problems = validate(folder).problems
    assert problems == [f"{path}: holds 'behind.pyd' behind the last sample of its index; pack it again"]


def test_packing_the_shards_anew_leaves_out_what_nobody_listed(folder, packed, tmp_path):
    smuggle(folder, range(24), "{key}.pyd")
    assert main(["pack", str(folder / "shards"), "--out", str(tmp_path / "new"), "--workers", "1", "-q"]) == 0
    assert main(["validate", str(tmp_path / "new"), "-q"]) == 0
    new = ShardSet.open(tmp_path / "new")
    files = [sorted(files for _, files in map(shards.read, range(24))) for shards in (new, packed)]
    assert len(new) == 24 and files[0] == files[1]
