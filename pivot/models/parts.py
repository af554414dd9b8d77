"""A trained model in a folder: HF LLaVA where that can express it, else its parts side by side, each in its own form.

    parts.json               says that this is such a folder, what the projector is, and the encoder's library
    vision_tower/            as that library writes it, what was set aside back in its place
    projector.safetensors
    language_model/          an HF *ForCausalLM with the tokenizer
    processor_config.json    and the tokenizer: the HF LlavaProcessor that prepares what the parts take

Both are what `init_from` takes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pivot.config import ModelConfig, VisionTowerConfig
from pivot.encoders.export import write_encoder
from pivot.encoders.library import LIBRARIES
from pivot.models.language import write_language_model
from pivot.models.llava import to_llava_config, write_llava
from pivot.models.mllm import MLLM
from pivot.models.projector import Projector
from pivot.processor import Processor
from pivot.system.files import filling, read_object

PARTS, PROJECTOR = "parts.json", "projector.safetensors"
KNOWN_BY = ("config.json", PARTS)  # a folder without them is no model


def write_model(folder: Path, model: MLLM, state_dict: Mapping[str, Tensor], processor: Processor) -> None:
    """Write the MLLM whose whole state dict (our names) is `state_dict`; what is written is read back and compared.

    The files of KNOWN_BY come when all the rest is there and right.
    """
    with filling(folder, last=KNOWN_BY) as part:
        try:
            to_llava_config(model.vision_tower, model.projector, model.language_model, processor)
        except ValueError as reason:
            write_parts(part, model, state_dict, processor, reason=str(reason))
        else:
            write_llava(part, model, state_dict, processor)


def write_parts(
    folder: Path, model: MLLM, state_dict: Mapping[str, Tensor], processor: Processor, *, reason: str
) -> None:
    """Write the three parts; `parts.json` comes last and says why this is not an HF LLaVA."""
    folder.mkdir(parents=True, exist_ok=True)
    write_encoder(folder / "vision_tower", model.vision_tower, state_dict, processor.geometry)
    projector = {
        n.removeprefix("projector."): v.contiguous() for n, v in state_dict.items() if n.startswith("projector.")
    }
    save_file(projector, folder / PROJECTOR)
    write_language_model(folder / "language_model", model.language_model, state_dict, processor)
    processor.save_pretrained(folder)
    section = model.vision_tower.section
    facts = {"projector": model.projector.kind, "layer": section.layer, "post_norm": section.post_norm}
    facts |= {"cls": section.cls, "registers": section.registers}
    facts |= {"library": model.vision_tower.encoder.library, "not_llava_because": reason}
    (folder / PARTS).write_text(json.dumps(facts, indent=1) + "\n")


def is_parts(path: str) -> bool:
    return (Path(path) / PARTS).is_file()


def is_model(folder: Path) -> bool:
    """Whether `folder` holds what `write_model` writes, with every file of weights."""
    if not is_parts(str(folder)):
        return _holds_weights(folder)
    parts = (folder / "vision_tower", folder / "language_model")
    return (folder / PROJECTOR).is_file() and all(map(_holds_weights, parts))


def _holds_weights(folder: Path) -> bool:
    """A configuration, and the files that an index of weights names, or else any."""
    names: set[str] = set()
    for index in folder.glob("*.safetensors.index.json"):
        names |= set(map(str, read_object(index).get("weight_map", {}).values()))
    weights = all((folder / name).is_file() for name in names) if names else any(folder.glob("*.safetensors"))
    return any(folder.glob("*config.json")) and weights


def part_paths(path: str) -> dict[str, str]:
    """Where a folder of parts holds the encoder and the language model, as `model.*.path` names them."""
    library = _read(path)["library"]
    if library not in LIBRARIES:
        raise ValueError(f"{path}: its encoder is of {library}; this release has {', '.join(LIBRARIES)}")
    tower = LIBRARIES[library].name_folder(f"{path}/vision_tower")
    return {"vision_tower": tower, "language_model": f"{path}/language_model"}


def recorded_model(path: str) -> ModelConfig:
    """The features and the projector that a folder of parts was made with, as a run's settings say them."""
    facts = _read(path)
    registers = facts.get("registers", "drop")  # absent from folders of earlier releases, which knew none
    tower = VisionTowerConfig(layer=facts["layer"], post_norm=facts["post_norm"], cls=facts["cls"], registers=registers)
    return ModelConfig(vision_tower=tower, projector=facts["projector"])


def recorded_dtype(path: str) -> torch.dtype:
    """The precision that a folder of parts was written in."""
    return next(iter(load_file(Path(path) / PROJECTOR).values())).dtype


def load_projector(path: str, projector: Projector, dtype: torch.dtype) -> Projector:
    """Fill `projector` from a folder of parts, strictly."""
    values = {name: value.to(dtype) for name, value in load_file(Path(path) / PROJECTOR).items()}
    projector.load_state_dict(values, strict=True)
    return projector


def _read(path: str) -> dict[str, Any]:
    facts = json.loads((Path(path) / PARTS).read_text())
    if "library" not in facts:  # written when there were two
        facts["library"] = "open_clip" if facts["open_clip"] else "transformers"
    return facts


def digest_encoder(folder: Path) -> str:
    """sha256 over the encoder's tensors in an export: names, types, shapes and bytes, wherever their files begin."""
    alone = folder / "vision_tower" if is_parts(str(folder)) else folder
    digest = hashlib.sha256()
    values: dict[str, Tensor] = {}
    for file in sorted(alone.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names = [name for name in list(tensors.keys()) if _is_encoders(name, in_llava=alone == folder)]
            values |= {name: tensors.get_tensor(name) for name in names}
    if not values:
        raise ValueError(f"{folder} holds no encoder's weights; expected an export of pivot")
    for name, value in sorted(values.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _is_encoders(name: str, *, in_llava: bool) -> bool:
    return not in_llava or name.removeprefix("model.").startswith("vision_tower.")
