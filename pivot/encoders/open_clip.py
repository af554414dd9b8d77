"""Image towers of open_clip, its own ViTs and timm's: `open_clip:MODEL[@TAG_OR_FILE]`.

MODEL may be open_clip's local-dir:FOLDER or hf-hub:ID. Without TAG_OR_FILE a plain MODEL has random weights.
`import open_clip` takes seconds, so each function that needs it does it: only those who use it wait for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from pivot import pretrained
from pivot.config import VisionTowerConfig
from pivot.encoders import timm
from pivot.encoders.facts import Encoder, EncoderFacts, ImageFit, ImageGeometry, as_triple, num_blocks_run
from pivot.encoders.square import RESAMPLES
from pivot.pretrained import Gather, read_json, require_equal_values

_FITS = {"squash": "squash", "shortest": "crop", "longest": "pad"}  # open_clip's resize_mode -> ours


def _split(path: str) -> tuple[str, str | None]:
    """(model, tag or file) of a path."""
    model, _, weights = path.partition(":")[2].partition("@")
    return model, weights or None


def _folder_or_hub_id(model: str) -> str:
    """What MODEL's local-dir:FOLDER or hf-hub:ID points to, "" for a name that open_clip knows."""
    return model.partition(":")[2]


# -- without weights -----------------------------------------------------------------------------------------------


def describe(section: VisionTowerConfig) -> EncoderFacts:
    assert section.path is not None
    model, _ = _split(section.path)
    vision = _read_model_config(model)["vision_cfg"]
    size = section.image_size or vision["image_size"]
    if "timm_model_name" in vision:
        if size != vision["image_size"]:
            raise ValueError(
                f"model.vision_tower.image_size: {size}, but open_clip cannot save its timm encoder '{model}' at "
                f"another size than {vision['image_size']}; use the variant of the model that was made for that size"
            )
        trunk = _build_trunk(vision["timm_model_name"])
        num_blocks = len(timm.list_blocks(trunk))
        run_to = num_blocks_run(section.layer, num_blocks)
        patch_size, has_cls, num_registers = timm.describe_tokens(trunk, run_to)
    elif isinstance(vision["layers"], int) and isinstance(vision.get("patch_size"), int):
        patch_size, has_cls, num_blocks, num_registers = vision["patch_size"], True, vision["layers"], 0
    else:
        raise ValueError(f"model.vision_tower.path: the image tower of open_clip's '{model}' is not a ViT")
    if not isinstance(size, int):
        raise ValueError(f"model.vision_tower.path: '{model}' takes images of {size} pixels; expected square ones")
    settings = _read_preprocessing(section.path)
    mean = as_triple(settings.get("mean") or OPENAI_CLIP_MEAN)
    std = as_triple(settings.get("std") or OPENAI_CLIP_STD)
    return EncoderFacts(size, patch_size, has_cls, num_blocks, mean, std, num_registers)


def _read_model_config(model: str) -> dict[str, Any]:
    import open_clip

    try:
        config = open_clip.get_model_config(model)
    except OSError as error:
        raise ValueError(f"model.vision_tower.path: no open_clip_config.json at '{model}': {error}") from error
    if config is None:
        raise ValueError(f"model.vision_tower.path: open_clip knows no model '{model}'; see open_clip.list_models()")
    return config


@cache
def _build_trunk(name: str) -> nn.Module:
    """A timm architecture, without memory."""
    return timm.build_shell(f"timm:{name}", None)


def _read_preprocessing(path: str) -> dict[str, Any]:
    """mean, std, interpolation and resize_mode, as far as the model's own folder or tag says them.

    For a file or random weights, what all tags of the model say alike.
    """
    import open_clip

    model, weights = _split(path)
    place = _folder_or_hub_id(model)
    if place:
        return read_json(place, "open_clip_config.json").get("preprocess_cfg", {})
    known = {tag: open_clip.get_pretrained_cfg(model, tag) for tag in open_clip.list_pretrained_tags_by_model(model)}
    chosen = [known[weights]] if weights in known else list(known.values())
    said = {key: {_frozen(one.get(key)) for one in chosen} for key in ("mean", "std", "interpolation", "resize_mode")}
    return {key: values.pop() for key, values in said.items() if len(values) == 1}


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def describe_network(path: str) -> Mapping[str, Any]:
    return {"model": _split(path)[0]}


def read_image_fit(encoder: Encoder) -> ImageFit | None:
    if draws_weights(encoder.path):  # they were trained on no way to fit
        return None
    settings = _read_preprocessing(encoder.path)
    resample = settings.get("interpolation")
    return ImageFit(
        _FITS[settings.get("resize_mode") or "shortest"],  # open_clip's own default
        resample if resample in RESAMPLES else "bicubic",
        f"the preprocessing of {encoder.path}",
    )


def build_shapes(encoder: Encoder) -> nn.Module:
    return _create(encoder.section, with_weights=False).visual


# -- with weights --------------------------------------------------------------------------------------------------


def draws_weights(path: str) -> bool:
    model, weights = _split(path)
    return weights is None and not _folder_or_hub_id(model)


def digest_weights(path: str) -> str:
    """The path itself, and the content of the folder or file that it names."""
    model, weights = _split(path)
    place = weights or _folder_or_hub_id(model)
    return f"{path} {pretrained.digest_weights(place)}" if place and Path(place).exists() else path


def load(encoder: Encoder, *, dtype: torch.dtype, gather: Gather) -> nn.Module:
    """Never partitioned (`gather` is not needed): open_clip's loader cannot fill partitioned parameters.

    Under ZeRO-3 each rank so first holds a full copy of the encoder; DeepSpeed partitions it when the engine is built.
    """
    return _create(encoder.section).visual.to(dtype=dtype)


def _create(section: VisionTowerConfig, *, with_weights: bool = True) -> Any:
    """The whole CLIP in float32, with its text tower. Without weights: its shapes alone, on the meta device."""
    import open_clip

    assert section.path is not None
    name, weights = _split(section.path)
    settings = {} if with_weights else {"load_weights": False, "device": "meta"}
    try:
        return open_clip.create_model(
            name,
            pretrained=weights,
            pretrained_text=False,
            force_image_size=section.image_size,
            require_pretrained=with_weights and not draws_weights(section.path),
            weights_only=True,
            **settings,
        )
    except (RuntimeError, OSError, KeyError) as error:
        raise ValueError(f"model.vision_tower.path: {section.path}: {error}") from error


# -- the module ----------------------------------------------------------------------------------------------------


def cut(model: Any, num_blocks: int, *, post_norm: bool) -> int:
    """Cut so that the tower's own forward, which ZeRO-3 hooks need, returns every token of the feature layer."""
    return (_cut_timm if hasattr(model, "trunk") else _cut_native)(model, num_blocks, post_norm)


def _cut_native(visual: Any, num_blocks: int, post_norm: bool) -> int:
    if post_norm and visual.attn_pool is not None:
        raise ValueError(
            "model.vision_tower.post_norm: true, but this encoder has no norm for patch features: its final norm comes "
            "after the pooling"
        )
    visual.transformer.resblocks = visual.transformer.resblocks[:num_blocks]
    if not post_norm:
        visual.ln_post = nn.Identity()
    visual.attn_pool = visual.proj = None
    visual.pool_type, visual.output_tokens = "none", False
    return int(visual.transformer.width)


def _cut_timm(visual: Any, num_blocks: int, post_norm: bool) -> int:
    visual.head = nn.Identity()
    return timm.cut(visual.trunk, num_blocks, post_norm=post_norm)


def run(model: Any, pixels: Tensor) -> Tensor:
    return timm.as_tokens(model(pixels))  # its pooling and projection are gone: every token comes out


def list_blocks(model: Any) -> nn.ModuleList | nn.Sequential:
    return timm.list_blocks(model.trunk) if hasattr(model, "trunk") else model.transformer.resblocks


def recompute_blocks(model: Any) -> None:
    model.set_grad_checkpointing(True)  # open_clip and timm pass use_reentrant=False


# -- back to disk --------------------------------------------------------------------------------------------------


def write(folder: Path, encoder: Encoder, model: Any, values: Mapping[str, Tensor], geometry: ImageGeometry) -> None:
    """A folder for `open_clip.create_model_and_transforms("local-dir:FOLDER")`, its text tower as it was.

    `model` is not needed: the whole CLIP is read again from where it came, and given the values.
    """
    clip = _create(encoder.section)
    clip.visual.load_state_dict(dict(values), strict=True)
    config = _read_model_config(_split(encoder.path)[0])
    config["vision_cfg"]["image_size"] = geometry.size
    preprocess = {
        "size": geometry.size,
        "mean": geometry.mean,
        "std": geometry.std,
        "interpolation": geometry.resample,
        "resize_mode": {fit: mode for mode, fit in _FITS.items()}[geometry.fit],
        "fill_color": round(255 * sum(geometry.mean) / 3),
    }
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    written = _create(replace(encoder.section, path=name_folder(str(folder)), image_size=None))
    require_equal_values(dict(written.visual.named_parameters()), values, folder)


def name_folder(folder: str) -> str:
    return f"open_clip:local-dir:{folder}"


def run_stock(encoder: Encoder, pixels: Tensor) -> Tensor:
    visual, post_norm = _create(encoder.section).visual.eval(), encoder.section.post_norm
    if hasattr(visual, "trunk"):
        return timm.run_intermediates(visual.trunk, encoder.num_blocks, pixels, post_norm=post_norm)
    out = visual.forward_intermediates(
        pixels,
        indices=[encoder.num_blocks - 1],
        normalize_intermediates=post_norm,
        output_fmt="NLC",
        output_extra_tokens=True,
    )
    return torch.cat([*out["image_intermediates_prefix"], *out["image_intermediates"]], dim=1)
