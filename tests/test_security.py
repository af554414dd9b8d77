"""What a stranger's files must not do, whatever reads them, and what no module of the repository may call.

SECURITY.md says what is trusted; docs/reliability.md lists the threats with the test of each.
"""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import socket
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools.__main__ import main
from data_tools.pack import PackOptions, pack
from pivot.config import REPOSITORY, Config
from pivot.data.loader import Loader
from pivot.data.shards import ShardSet
from pivot.models.build import resolve_sources
from tests.kit.damage import smuggle
from tests.kit.parts import build
from tests.kit.sets import FakeProcessor, image_bytes, make_plan, make_set, write_rows
from tests.kit.tiny import tiny_llava


class Payload:
    """A pickle that makes a folder where it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


def payloads(canary: Path) -> dict[str, bytes]:
    """Extension -> a file that runs something where its usual reader opens it without care."""
    file, array = io.BytesIO(), io.BytesIO()
    torch.save({"x": Payload(canary)}, file)
    np.save(array, np.array([Payload(canary)], dtype=object), allow_pickle=True)
    pickled = pickle.dumps(Payload(canary))
    with_torch = {"pth": file.getvalue(), "pt": file.getvalue()}
    return {"pyd": pickled, "pickle": pickled, "pkl": pickled, "npy": array.getvalue()} | with_torch


def test_the_payloads_are_live(tmp_path: Path) -> None:
    """Else no test here would mean anything."""
    for number, (name, load) in enumerate(
        {
            "pickle": pickle.loads,
            "npy": lambda data: np.load(io.BytesIO(data), allow_pickle=True),
            "pt": lambda data: torch.load(io.BytesIO(data), weights_only=False),
        }.items()
    ):
        load(payloads(tmp_path / str(number))[name])
        assert (tmp_path / str(number)).is_dir()


# -- data ----------------------------------------------------------------------------------------------------------


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, target: str = "") -> None:
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = len(data), kind, target
    tar.addfile(member, io.BytesIO(data))


def test_pickles_in_a_strangers_tar_are_not_opened(tmp_path: Path) -> None:
    """S1, of what is packed: members beside the row and its picture."""
    row = {"prompt": "What?", "chosen": "A", "rejected": "B"}
    with tarfile.open(tmp_path / "foreign.tar", "w") as tar:
        for number in range(3):
            add(tar, f"{number}.json", json.dumps(row | {"id": number, "prompt": f"What {number}?"}).encode())
            add(tar, f"{number}.png", image_bytes(number))
            for extension, data in payloads(tmp_path / "canary").items():
                add(tar, f"{number}.{extension}", data)
    result = pack(PackOptions(source=tmp_path / "foreign.tar", out=tmp_path / "set"))
    assert result.num_samples == 3 and not (tmp_path / "canary").exists()
    for shard in (tmp_path / "set" / "shards").glob("*.tar"):
        with tarfile.open(shard) as tar:
            assert {name.rpartition(".")[2] for name in tar.getnames()} == {"json", "png"}


def test_pickles_in_a_strangers_shards_are_not_opened(tmp_path: Path) -> None:
    """S1, of what is trained on: a packed set whose index and manifest admit them."""
    make_set(tmp_path)
    for row, (extension, data) in enumerate(payloads(tmp_path / "canary").items()):
        smuggle(tmp_path / "set", [row], f"{{key}}.{extension}", content=data)
    shards = ShardSet.open(tmp_path / "set")
    plan = make_plan(shards, tmp_path / "cache", world_size=1, global_batch_size=24)
    for _, micro_batches in islice(Loader(shards, plan, FakeProcessor(), workers=1), 1):
        assert sum(batch.num_completions for batch in micro_batches) == 48
    assert not (tmp_path / "canary").exists()


def test_no_address_of_a_row_is_fetched(tmp_path: Path) -> None:
    """S5: a listener on this machine hears nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        rows = [
            {"prompt": f"{number}?", "chosen": "A", "rejected": "B", "image": address}
            for number, address in enumerate(
                [f"http://127.0.0.1:{port}/a.png", f"HTTPS://127.0.0.1:{port}/b.png", f"ftp://127.0.0.1:{port}/c.png"]
            )
        ]
        rows.append({"prompt": "What?", "chosen": "A", "rejected": "B"})
        result = pack(PackOptions(source=write_rows(tmp_path / "in", rows), out=tmp_path / "out", max_drop=0.9))
        listener.settimeout(0.2)
        with pytest.raises(TimeoutError):
            listener.accept()
    assert result.tally.drops == {"URL": 3} and result.num_samples == 1


