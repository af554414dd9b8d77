"""To and from HF LLaVA folders, and the encoder alone as an HF folder: strictly in, checked after writing.

Our names are `vision_tower.*`, `projector.*`, `language_model.*`. Each writer takes a consolidated state dict (so a
ZeRO-3 run or a checkpoint can be exported alike), writes with `save_pretrained(state_dict=...)`, which knows the names
on disk, then loads the folder again with stock code and compares every tensor bit for bit. Call them on one rank.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from pivot.config import COMPONENTS, ModelConfig, VisionTowerConfig
from pivot.geometry import OPEN_CLIP, ImageGeometry, describe_vision_tower, read_vision_config, split_open_clip
from pivot.models.language import check_text_config
from pivot.models.projector import Projector
from pivot.models.vision import (
    MODEL_CLASSES,
    VisionTower,
    build_vision_tower,
    load_open_clip,
    wrap_encoder,
)
from pivot.pretrained import Gather, load_strictly, read_config
from pivot.processor import Processor

# our prefix -> the prefix in a LlavaForConditionalGeneration; the first that matches counts
_LLAVA_PREFIXES = (
    ("vision_tower.model.", "model.vision_tower."),
    ("projector.", "model.multi_modal_projector."),
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
)
_TOWER = "vision_tower.model."


@dataclass
class LlavaParts:
    """What an HF LLaVA folder holds."""

    vision_tower: VisionTower
    projector: Projector
    language_model: PreTrainedModel
    config: LlavaConfig


def is_llava(path: str) -> bool:
    return read_config(path, "init_from").model_type == "llava"


def load_llava(
    path: str,
    model: ModelConfig,
    *,
    dtype: torch.dtype,
    gather: Gather = nullcontext,
    parts: Collection[str] = COMPONENTS,
) -> LlavaParts:
    """The parts of an HF LlavaForConditionalGeneration folder; ValueError where it and `model` disagree.

    `parts` names those that will be used. Another feature layer, for example, suits a new projector, so it is refused
    only where the folder's projector is to be used.
    Under a live HfDeepSpeedConfig (ZeRO-3) the weights come partitioned; `gather` must then be given.
    """
    config = read_config(path, "init_from")
    if not isinstance(config, LlavaConfig):
        raise ValueError(
            f"init_from: '{path}' is a {config.model_type}; expected a LlavaForConditionalGeneration folder"
        )
    section = replace(model.vision_tower, path=path)
    facts = describe_vision_tower(section)
    if "projector" in parts:
        require_same_features(path, model)
    if "language_model" in parts:
        text_config: Any = config.text_config
        check_text_config(text_config, path)
    whole = load_strictly(LlavaForConditionalGeneration, path, f"init_from: {path}", config=config, dtype=dtype)
    return LlavaParts(
        vision_tower=wrap_encoder(whole.model.vision_tower, section, facts, gather=gather),
        projector=_take_projector(whole.model.multi_modal_projector, config),
        language_model=_take_language_model(whole),
        config=whole.config,
    )


def require_same_features(path: str, model: ModelConfig) -> None:
    """ValueError where the projector of the HF LLaVA at `path` was made for other features than `model` asks for."""
    config: Any = read_config(path, "init_from")
    section = model.vision_tower
    has_cls = describe_vision_tower(replace(section, path=path)).has_cls
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(
            f"init_from: '{path}' has vision_feature_layer={list(config.vision_feature_layer)}, features of several "
            "layers side by side; expected one layer, as a number (or take init_parts without the projector)"
        )
    cls = "drop" if config.vision_feature_select_strategy == "default" else "keep"
    if not has_cls and cls == "drop":
        raise ValueError(
            f"init_from: '{path}' says vision_feature_select_strategy=default, which drops the first token of an "
            "encoder that has no CLS token; expected full"
        )
    for key, found, wanted in (
        ("model.vision_tower.layer", config.vision_feature_layer, section.layer),
        ("model.vision_tower.cls", cls if has_cls else section.cls, section.cls),
        ("model.vision_tower.post_norm", False, section.post_norm),
        ("model.projector", "mlp2x_gelu", model.projector),
    ):
        if found != wanted:
            raise ValueError(f"{key}: {wanted}, but '{path}' was made with {found}; set {key}={found}")
    if config.projector_hidden_act != "gelu" or not config.multimodal_projector_bias:
        raise ValueError(
            f"init_from: '{path}' has a projector with {config.projector_hidden_act} and "
            f"bias={config.multimodal_projector_bias}; expected gelu and a bias"
        )


def _take_projector(source: Any, config: Any) -> Projector:
    with torch.device("meta"):
        projector = Projector("mlp2x_gelu", config.vision_config.hidden_size, config.text_config.hidden_size)
    projector.linear_1, projector.linear_2 = source.linear_1, source.linear_2
    return projector


def _take_language_model(whole: Any) -> PreTrainedModel:
    """The *ForCausalLM that the LLaVA was made of: an empty one, given the loaded decoder and head (still tied)."""
    text_config = whole.config.text_config
    text_config.tie_word_embeddings = whole.config.tie_word_embeddings
    causal_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(text_config)]
    with torch.device("meta"):
        language_model: Any = causal_class(text_config)
    language_model.model, language_model.lm_head = whole.model.language_model, whole.lm_head
    language_model.generation_config = whole.generation_config
    return language_model


def to_llava_config(
    vision_tower: VisionTower, projector: Projector, language_model: PreTrainedModel, processor: Processor
) -> LlavaConfig:
    """The configuration of the HF LLaVA that computes what these parts compute; ValueError where there is none."""
    section = vision_tower.section
    reasons = {
        "model.vision_tower.path is an open_clip encoder": vision_tower.is_open_clip,
        "model.vision_tower.post_norm is true": section.post_norm,
        f"model.projector is {projector.kind}": projector.kind != "mlp2x_gelu",
    }
    for reason, present in reasons.items():
        if present:
            raise ValueError(f"{reason}, which HF LLaVA cannot express; export the encoder alone")
    text_config: Any = copy.deepcopy(language_model.config)
    keeps_all = section.cls == "keep" or not vision_tower.facts.has_cls
    return LlavaConfig(
        vision_config=copy.deepcopy(vision_tower.model.config),
        text_config=text_config,
        image_token_index=processor.image_token_id,
        image_seq_length=processor.geometry.num_tokens,
        vision_feature_layer=section.layer,
        vision_feature_select_strategy="full" if keeps_all else "default",
        tie_word_embeddings=text_config.tie_word_embeddings,
    )


def to_llava_state_dict(
    state_dict: Mapping[str, Tensor], set_aside: Mapping[str, Tensor], *, tied: bool
) -> dict[str, Tensor]:
    """Our names -> those of a LlavaForConditionalGeneration, with what was set aside back in its place.

    With tied embeddings the head is the embedding and has no entry of its own.
    """
    ours = dict(state_dict) | {_TOWER + name: value for name, value in set_aside.items()}
    if tied and (head := ours.pop("language_model.lm_head.weight", None)) is not None:
        embedding = ours["language_model.model.embed_tokens.weight"]
        if not torch.equal(head, embedding):
            raise RuntimeError("the language model's head and embeddings are tied, but their values differ")
    return {_rename(name, _LLAVA_PREFIXES): value for name, value in ours.items()}


def from_llava_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of a LlavaForConditionalGeneration (in memory) -> ours; blocks behind the feature layer included."""
    back = tuple((theirs, ours) for ours, theirs in _LLAVA_PREFIXES)
    return {_rename(name, back): value for name, value in state_dict.items()}


