"""The ranges of releases: what setup.py asks for, what the lock file holds, and what a start says outside of them."""

from __future__ import annotations

import re
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from pivot.config import REPOSITORY
from pivot.versions import RANGES, describe_untested, lowest

LOCK = (REPOSITORY / "requirements.lock").read_text(encoding="utf-8")


def test_the_lock_holds_one_release_of_each_range_and_hashes() -> None:
    """For every Python that is supported: a package that is locked twice is so for different Pythons."""
    for name, allowed in RANGES.items():
        releases = re.findall(rf"^{name.replace('_', '[-_]')}==(\S+)", LOCK, re.MULTILINE)
        assert releases, f"{name} is not in requirements.lock; run make lock"
        assert all(SpecifierSet(allowed).contains(release) for release in releases), (name, releases)
    blocks = re.split(r"\n(?=[a-zA-Z0-9._-]+==)", LOCK.strip())
    assert all("--hash=sha256:" in block for block in blocks)


def test_the_lock_names_no_index() -> None:
    assert not re.search(r"https?://|--(extra-)?index-url|--find-links", LOCK)


def test_torch_and_torchvision_are_a_pair() -> None:
    """torchvision names the one release of torch that it imports beside."""
    (torch,) = re.findall(r"^torch==(\S+)", LOCK, re.MULTILINE)
    wanted = [Requirement(text) for text in metadata.requires("torchvision") or []]
    (pair,) = [requirement for requirement in wanted if requirement.name == "torch"]
    (torchvision,) = re.findall(r"^torchvision==(\S+)", LOCK, re.MULTILINE)
    if metadata.version("torchvision").partition("+")[0] == torchvision:
        assert pair.specifier.contains(torch)
    assert pair.specifier.contains(metadata.version("torch").partition("+")[0])


def test_the_oldest_are_the_lower_ends() -> None:
    pins = [Requirement(text) for text in lowest()]
    assert [pin.name for pin in pins] == list(RANGES)
    for pin in pins:
        (version,) = (spec.version for spec in pin.specifier)
        assert SpecifierSet(RANGES[pin.name]).contains(version)


def test_a_tested_environment_is_not_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: RANGES[name].removeprefix(">=").partition(",")[0])
    assert describe_untested() is None


def test_another_release_is_named_with_what_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "webdataset":
            raise metadata.PackageNotFoundError(name)
        return {"transformers": "99.0.0"}.get(name, RANGES[name].removeprefix(">=").partition(",")[0])

    monkeypatch.setattr(metadata, "version", version)
    line = describe_untested()
    assert line is not None and "\n" not in line
    assert f"transformers 99.0.0 (tested: {RANGES['transformers']})" in line
    assert "webdataset absent" in line and "torch" not in line.replace("torchvision", "")
