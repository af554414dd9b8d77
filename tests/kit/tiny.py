"""Tiny models and tokenizers, written to disk as stock transformers and open_clip write them: no downloads, seconds.

Every builder seeds its own weights, so that the same call gives the same checkpoint, and returns the folder (or the
model name, for open_clip).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import processors
from transformers import (
    AutoModelForCausalLM,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from data_tools.architectures import byte_tokenizer

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
NUM_BYTES = 256
IMAGE_SIZE = 32
PATCH_SIZE = 8  # 16 patches an image
WIDTH = 32
NUM_LAYERS = 3
VOCAB_SIZE = 320  # above the 256 bytes and the special tokens, so that an added <image> needs no new rows
SQUARE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
# The ways of stock image processors to fit an image: (fit, resample) -> processor
IMAGE_PROCESSORS = {
    ("squash", "bicubic"): SiglipImageProcessor(size=SQUARE),
    ("squash", "bilinear"): SiglipImageProcessor(size=SQUARE, resample=2),  # SigLIP 2's
    ("crop", "bicubic"): CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=SQUARE),
    ("crop", "bilinear"): CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=SQUARE, resample=2),
    ("pad", "bicubic"): LlavaImageProcessor(size=SQUARE, do_pad=True, do_center_crop=False),
}


def tiny_tokenizer(
    folder: str | Path,
    *,
    chat_template: str | None = CHATML,
    extra_special_tokens: tuple[str, ...] = (),
    around: tuple[str, str] = ("", ""),
) -> Path:
    """A byte tokenizer (one token a byte) with ChatML's special tokens and template; ends a turn with <|im_end|>.

    `around`: special tokens that it puts before and behind each text by itself, as Llama's does with its <s>.
    """
    folder = Path(folder)
    core = byte_tokenizer([*SPECIAL_TOKENS, *extra_special_tokens, *filter(None, around)])
    before, behind = around
    if before or behind:
        core.post_processor = processors.TemplateProcessing(
            single=f"{before} $A {behind}".strip(),
            special_tokens=[(token, core.token_to_id(token)) for token in {before, behind} - {""}],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=before or None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return folder


def tiny_text_config(kind: str = "qwen2", *, tie: bool = False, vocab_size: int = VOCAB_SIZE, **changes: Any) -> Any:
    config_class = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}[kind]
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": NUM_LAYERS - 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": tie,
        "bos_token_id": None,
        "eos_token_id": NUM_BYTES + SPECIAL_TOKENS.index("<|im_end|>"),
        "pad_token_id": NUM_BYTES + SPECIAL_TOKENS.index("<|endoftext|>"),
        "initializer_range": 0.1,  # the usual 0.02 leaves logits that hardly depend on the input at this width
    }
    return config_class(**(settings | changes))


def tiny_language_model(
    folder: str | Path,
    kind: str = "qwen2",
    tie: bool = False,
    *,
    vocab_size: int = VOCAB_SIZE,
    with_tokenizer: bool = True,
    **changes: Any,
) -> Path:
    """A *ForCausalLM folder (Qwen2 or Llama), by default with the tokenizer in it as instruct models have."""
    folder = Path(folder)
    torch.manual_seed(1)
    config = tiny_text_config(kind, tie=tie, vocab_size=vocab_size, **changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    if with_tokenizer:
        tiny_tokenizer(folder)
    return folder


def tiny_vision_config(kind: str = "siglip", **changes: Any) -> Any:
    config_class = {"siglip": SiglipVisionConfig, "clip": CLIPVisionConfig}[kind]
    settings = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
    }
    return config_class(**(settings | changes))


def _draw_biases(model: torch.nn.Module) -> None:
    """Draw the biases too, as training leaves them: a tensor of zeros has no norm to compare an update with."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.add_(torch.randn_like(parameter) * 0.1)


def tiny_image_processor(kind: str = "siglip", size: int = IMAGE_SIZE) -> Any:
    square = {"height": size, "width": size}
    if kind == "siglip":
        return SiglipImageProcessor(size=square)
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size=square)


def _draw_norms(model: torch.nn.Module) -> None:
    """Draw the layer norms at random: at one and zero, a skipped or doubled norm would be hard to see."""
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)


def tiny_vision_tower(
    folder: str | Path, kind: str = "siglip", *, with_image_processor: bool = True, **changes: Any
) -> Path:
    """A SiglipVisionModel or CLIPVisionModel folder, by default with its preprocessor_config.json."""
    folder = Path(folder)
    torch.manual_seed(2)
    model_class = {"siglip": SiglipVisionModel, "clip": CLIPVisionModel}[kind]
    model = model_class(tiny_vision_config(kind, **changes))
    _draw_norms(model)
    model.save_pretrained(folder)
    if with_image_processor:
        tiny_image_processor(kind, model.config.image_size).save_pretrained(folder)
    return folder


