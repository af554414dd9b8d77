"""S13: what a user names, however it is called, stays one word in make and in job scripts; nothing of it is run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pivot.config import REPOSITORY

DOLLAR = "$"  # make reads two of them as one
RUN = "touch $WORDS.ran"  # what a shell would do that reads it
HOSTILE = f"""it's $({RUN}) `{RUN}`; {RUN} #"x" & | <a> *"""
STUB = '#!/bin/bash\nfor word in "$@"; do printf "%s\\0" "$word"; done >>"$WORDS"\n'


@pytest.fixture
def stub(tmp_path: Path) -> dict[str, str]:
    """An environment whose PYTHON writes down the words that it gets."""
    python = tmp_path / "python"
    python.write_text(STUB)
    python.chmod(0o755)
    return os.environ | {"PYTHON": str(python), "WORDS": str(tmp_path / "words")}


def words(tmp_path: Path) -> list[str]:
    path = tmp_path / "words"
    return path.read_text().split("\0")[:-1] if path.is_file() else []


def require_nothing_ran(tmp_path: Path) -> None:
    assert not (tmp_path / "words.ran").exists()


@pytest.mark.parametrize("style", ["one_task_per_gpu", "one_task_per_node", "share_of_pack"])
def test_words_of_a_job_script_stay_words(tmp_path: Path, stub: dict[str, str], style: str) -> None:
    told = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1", "SLURM_NODEID": "0", "NPROC": "1"}
    told |= {"NODES": "localhost", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    command = ["bash", "launch/slurm/task.sh", style, "launch/train_dpo.py", HOSTILE, f"output_dir={HOSTILE}"]
    done = subprocess.run(command, cwd=REPOSITORY, env=stub | told, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    named = f"{HOSTILE}/0001" if style == "share_of_pack" else HOSTILE
    assert {named, f"output_dir={HOSTILE}"} <= set(words(tmp_path))
    require_nothing_ran(tmp_path)


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize(
    ("target", "variables"),
    [
        ("shards", {"SRC": HOSTILE, "OUT": f"{HOSTILE} out"}),
        ("dpo", {"CONFIG": HOSTILE}),
        ("sft", {"CONFIG": HOSTILE, "NPROC": f"1; {RUN}"}),
    ],
)
def test_words_of_make_stay_words(tmp_path: Path, stub: dict[str, str], target: str, variables: dict[str, str]) -> None:
    settings = [f"{name}={value.replace(DOLLAR, 2 * DOLLAR)}" for name, value in variables.items()]
    done = subprocess.run(
        ["make", target, f"PYTHON={stub['PYTHON']}", *settings],
        cwd=REPOSITORY,
        env=stub,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert set(variables.values()) <= set(words(tmp_path))
    require_nothing_ran(tmp_path)


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize("name", [f"runs/a; {RUN}", "runs/a b", f"runs/$({RUN})", f"runs/`{RUN}`", "it's"])
def test_a_demo_folder_is_a_plain_name(tmp_path: Path, stub: dict[str, str], name: str) -> None:
    """It is a target of make's, which knows no quotes."""
    done = subprocess.run(
        ["make", "dpo", f"PYTHON={stub['PYTHON']}", f"DEMO={name.replace(DOLLAR, 2 * DOLLAR)}"],
        cwd=REPOSITORY,
        env=stub,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "DEMO: found" in done.stderr and not words(tmp_path)
    require_nothing_ran(tmp_path)