def _rename(name: str, prefixes: tuple[tuple[str, str], ...]) -> str:
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise RuntimeError(f"parameter '{name}' belongs to none of {', '.join(old for old, _ in prefixes)}")


def write_llava(folder: str | Path, model: Any, state_dict: Mapping[str, Tensor], processor: Processor) -> None:
    """Write an HF LLaVA folder with its processor, and prove that stock transformers reads back what was written.

    `model` (an MLLM or LlavaParts) says what the parts are, `state_dict` (our names, consolidated) holds the values.
    """
    config = to_llava_config(model.vision_tower, model.projector, model.language_model, processor)
    values = to_llava_state_dict(state_dict, model.vision_tower.set_aside, tied=config.tie_word_embeddings)
    shell = _build_shell(LlavaForConditionalGeneration, config, values)
    shell.generation_config = _to_generation_config(model.language_model.generation_config, processor)
    _save_and_compare(folder, shell, values)
    processor.save_pretrained(folder)


def write_vision_tower(
    folder: str | Path, vision_tower: VisionTower, state_dict: Mapping[str, Tensor], processor: Processor
) -> None:
    """Write the whole encoder alone, trained parameters and those set aside, in the form of its own library.

    `state_dict` is the MLLM's (our names, consolidated). transformers: a folder with its image processor. open_clip:
    a folder for `open_clip.create_model_and_transforms("local-dir:FOLDER")`, its text tower as it was. Either is read
    back by stock code, compared bit for bit, and its features for one image are compared to those of our tower.
    """
    values = {name.removeprefix(_TOWER): value for name, value in state_dict.items() if name.startswith(_TOWER)}
    values = {name: value.detach().cpu().contiguous() for name, value in (values | vision_tower.set_aside).items()}
    if vision_tower.is_open_clip:
        path = _write_open_clip(Path(folder), vision_tower, values, processor.geometry)
    else:
        config = copy.deepcopy(vision_tower.model.config)
        _save_and_compare(folder, _build_shell(MODEL_CLASSES[config.model_type], config, values), values)
        processor.image_processor().save_pretrained(folder)
        path = str(folder)
    _compare_features(vision_tower, path, values)


