"""What the README says of files: that they are there, and that the core reads in an afternoon."""

from __future__ import annotations

import re

import pytest

from pivot.config import REPOSITORY

README = (REPOSITORY / "README.md").read_text("utf-8")
FOLDERS = ("pivot", "launch", "data_tools", "ds_configs", "tests", "benchmarks", "docs")


def paths_in(text: str) -> list[str]:
    return re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./:-]*)`", text)


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


@pytest.mark.parametrize("name", ["docs/reliability.md", "SECURITY.md", "docs/clusters.md", "CONTRIBUTING.md"])
def test_every_path_that_a_document_names_is_there(name: str) -> None:
    """`tests/a.py::test_b` names a test, which must be one."""
    text = (REPOSITORY / name).read_text("utf-8")
    for path, _, test in (found.partition("::") for found in paths_in(text)):
        assert (REPOSITORY / path).exists(), path
        assert not test or f"\ndef {test}(" in (REPOSITORY / path).read_text("utf-8"), f"{path} has no {test}"


def test_every_fault_and_threat_has_its_line_and_its_test() -> None:
    """25 and 19; a line without a test of its own leads to lines that have one."""
    lines = (REPOSITORY / "docs/reliability.md").read_text("utf-8").splitlines()
    rows = {cells[1].strip(): cells[4] for cells in (line.split("|") for line in lines) if len(cells) == 7}
    expected = [str(number) for number in range(1, 26)] + [f"S{number}" for number in range(1, 20)]
    assert [key for key in rows if key.strip("#-")] == expected
    for key in expected:
        assert "`tests/" in rows[key] or re.search(r"S\d+.* below", rows[key]), key
