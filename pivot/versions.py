"""The releases of other packages that pivot runs on: the ends of each range are what its tests have run with.

setup.py reads `RANGES` from here. The lowest releases are tested by `make test-oldest`, the highest by
`make test-newest`; requirements.lock holds one exact set between them. A package has an upper end where pivot relies
on more than its documented interface (see docs/notes.md), or where a next major release is likely to rename things.
"""

from __future__ import annotations

import sys
from importlib import metadata

RANGES = {
    "torch": ">=2.11,<2.16",
    "torchvision": ">=0.26",  # open_clip needs it; pip picks the release that belongs to torch's
    "deepspeed": ">=0.19.8,<0.20",  # before, ZeRO-3 trains other weights beside torch 2.11 (docs/notes.md)
    "transformers": ">=5.17,<5.25",
    "omegaconf": ">=2.4,<3",
    "jinja2": ">=3.1",
    "open_clip_torch": ">=3.3,<4",
    "timm": ">=1.0.31,<1.1",  # open_clip needs it too
    "webdataset": ">=1.0.2,<2",
    "safetensors": ">=0.8",
    "pillow": ">=12.0",
    "simplejpeg": ">=1.9",
    "numpy": ">=2.3",
    "rich": ">=14.0",
    "scipy": ">=1.16",  # Student's t, for tables over several runs
    "tensorboard": ">=2.20",
    "ninja": ">=1.13",  # DeepSpeed compiles its CPU collectives at the first start
    "fsspec": ">=2025.9",
    "packaging": ">=25.0",
    "pyarrow": ">=22.0",  # Parquet, the form of most data sets on the hub
}


def installed(name: str) -> str:
    """The installed release of a package, or "absent"."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def describe_untested() -> str | None:
    """One line that names the packages whose installed release is outside of `RANGES`; None where all are inside."""
    from packaging.specifiers import SpecifierSet  # here, so that this file runs before anything is installed

    untested = []
    for name, allowed in RANGES.items():
        release = installed(name)
        if release == "absent" or not SpecifierSet(allowed).contains(release, prereleases=True):
            untested.append(f"{name} {release} (tested: {allowed})")
    return f"untested   {', '.join(untested)}; `make venv` installs tested releases" if untested else None


def lowest() -> list[str]:
    """A requirement `name==release` for the lower end of each range."""
    return [f"{name}=={allowed.removeprefix('>=').partition(',')[0]}" for name, allowed in RANGES.items()]


if __name__ == "__main__":  # for the Makefile
    if sys.argv[1:] == ["lowest"]:
        print("\n".join(lowest()))
    else:
        shown = ("torch", "torchvision", "transformers", "deepspeed")
        print(", ".join(f"{name} {installed(name)}" for name in shown))