def save_language_model(
    folder: str | Path, language_model: Any, state_dict: Mapping[str, Tensor], processor: Processor
) -> None:
    """Write the language model alone as an HF *ForCausalLM folder with its tokenizer; read back and compared."""
    prefix, config = "language_model.", copy.deepcopy(language_model.config)
    values = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    if config.tie_word_embeddings:
        values.pop("lm_head.weight", None)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    shell = _build_shell(model_class, config, values)
    shell.generation_config = _to_generation_config(language_model.generation_config, processor)
    _save_and_compare(folder, shell, values)
    processor.tokenizer.save_pretrained(folder)


def _write_open_clip(
    folder: Path, vision_tower: VisionTower, values: Mapping[str, Tensor], geometry: ImageGeometry
) -> str:
    """An open_clip folder: the image tower's values, and the text tower that the encoder came with."""
    import open_clip

    section, facts = vision_tower.section, vision_tower.facts
    assert section.path is not None
    name, _ = split_open_clip(section.path)
    clip = load_open_clip(section)
    clip.visual.load_state_dict(dict(values), strict=True)
    config = open_clip.get_model_config(name)
    config["vision_cfg"]["image_size"] = facts.size
    preprocess = {
        "size": facts.size,
        "mean": facts.mean,
        "std": facts.std,
        "interpolation": geometry.resample,
        "resize_mode": {"squash": "squash", "crop": "shortest", "pad": "longest"}[geometry.fit],
        "fill_color": round(255 * sum(facts.mean) / 3),
    }
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    path = f"{OPEN_CLIP}local-dir:{folder}"
    written = replace(section, path=path, image_size=None)
    _compare(dict(load_open_clip(written).visual.named_parameters()), values, folder)
    return path