def test_nothing_is_extracted_from_a_tar(tmp_path: Path) -> None:
    """S6: members that would lie elsewhere, links and devices leave nothing behind outside of the set."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    work = tmp_path / "a" / "b"
    work.mkdir(parents=True)
    row = json.dumps({"prompt": "What?", "chosen": "A", "rejected": "B"}).encode()
    with tarfile.open(work / "foreign.tar", "w") as tar:
        add(tar, "../../escaped.json", row)
        add(tar, f"{tmp_path}/absolute.json", row.replace(b"What", b"When"))
        add(tar, "link.json", kind=tarfile.SYMTYPE, target=str(secret))
        add(tar, "hard.png", kind=tarfile.LNKTYPE, target="../../secret")
        add(tar, "device.png", kind=tarfile.CHRTYPE)
        add(tar, "good.json", row.replace(b"What", b"Who"))
    before = set(tmp_path.rglob("*"))
    result = pack(PackOptions(source=work / "foreign.tar", out=work / "set", max_drop=0.9))
    made = set(tmp_path.rglob("*")) - before
    assert result.num_samples and all(path.is_relative_to(work / "set") for path in made)
    assert not [path for path in made if path.is_file() and b"secret" in path.read_bytes()]
    for shard in (work / "set" / "shards").glob("*.tar"):
        with tarfile.open(shard) as tar:
            assert all("/" not in name and member.isreg() for name, member in zip(tar.getnames(), tar, strict=True))


@pytest.mark.parametrize("format", ["mmpr", "llava_onevision"])
@pytest.mark.parametrize("path", ["{secret}", "../private/rows.json"])
def test_a_set_does_not_choose_which_other_files_are_packed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str, path: str
) -> None:
    """S4, of the files of rows that another file names: only below its folder, or where the user says."""
    secret = tmp_path / "private" / "rows.json"
    secret.parent.mkdir()
    pair = {"question": "What?", "chosen": "A", "rejected": "B"}
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A"}]
    secret.write_text(json.dumps([pair if format == "mmpr" else {"id": 1, "conversations": turns}]))
    (tmp_path / "in").mkdir()
    named = path.format(secret=secret)
    if format == "mmpr":
        source = tmp_path / "in" / "meta.json"
        source.write_text(json.dumps({"a": {"root": "", "annotation": named}}))
    else:
        source = tmp_path / "in" / "mix.yaml"
        source.write_text(f"datasets: [{{json_path: {named}}}]")
    command = ["pack", str(source), "--out", str(tmp_path / "set")]
    assert main(command) == 2
    shown = capsys.readouterr().err
    assert f"{source} names {secret}, which lies outside of its folder" in shown
    assert f"admit it with --image-root {secret.parent}" in shown and not (tmp_path / "set" / "shards").exists()
    assert main([*command, "-q", "--image-root", str(secret.parent)]) == 0


# -- models --------------------------------------------------------------------------------------------------------

AUTO_MAP = {
    "config.json": {"AutoConfig": "code.Mine", "AutoModelForImageTextToText": "code.Mine"},
    "tokenizer_config.json": {"AutoTokenizer": ["code.Mine", "code.Mine"]},
    "processor_config.json": {"AutoProcessor": "code.Mine"},
    "preprocessor_config.json": {"AutoImageProcessor": "code.Mine"},
}


def test_no_file_of_a_model_runs_code(tmp_path: Path) -> None:
    """S11: each file that may name code of its folder does, and the model is opened as the stock one that it is."""
    canary, folder = tmp_path / "canary", tiny_llava(tmp_path / "llava")
    (folder / "custom_generate").mkdir()
    for name in ("code.py", "custom_generate/generate.py"):
        (folder / name).write_text(f"import os\nos.mkdir({str(canary)!r})\nclass Mine: pass\n")
    for name, auto_map in AUTO_MAP.items():
        path = folder / name
        settings = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(settings | {"auto_map": auto_map}))
    model, processor = build(Config(output_dir="unused", init_from=str(folder)))
    assert type(model).__name__ == "MLLM" and processor.image_token_id and not canary.exists()


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
def test_a_model_that_needs_its_code_is_refused(tmp_path: Path, name: str) -> None:
    """S11: a class that transformers does not have."""
    canary, folder = tmp_path / "canary", tiny_llava(tmp_path / "llava")
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(canary)!r})\nclass Mine: pass\n")
    own = {"tokenizer_class": "Mine"} if name.startswith("tokenizer") else {"model_type": "mine"}
    settings = json.loads((folder / name).read_text()) | own | {"auto_map": AUTO_MAP[name]}
    (folder / name).write_text(json.dumps(settings))
    try:
        build(Config(output_dir="unused", init_from=str(folder)))
    except ValueError as error:
        assert "\n" not in str(error).strip()
    else:
        assert name.startswith("tokenizer")  # whose plain file transformers may read with a class of its own
    assert not canary.exists()


def test_pickled_weights_of_a_whole_model_are_not_unpickled(tmp_path: Path) -> None:
    """S3, of init_from and of what is evaluated."""
    canary, folder = tmp_path / "canary", tiny_llava(tmp_path / "llava")
    (folder / "model.safetensors").unlink()
    torch.save({"x": Payload(canary)}, folder / "pytorch_model.bin")
    resolve_sources(Config(output_dir="unused", init_from=str(folder)))
    with pytest.raises(Exception, match=r"(?i)weights[_ ]only|unpickl"):
        build(Config(output_dir="unused", init_from=str(folder)))
    assert not canary.exists()


# -- the source ----------------------------------------------------------------------------------------------------

PACKAGES = ("pivot", "launch", "data_tools", "benchmarks")


def calls() -> Iterator[tuple[str, str, dict[str, str]]]:
    """(file, what is called, its named arguments) for every call of the repository."""
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"), str(path))):
                if isinstance(node, ast.Call):
                    named = {word.arg: ast.unparse(word.value) for word in node.keywords if word.arg}
                    yield str(path.relative_to(REPOSITORY)), ast.unparse(node.func), named


CALLS = list(calls())
CHECKED_BY_HASH = "launch/assets.py"  # one named file out of a package whose sha256 stands there


def where(condition: Any) -> list[str]:
    return [f"{file}: {name}" for file, name, named in CALLS if condition(name, named)]


def test_no_loading_runs_what_it_reads() -> None:
    """S3: torch.load says weights_only or stands in the one module that sees to it for DeepSpeed; no pickle at all."""
    unsafe = where(lambda name, named: name == "torch.load" and named.get("weights_only") != "True")
    assert unsafe == ["pivot/engine/files.py: torch.load"]
    assert not where(lambda name, named: named.get("weights_only", "True") != "True")
    assert not where(lambda name, named: name == "np.load" and named.get("allow_pickle") != "False")
    assert not where(lambda name, named: named.get("allow_pickle", "False") != "False")
    pickles = where(lambda name, named: name.startswith(("pickle.", "cPickle.", "dill.", "joblib.", "marshal.")))
    assert set(pickles) == {f"benchmarks/scale.py: pickle.{name}" for name in ("dumps", "loads")}  # what a gather costs
    assert not where(lambda name, named: name in ("eval", "exec", "torch.hub.load", "yaml.load", "yaml.unsafe_load"))


def test_no_remote_code_and_no_weight_left_out() -> None:
    """S11, and test 9: from_pretrained of anything that may name code says so; load_state_dict is strict."""
    assert not where(lambda name, named: named.get("trust_remote_code", "False") != "False")
    loads = where(
        lambda name, named: (
            name.endswith(".from_pretrained") and "trust_remote_code" not in named and "Embedding" not in name
        )
    )
    assert not [place for place in loads if not place.startswith(("benchmarks/", CHECKED_BY_HASH))]
    assert not where(lambda name, named: named.get("strict") == "False" and name.endswith("load_state_dict"))


def test_no_shell_and_no_extraction() -> None:
    """S6 and S13."""
    assert not where(lambda name, named: named.get("shell", "False") != "False")
    shells = ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput")
    assert not where(lambda name, named: name in shells or name.startswith("os.spawn"))
    unpacked = where(lambda name, named: name.endswith((".extractall", ".extract")) or name == "shutil.unpack_archive")
    assert not [place for place in unpacked if not place.startswith(CHECKED_BY_HASH)]


def test_nothing_is_uploaded() -> None:
    """S16: there is no push to a hub, so no token for one is read."""
    ends = ("push_to_hub", "upload_folder", "upload_file", "create_repo", "create_commit", "HfApi")
    assert not where(lambda name, named: name.rpartition(".")[2] in ends)


def test_what_is_installed_is_checked_by_hash() -> None:
    """S17: make's own environment and the containers; the only other install is that of the repository itself."""
    for name in ("Makefile", "launch/containers/Dockerfile", "launch/containers/pivot.def"):
        text = (REPOSITORY / name).read_text("utf-8")
        installs = [line for line in text.splitlines() if "pip install" in line and "/newest" not in line]
        for line in installs:
            ranged = ".venv-oldest" in line or ".venv-newest" in line  # what a maintainer tests the ranges with
            assert "--require-hashes" in line or ("--no-deps" in line and " -e ." in line) or ranged, f"{name}: {line}"
        assert installs and not [line for line in text.splitlines() if "index-url" in line or "trusted-host" in line]


def test_every_sentence_of_an_export_is_plain(tmp_path: Path) -> None:
    """A stranger's run: what its manifest says of files reaches the terminal with control characters written out."""
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    (run / "config.yaml").write_text(
        "output_dir: o\ninit_from: i\ndata: {train: x}\nobjective: {dpo: {}}\n"
        "train: {global_batch_size: 4, max_steps: 1}\n"
        "optim: {vision_tower: {lr: 1e-4}, projector: {lr: 1e-3}, language_model: {lr: 1e-5}}\n"
    )
    files = {"\x1b[2Jtitle\x07": {"bytes": 1, "sha256": "0"}}
    (checkpoint / "manifest.json").write_text(json.dumps({"step": 1, "files": files}))
    command = ["launch/export.py", str(run), "--out", str(tmp_path / "out")]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True, env=environment)
    shown = done.stdout + done.stderr
    assert done.returncode == 1 and "title" in shown and "\x1b" not in shown and "\x07" not in shown
