"""What the README says of files: that they are there, and that the core reads in an afternoon."""

from __future__ import annotations

import re

from pivot.config import REPOSITORY

README = (REPOSITORY / "README.md").read_text("utf-8")
FOLDERS = ("pivot", "launch", "data_tools", "ds_configs", "tests", "benchmarks", "docs")


def paths_in(text: str) -> list[str]:
    return re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`", text)


def section(title: str) -> str:
    start = README.index(title) + len(title)
    following = re.search(r"^#", README[start:], re.MULTILINE)
    return README[start : start + following.start() if following else None]


def test_every_path_that_the_readme_names_is_there() -> None:
    named = paths_in(README)
    assert len(named) > 60
    assert [path for path in named if not (REPOSITORY / path).exists()] == []


def test_the_core_reads_in_an_afternoon() -> None:
    """2,700 lines at most, each file once; the section says about how many."""
    text = section("### To understand a DPO step in an afternoon")
    files = paths_in(text)
    lines = sum(len((REPOSITORY / path).read_text("utf-8").splitlines()) for path in files)
    told = re.search(r"(\d),(\d+) lines", text)
    assert told is not None and len(files) == len(set(files)) == 16
    assert lines <= 2700 and abs(lines - int(told[1] + told[2])) < 75


def test_the_librarys_root_stays_small() -> None:
    assert len([path for path in (REPOSITORY / "pivot").glob("*.py") if path.name != "__init__.py"]) <= 12