def _build_shell(model_class: type[PreTrainedModel], config: Any, values: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model without memory that `values` fit: each parameter has one of its shape, and no other is given."""
    dtypes = {value.dtype for value in values.values()}
    if len(dtypes) != 1:
        raise RuntimeError(f"expected all parameters of one dtype, found {sorted(map(str, dtypes))}; cast them first")
    config.dtype = dtypes.pop()
    config._attn_implementation = "sdpa"  # ours (the prefix tree) means nothing to others
    with torch.device("meta"):
        shell = model_class(config)
    expected = {name: parameter.shape for name, parameter in shell.named_parameters()}  # a tied head has no entry
    found = {name: value.shape for name, value in values.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise RuntimeError(
            f"{len(wrong)} parameters do not fit a {model_class.__name__}, the first is '{wrong[0]}': found "
            f"{found.get(wrong[0], 'none')}, expected {expected.get(wrong[0], 'none')}"
        )
    return shell


def _save_and_compare(folder: str | Path, shell: PreTrainedModel, values: Mapping[str, Tensor]) -> None:
    shell.save_pretrained(folder, state_dict={k: v.detach().cpu().contiguous() for k, v in values.items()})
    model = load_strictly(type(shell), str(folder), str(folder), dtype="auto")
    _compare(dict(model.named_parameters()), values, folder)


def _compare(loaded: Mapping[str, Tensor], values: Mapping[str, Tensor], folder: str | Path) -> None:
    """Every value that was written is what the stock library reads (open_clip reads into float32: still exact)."""
    for name, value in values.items():
        found = loaded[name].detach()
        if found.shape != value.shape or not torch.equal(found, value.to("cpu", found.dtype)):
            raise RuntimeError(f"{folder}: '{name}' was not read back as it was written; do not use this folder")


def _to_generation_config(source: GenerationConfig | None, processor: Processor) -> GenerationConfig:
    """`source`, made to stop at the end of a turn as the model was trained to."""
    config = copy.deepcopy(source) if source is not None else GenerationConfig()
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    others = [token for token in stops if token is not None and token != processor.end_of_turn_id]
    config.eos_token_id = [processor.end_of_turn_id, *others] if others else processor.end_of_turn_id
    if config.pad_token_id is None:
        config.pad_token_id = processor.tokenizer.pad_token_id
    config._from_model_config = False  # else transformers would derive it again, without the above
    return config


def _compare_features(vision_tower: VisionTower, path: str, values: Mapping[str, Tensor]) -> None:
    """The whole encoder as its library reads and runs it, and ours with the values in hand: float32, one image."""
    section = replace(vision_tower.section, path=path, image_size=None)
    size, layer = vision_tower.facts.size, vision_tower.num_blocks
    images = torch.randint(0, 256, (1, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    ours = build_vision_tower(section, dtype=torch.float32).eval()
    kept = {name: value.float() for name, value in values.items() if name not in ours.set_aside}
    ours.model.load_state_dict(kept, strict=True)
    pixels = ours.normalise(images)
    with torch.no_grad():
        expected = _run_stock(section, pixels, layer)
        found = ours(images)
    error = (found - expected[:, -ours.num_features :]).abs().max().item()
    if not error <= 1e-4 * expected.abs().max().item():  # the same operations: 0 on a CPU; NaN fails too
        raise RuntimeError(f"{path}: the encoder that was read back gives other features (difference {error:g})")


def _run_stock(section: VisionTowerConfig, pixels: Tensor, layer: int) -> Tensor:
    """Hidden state `layer` of a written encoder from its own library, every token: float32[1, tokens, width]."""
    assert section.path is not None
    if section.path.startswith(OPEN_CLIP):
        visual = load_open_clip(section).visual.eval()
        out = visual.forward_intermediates(
            pixels,
            indices=[layer - 1],
            normalize_intermediates=section.post_norm,
            output_fmt="NLC",
            output_extra_tokens=section.cls == "keep",
        )
        prefix = out.get("image_intermediates_prefix", [])
        return torch.cat([*prefix, *out["image_intermediates"]], dim=1)
    model_class = MODEL_CLASSES[read_vision_config(section.path).model_type]
    model = load_strictly(model_class, section.path, section.path, dtype=torch.float32).eval()
    hidden = model(pixels, output_hidden_states=True).hidden_states[layer]
    return model.post_layernorm(hidden) if section.post_norm else hidden
