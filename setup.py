"""The package's metadata and dependencies; the tools' settings are in pyproject.toml."""

import re
import runpy
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
RANGES = runpy.run_path(str(ROOT / "pivot/versions.py"))["RANGES"]


def read_version() -> str:
    """`__version__` of pivot/__init__.py, read as text: importing pivot here would need torch."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "pivot/__init__.py").read_text("utf-8"), re.MULTILINE)
    if not found:
        raise ValueError('pivot/__init__.py: found no line __version__ = "..."')
    return found[1]


REMOTE = ["fsspec[http,s3,gs]", "huggingface_hub"]  # to train from shards that lie elsewhere
ASSETS = ["gguf>=0.17", "onnx>=1.19"]  # launch/assets.py reads weights of these forms
TEST = [
    "pytest>=9",
    "pytest-xdist>=3.8",
    "pytest-timeout>=2.4",
    "trl>=1.16",  # losses are compared to its own
    "datasets>=4.4",  # opens every shard that is packed
    "fsspec[http]",
    "matplotlib>=3.10",  # plots of the benchmarks
]
CHECK = ["ruff", "mypy", "uv"]  # uv writes requirements.lock

setup(
    name="pivot",
    version=read_version(),
    description="Post-train a whole multimodal LLM with preference optimisation, and get a better vision encoder out",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["pivot", "pivot.*", "data_tools", "data_tools.*"]),
    package_data={"pivot.report": ["page.html.j2", "page.css"]},
    install_requires=[f"{name}{allowed}" for name, allowed in RANGES.items()],
    extras_require={
        "flash": ["flash-attn"],  # no wheels: needs a CUDA toolkit that matches torch
        "remote": REMOTE,
        "assets": ASSETS,
        "plots": ["matplotlib>=3.10"],  # of sweeps
        "wandb": ["wandb>=0.31"],  # log.wandb; the release that it was tried with
        "test": TEST,
        "check": CHECK,
        "dev": TEST + CHECK,
    },
)
