"""Who may import whom, read from the source; and what stays light, seen in a fresh interpreter."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pivot", "launch", "data_tools")
APART = ("pivot.data", "pivot.models", "pivot.objectives")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Every module that `path` imports anywhere, `from a import b` as a.b, since b may be a module."""
    found: set[str] = set()
    package = module_name(path).split(".") if path.name == "__init__.py" else module_name(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            prefix = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*prefix, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


IMPORTS = {
    module_name(path): imports_of(path) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))
}


def importers(package: str) -> set[str]:
    return {module for module, names in IMPORTS.items() if any(inside(name, package) for name in names)}


def test_the_graph_is_read():
    assert inside("pivot.batch", "pivot") and "pivot.batch" in importers("torch")
    assert "pivot.objectives.sft" in importers("pivot.batch")


def test_only_the_engine_imports_deepspeed():
    assert all(inside(module, "pivot.engine") for module in importers("deepspeed"))


@pytest.mark.parametrize("package", APART)
def test_data_models_and_objectives_do_not_know_each_other(package):
    own = {module for module in IMPORTS if inside(module, package)}
    for other in APART:
        assert other == package or not own & importers(other), f"{package} imports {other}"


def test_encoders_lie_below_data_processor_and_models():
    above = ("pivot.data", "pivot.processor", "pivot.models", "pivot.objectives", "pivot.startup", "pivot.evaluate")
    own = {module for module in IMPORTS if inside(module, "pivot.encoders")}
    assert "pivot.encoders.tower" in own
    assert not [package for package in above if own & importers(package)]


@pytest.mark.parametrize("library", ["open_clip", "timm"])
def test_an_encoder_library_is_imported_in_one_file(library):
    """Beside the command that writes its folders."""
    assert importers(library) <= {f"pivot.encoders.{library}", "launch.assets"}


def test_nothing_in_the_library_imports_train():
    assert not {module for module in importers("pivot.train") if inside(module, "pivot")}


def test_training_does_not_draw_reports():
    """A command writes the report when training is over: what only draws must not keep a run from starting."""
    assert not {module for module in importers("pivot.report") if inside(module, "pivot") and ".report" not in module}


@pytest.mark.parametrize("module", ["pivot.config", "pivot.objectives.losses"])
def test_light_modules_stay_light(module):
    """Neither may pull in transformers or deepspeed, and the losses no OmegaConf either: they are torch alone."""
    heavy = ["transformers", "deepspeed", "open_clip", "webdataset"]
    heavy += ["omegaconf"] if module == "pivot.objectives.losses" else ["torch"]
    code = f"import sys, {module}; print(*sorted(set({heavy!r}) & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [], f"import {module} also imports {run.stdout}"


@pytest.mark.parametrize("name", ["pivot", "data_tools"])
def test_every_folder_of_code_is_installed(name):
    """setup.py takes the folders that are packages: one without __init__.py works in a checkout and nowhere else."""
    folders = {path.parent for path in (ROOT / name).rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []
