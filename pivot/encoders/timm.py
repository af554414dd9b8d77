"""timm's encoders with patch features: `timm:MODEL[@FILE]`.

MODEL is an architecture (random weights), ARCHITECTURE.TAG (timm's weights of that name, from the hub or its cache),
local-dir:FOLDER (a folder as timm saves it) or hf-hub:ID. @FILE holds an architecture's weights, by timm's names or by
those that timm converts. `import timm` takes seconds, so each function that needs it does it.

The functions on a module serve open_clip's towers too, whose trunks are timm's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pivot import pretrained
from pivot.config import VisionTowerConfig
from pivot.encoders.facts import Encoder, EncoderFacts, ImageFit, ImageGeometry, as_triple, num_blocks_run
from pivot.encoders.square import RESAMPLES
from pivot.pretrained import Gather, require_equal_values

# our fit -> timm's crop_mode. timm pads behind the resize and we before it: where image and border meet, pixels differ.
_CROP_MODES = {"squash": "squash", "crop": "center", "pad": "border"}
_MOCO = "base_encoder."  # before the names in a file of MoCo-v3's own


def _split(path: str) -> tuple[str, str | None]:
    """(model, file) of a path. A hub id may hold an @ for its revision, which is no file."""
    model = path.partition(":")[2]
    if ":" in model:
        return model, None
    model, _, file = model.partition("@")
    return model, file or None


def _folder(path: str) -> Path | None:
    source, _, place = _split(path)[0].partition(":")
    return Path(place) if source == "local-dir" else None


# -- without weights -----------------------------------------------------------------------------------------------


def describe(section: VisionTowerConfig) -> EncoderFacts:
    import timm

    assert section.path is not None
    _require_files(section.path)
    model: Any = build_shell(section.path, None)
    num_blocks = len(list_blocks(model))
    run_to = num_blocks_run(section.layer, num_blocks)
    data = timm.data.resolve_model_data_config(model)
    patch_size, has_cls, num_registers = describe_tokens(model, run_to)
    own = getattr(model, "patch_embed", None)
    height, width = own.img_size if own is not None and own.img_size else data["input_size"][1:]
    if height != width:
        raise ValueError(f"model.vision_tower.path: {section.path} takes {height} x {width} pixels; expected a square")
    size = section.image_size or int(width)
    if own is None and size % patch_size:
        raise ValueError(
            f"model.vision_tower.image_size: {size}, but a feature of {section.path} stands for {patch_size} pixels a "
            f"side; take a multiple of {patch_size}"
        )
    mean, std = as_triple(data["mean"]), as_triple(data["std"])
    return EncoderFacts(size, patch_size, has_cls, num_blocks, mean, std, num_registers)


def _require_files(path: str) -> None:
    file, folder = _split(path)[1], _folder(path)
    where = f"model.vision_tower.path: {path}"
    if file is not None and not Path(file).is_file():
        raise ValueError(f"{where}: no file {file}; expected weights, for example model.safetensors")
    if folder is not None and not (folder / "config.json").is_file():
        raise ValueError(f"{where}: no config.json in {folder}; expected a folder as timm.models.save_for_hf writes it")
    if folder is not None:
        pretrained.require_weights(folder, where)
    if file is not None:
        pretrained.require_whole(Path(file), where)


def describe_tokens(model: Any, num_blocks: int) -> tuple[int, bool, int]:
    """(pixels a side that a feature behind block `num_blocks` stands for, whether there is a CLS token, registers)."""
    has_cls = getattr(model, "cls_token", None) is not None
    num_registers = getattr(model, "num_prefix_tokens", 0) - int(has_cls)
    return int(model.feature_info[num_blocks - 1]["reduction"]), has_cls, num_registers


def build_shell(path: str, image_size: int | None, **settings: Any) -> nn.Module:
    """The whole model without memory."""
    with torch.device("meta"):
        return _create(path, image_size, pretrained=False, **settings)


def _create(path: str, image_size: int | None, **settings: Any) -> nn.Module:
    """What timm makes of MODEL; ValueError, with timm's own words, where it makes nothing, or no patch features."""
    import timm

    name = _split(path)[0]
    if image_size is not None and not _is_convolutional(path):
        settings["img_size"] = image_size  # with weights, timm resamples their positions for it
    try:
        model = timm.create_model(name, **settings)
    except Exception as error:  # whatever an architecture of any kind may raise
        raise ValueError(f"model.vision_tower.path: {path}: {_one_sentence(error)}") from error
    require_patch_features(model, path)
    return model


def _is_convolutional(path: str) -> bool:
    with torch.device("meta"):
        return not hasattr(_create(path, None, pretrained=False), "patch_embed")


def require_patch_features(model: nn.Module, path: str) -> None:
    """ValueError unless the model is of a class whose features are known to be one a patch."""
    from timm.models import ConvNeXt, Eva, VisionTransformer

    if type(model) not in (VisionTransformer, Eva, ConvNeXt):  # a subclass may run otherwise, as DeiT's distilled one
        raise ValueError(
            f"model.vision_tower.path: {path} is a {type(model).__name__}, of whose features pivot does not know which "
            "patch each stands for; expected a VisionTransformer, Eva or ConvNeXt of timm"
        )


def _one_sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:400]} ..."


def describe_network(path: str) -> Mapping[str, Any]:
    model: Any = build_shell(path, None)
    architecture = model.pretrained_cfg.get("architecture")
    return {"architecture": architecture, "width": model.num_features, "blocks": len(list_blocks(model))}


def read_image_fit(encoder: Encoder) -> ImageFit | None:
    """As its settings say it. (By pixels it could not be told: of small images of noise Pillow's bicubic resize, which
    timm takes, is up to 5 levels from torch's.)"""
    import timm

    if draws_weights(encoder.path):  # they were trained on no way to fit
        return None
    data = timm.data.resolve_model_data_config(build_shell(encoder.path, None))
    mode, share, resample = data["crop_mode"], data["crop_pct"], data["interpolation"]
    fits = [fit for fit, name in _CROP_MODES.items() if name == mode]
    if not fits or share != 1.0 or resample not in RESAMPLES:
        raise ValueError(
            f"timm would prepare its images by crop_mode {mode} at crop_pct {share:g} (other than 1 it cuts a border "
            f"off), {resample}"
        )
    return ImageFit(fits[0], resample, f"the settings of {encoder.path}")


def build_shapes(encoder: Encoder) -> nn.Module:
    settings = {"num_classes": _count_classes(encoder.path)} if _split(encoder.path)[1] else {}
    return _create(encoder.path, encoder.section.image_size, pretrained=False, **settings)


# -- with weights --------------------------------------------------------------------------------------------------


def draws_weights(path: str) -> bool:
    model, file = _split(path)
    return file is None and ":" not in model and "." not in model


def digest_weights(path: str) -> str:
    """The path itself, and the content of the folder or file that it names."""
    place = _split(path)[1] or _folder(path)
    return f"{path} {pretrained.digest_weights(str(place))}" if place and Path(place).exists() else path


def load(encoder: Encoder, *, dtype: torch.dtype, gather: Gather) -> nn.Module:
    """Never partitioned (`gather` is not needed): timm's loader cannot fill partitioned parameters.

    Under ZeRO-3 each rank so first holds a full copy of the encoder; DeepSpeed partitions it when the engine is built.
    """
    return _load(encoder.path, encoder.section.image_size).to(dtype=dtype)


def _load(path: str, image_size: int | None) -> nn.Module:
    """The whole model in float32, read strictly by timm's loader."""
    if draws_weights(path):
        return _create(path, image_size, pretrained=False)
    if _split(path)[1] is None:
        return _create(path, image_size, pretrained=True)
    state, num_classes = _read_file(path), _count_classes(path)
    source = {"state_dict": state, "num_classes": num_classes, "source": "", "custom_load": False, "label_offset": 0}
    model: Any = _create(path, image_size, pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=source)
    model.pretrained_cfg.pop("state_dict", None)  # a second copy of the weights
    return model


def _read_file(path: str) -> dict[str, Tensor]:
    from timm.models import load_state_dict

    file = _split(path)[1]
    assert file is not None
    try:
        state = load_state_dict(file, weights_only=True)
    except Exception as error:  # whatever a damaged or foreign file may raise
        raise ValueError(f"model.vision_tower.path: {file} cannot be read: {_one_sentence(error)}") from error
    if any(
        name.startswith(_MOCO) for name in state
    ):  # MoCo-v3's file: two encoders, with heads that pre-training needs
        inside = {name.removeprefix(_MOCO): value for name, value in state.items() if name.startswith(_MOCO)}
        return {name: value for name, value in inside.items() if not name.startswith("head.")}
    return state


def _count_classes(path: str) -> int:
    """Of the classifier in a file of weights; 0 where it holds none."""
    shell: Any = build_shell(path, None)
    weight = _read_file(path).get(f"{shell.pretrained_cfg.get('classifier')}.weight")
    return 0 if weight is None else int(weight.shape[0])


# -- the module ----------------------------------------------------------------------------------------------------


def cut(model: Any, num_blocks: int, *, post_norm: bool) -> int:
    norm = model.norm if hasattr(model, "norm") else model.norm_pre
    last = num_blocks == len(list_blocks(model))
    if post_norm and (isinstance(norm, nn.Identity) or not (last or hasattr(model, "norm"))):
        raise ValueError(
            "model.vision_tower.post_norm: true, but this encoder has no norm for patch features of this layer: its "
            "final norm comes after the pooling, or is made for the last stage"
        )
    model.prune_intermediate_layers([num_blocks - 1], prune_norm=not post_norm, prune_head=True)
    _switch_off_chance(model)
    return int(model.feature_info[num_blocks - 1]["num_chs"])


def _switch_off_chance(model: Any) -> None:
    """Take out what would give other features in training: dropped patches, moved coordinates."""
    if hasattr(model, "patch_drop"):
        model.patch_drop = None if model.patch_drop is None else _NoDrop() if hasattr(model, "rope") else nn.Identity()
    for module in model.modules():
        if hasattr(module, "aug_active"):  # of a rotary embedding
            module.aug_active = False


class _NoDrop(nn.Module):
    """timm's PatchDropoutWithIndices that drops nothing."""

    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        return tokens, None


def run(model: Any, pixels: Tensor) -> Tensor:
    return as_tokens(model(pixels))  # its pooling and classifier are gone: every token comes out


def as_tokens(features: Tensor) -> Tensor:
    """[I, tokens, width] of these, or of a feature map [I, width, rows, columns], row by row."""
    return features.flatten(2).transpose(1, 2) if features.ndim == 4 else features


def list_blocks(model: Any) -> nn.ModuleList | nn.Sequential:
    return model.blocks if hasattr(model, "blocks") else model.stages


def recompute_blocks(model: Any) -> None:
    model.set_grad_checkpointing(True)  # not reentrant


# -- back to disk --------------------------------------------------------------------------------------------------


def write(folder: Path, encoder: Encoder, model: Any, values: Mapping[str, Tensor], geometry: ImageGeometry) -> None:
    """A folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    `model` is not needed: the whole encoder is read again from where it came, and given the values.
    """
    from timm.models import save_for_hf

    whole = _load(encoder.path, encoder.section.image_size).to(next(iter(values.values())).dtype)
    whole.load_state_dict(dict(values), strict=True)
    data = {
        "input_size": (3, geometry.size, geometry.size),
        "mean": geometry.mean,
        "std": geometry.std,
        "interpolation": geometry.resample,
        "crop_pct": 1.0,
        "crop_mode": _CROP_MODES[geometry.fit],
    }
    save_for_hf(whole, str(folder), data_config=data, safe_serialization=True)
    written = _load(name_folder(str(folder)), None)
    require_equal_values(dict(written.named_parameters()), values, folder)


def name_folder(folder: str) -> str:
    return f"timm:local-dir:{folder}"


def run_stock(encoder: Encoder, pixels: Tensor) -> Tensor:
    model = _load(encoder.path, encoder.section.image_size).eval()
    return run_intermediates(model, encoder.num_blocks, pixels, post_norm=encoder.section.post_norm)


def run_intermediates(model: Any, num_blocks: int, pixels: Tensor, *, post_norm: bool) -> Tensor:
    """[I, tokens, width] behind a block of a whole model, by timm's `forward_intermediates`."""
    has_prefix = getattr(model, "num_prefix_tokens", 0) > 0
    settings: dict[str, Any] = {"return_prefix_tokens": True} if has_prefix else {}
    settings["output_fmt"] = "NLC" if hasattr(model, "patch_embed") else "NCHW"
    found = model.forward_intermediates(
        pixels, indices=[num_blocks - 1], norm=post_norm, intermediates_only=True, **settings
    )[0]
    return torch.cat([found[1], found[0]], dim=1) if has_prefix else as_tokens(found)