def write_vision_json(path: str | Path, kind: str = "siglip", **changes: Any) -> Path:
    """A bare configuration file, from which an encoder with random weights is built."""
    return _write_json(path, tiny_vision_config(kind, **changes))


def write_text_json(path: str | Path, kind: str = "qwen2", *, tie: bool = False, **changes: Any) -> Path:
    """A bare configuration file, from which a language model with random weights is built."""
    return _write_json(path, tiny_text_config(kind, tie=tie, **changes))


def _write_json(path: str | Path, config: Any) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    config.to_json_file(path, use_diff=False)
    return path


def tiny_llava(
    folder: str | Path,
    *,
    kind: str = "qwen2",
    vision: str = "siglip",
    tie: bool = False,
    layer: int = -2,
    vision_changes: dict[str, Any] | None = None,
    text_changes: dict[str, Any] | None = None,
    **tokenizer_settings: Any,
) -> Path:
    """A LlavaForConditionalGeneration folder with its processor, as stock transformers writes it."""
    folder = Path(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        tiny_tokenizer(folder, extra_special_tokens=("<image>",), **tokenizer_settings),
        extra_special_tokens={"image_token": "<image>"},
    )
    torch.manual_seed(3)
    strategy: Any = "default" if vision == "clip" else "full"
    config = LlavaConfig(
        vision_config=tiny_vision_config(vision, **(vision_changes or {})),
        text_config=tiny_text_config(kind, tie=tie, **(text_changes or {})),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_select_strategy=strategy,
        vision_feature_layer=layer,
        tie_word_embeddings=tie,
    )
    model = LlavaForConditionalGeneration(config)
    _draw_norms(model.model.vision_tower)
    _draw_biases(model)
    model.save_pretrained(folder)
    processor = LlavaProcessor(
        image_processor=tiny_image_processor(vision),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1 if vision == "clip" else 0,
        chat_template=tokenizer.chat_template,
    )
    processor.save_pretrained(folder)
    return folder


def tiny_open_clip(folder: str | Path, *, with_timm: bool = False) -> str:
    """Register a tiny architecture with open_clip and return its name, for `open_clip:NAME` (random weights).

    `with_timm`: the image tower is a timm ViT with attention pooling, as the SigLIP models of open_clip have.
    """
    import open_clip

    folder = Path(folder)
    name = "tiny-timm" if with_timm else "tiny-vit"
    vision: dict[str, Any] = {"image_size": IMAGE_SIZE}
    if with_timm:
        _register_timm_vit()
        vision |= {"timm_model_name": "tiny_siglip_vit", "timm_model_pretrained": False}
        vision |= {"timm_pool": "map", "timm_proj": "none"}
    else:
        vision |= {"layers": NUM_LAYERS, "width": WIDTH, "head_width": 8, "patch_size": PATCH_SIZE}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": text, "custom_text": with_timm}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    return name


def tiny_open_clip_of_timm(folder: Path, kind: str) -> str:
    """The same with a ConvNeXt (its features are a map) or an EVA (a CLS token, rotary positions) of timm."""
    import open_clip
    from timm.models import is_model, register_model
    from timm.models.eva import eva02_tiny_patch14_224

    def tiny_eva(pretrained: bool = False, **settings: Any) -> Any:
        shape = {"img_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "embed_dim": WIDTH, "depth": NUM_LAYERS}
        return eva02_tiny_patch14_224(**(shape | {"num_heads": 4} | settings))

    if not is_model("tiny_eva"):
        tiny_eva.__module__ = "timm.models.eva"
        register_model(tiny_eva)
    trunk, size = {"ConvNeXt": ("test_convnext", 160), "EVA": ("tiny_eva", IMAGE_SIZE)}[kind]
    vision = {"image_size": size, "timm_model_name": trunk, "timm_pool": "", "timm_proj": "linear"}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"tiny-{kind.lower()}.json"
    path.write_text(json.dumps({"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(path)
    return path.stem


def _register_timm_vit() -> None:
    """Tell timm of a tiny ViT built as its SigLIP ones: no CLS token, a pooling head of its own."""
    from timm.models import VisionTransformer, build_model_with_cfg, is_model, register_model

    def tiny_siglip_vit(pretrained: bool = False, **kwargs: Any) -> Any:
        shape = {"img_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "embed_dim": WIDTH, "depth": NUM_LAYERS}
        settings = shape | {"num_heads": 4, "class_token": False, "global_pool": "map"} | kwargs
        return build_model_with_cfg(
            VisionTransformer, "tiny_siglip_vit", pretrained, pretrained_strict=False, **settings
        )

    if not is_model("tiny_siglip_vit"):
        register_model(tiny_siglip_vit)


def random_images(num_images: int, size: int = IMAGE_SIZE, *, seed: int = 0) -> torch.Tensor:
    """uint8[I, 3, H, W], every pixel drawn."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_images, 3, size, size), generator=generator, dtype=torch.uint8)
