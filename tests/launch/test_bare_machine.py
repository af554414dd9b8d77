"""No network, no GPU, no flash-attn, no compiler, an empty home: all that the commands do works on such a machine."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pivot.config import REPOSITORY
from tests.kit.commands import rank_free_environment
from tests.kit.sets import make_rows, write_rows
from tests.kit.tiny import tiny_llava

# Read by every Python that starts: whoever asks for another machine is written down and gets no answer.
OFFLINE = """
import os, socket, sys
sys.modules["flash_attn"] = None
HERE = ("127.0.0.1", "::1", "localhost", socket.gethostname(), None, "")
connect, resolve = socket.socket.connect, socket.getaddrinfo
def refuse(host):
    with open(os.environ["ASKED"], "a") as file:
        file.write(f"{host}\\n")
    raise OSError("there is no network")
def local_connect(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in HERE:
        refuse(address[0])
    return connect(self, address)
def local_resolve(host, *rest, **named):
    return resolve(host, *rest, **named) if host in HERE else refuse(host)
socket.socket.connect, socket.getaddrinfo = local_connect, local_resolve
"""
RUN = """
output_dir: {folder}/run
init_from: {folder}/llava
deepspeed: ds_configs/zero3.json
data: {{train: {folder}/set, eval: {folder}/set, workers: 1}}
objective: {{dpo: {{}}}}
optim: {{vision_tower: {{lr: 1e-4}}, projector: {{lr: 1e-3}}, language_model: {{lr: 1e-4}}}}
train: {{global_batch_size: 4, max_steps: 1}}
evaluate: {{num_samples: 4, max_new_tokens: 2}}
"""


class Machine:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("home", "temp", "bin", "site"):
            (folder / name).mkdir()
        (folder / "site" / "sitecustomize.py").write_text(OFFLINE)
        self.asked = folder / "asked"
        kept = {
            name: value
            for name, value in rank_free_environment().items()
            if not name.startswith(("HF_", "TORCH", "XDG"))
        }
        for name in ("CXX", "CC", "DS_ACCELERATOR"):
            kept.pop(name, None)
        self.environment = kept | {
            "PATH": str(folder / "bin"),
            "HOME": str(folder / "home"),
            "TMPDIR": str(folder / "temp"),
            "PYTHONPATH": f"{folder / 'site'}:{REPOSITORY}",
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "ASKED": str(self.asked),
        }

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, cwd=REPOSITORY, env=self.environment, capture_output=True, text=True)

    def must(self, *words: object) -> str:
        done = self.run(*words)
        assert done.returncode == 0, (words, done.stderr[-3000:])
        return done.stdout


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    tiny_llava(tmp_path / "llava")
    (tmp_path / "run.yaml").write_text(RUN.format(folder=tmp_path))
    return Machine(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_pack_check_train_export_and_evaluate(machine: Machine) -> None:
    """S14 too: nothing is left in the machine's shared folder for temporary files, and nobody else may write what is
    left anywhere."""
    folder = machine.folder
    source = write_rows(folder / "in", *make_rows(24))
    machine.must("-m", "data_tools", "pack", source, "--out", folder / "set")
    machine.must("launch/train_dpo.py", "--help")
    assert "max_steps: 1" in machine.must("launch/train_dpo.py", folder / "run.yaml", "--print-config")
    assert "24 of 24 samples" in machine.must("launch/train_dpo.py", folder / "run.yaml", "--check")
    machine.must("launch/train_dpo.py", folder / "run.yaml")
    machine.must("launch/export.py", folder / "run", "--out", folder / "exported")
    machine.must(
        "launch/evaluate.py", "held-out", "--model", folder / "run", "--data", folder / "set", "--num-samples", 4
    )
    machine.must("launch/report.py", folder / "run")
    assert not machine.asked.exists(), machine.asked.read_text()
    assert list((folder / "temp").iterdir()) == []
    assert stat.S_IMODE((folder / "home/.cache/torchinductor").stat().st_mode) == 0o700
    for path in folder.rglob("*"):
        assert path.is_symlink() or not path.stat().st_mode & stat.S_IWOTH, path


@pytest.mark.slow
def test_what_needs_a_compiler_says_so(machine: Machine) -> None:
    machine.must(
        "-m", "data_tools", "pack", write_rows(machine.folder / "in", *make_rows(24)), "--out", machine.folder / "set"
    )
    done = machine.run("launch/train_dpo.py", machine.folder / "run.yaml", "deepspeed=ds_configs/zero3_offload.json")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "deepspeed: offload_optimizer needs a C++ compiler" in done.stderr and "ds_configs/zero3.json" in done.stderr
