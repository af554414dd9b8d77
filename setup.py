"""The package's metadata and dependencies; the tools' settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """`__version__` of pivot/__init__.py, read as text: importing pivot here would need torch."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "pivot/__init__.py").read_text("utf-8"), re.MULTILINE)
    if not found:
        raise ValueError('pivot/__init__.py: found no line __version__ = "..."')
    return found[1]


REMOTE = ["fsspec[http,s3,gs]", "huggingface_hub"]  # to train from shards that lie elsewhere
TEST = [
    "pytest>=8",
    "pytest-xdist",
    "pytest-timeout",
    "trl>=1.16",  # losses are compared to its own
    "datasets",  # opens every shard that is packed
    "fsspec[http]",
    "matplotlib",  # plots of the benchmarks
]
CHECK = ["ruff", "mypy"]

setup(
    name="pivot",
    version=read_version(),
    description="Post-train a whole multimodal LLM with preference optimisation, and get a better vision encoder out",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["pivot", "pivot.*", "data_tools", "data_tools.*"]),
    package_data={"pivot.report": ["page.html.j2", "page.css"]},
    install_requires=[
        "torch>=2.7",  # below 2.6 torch.load runs code even with weights_only=True (CVE-2025-32434)
        "torchvision",  # open_clip needs it; it only imports beside the torch of the same release
        "deepspeed>=0.19.5,<0.20",  # 0.19.5: non-reentrant activation checkpointing of frozen blocks
        "transformers>=5.8",  # one layout of SigLIP weights
        "omegaconf>=2.4",
        "jinja2",
        "open_clip_torch",
        "webdataset",
        "safetensors",
        "pillow",
        "simplejpeg",
        "numpy",
        "rich",
        "tensorboard",
        "ninja",  # DeepSpeed compiles its CPU collectives at the first start
        "fsspec",
        "pyarrow",  # Parquet, the form of most data sets on the hub
    ],
    extras_require={
        "flash": ["flash-attn"],  # no wheels: needs a CUDA toolkit that matches torch
        "remote": REMOTE,
        "test": TEST,
        "check": CHECK,
        "dev": TEST + CHECK,
    },
)
