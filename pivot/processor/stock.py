"""What the checkpoint itself would be prompted with: its chat template, and its own processor's pixels and token ids.

A model is served by stock transformers with the processor that lies in its folder. What we train on must be that, so
ours takes over what the folder says, and the two are then compared on samples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, PreTrainedTokenizerBase

from pivot.encoders.facts import Encoder, EncoderFacts, ImageFit, ImageGeometry
from pivot.encoders.library import LIBRARIES
from pivot.encoders.square import MAX_LEVELS, as_levels, max_difference, sample_images
from pivot.pretrained import find_file, read_config, read_json

if TYPE_CHECKING:
    from pivot.processor import Processor


# -- the chat template ---------------------------------------------------------------------------------------------


def find_chat_template(path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str | None, str]:
    """The chat template of a checkpoint and where it stands, in the order in which transformers' processors look."""
    for name in ("processor_config.json", "chat_template.json"):
        template = read_json(path, name).get("chat_template")
        if template:
            return _default_template(template, f"{path}/{name}"), f"{path}/{name}"
    file = find_file(path, "chat_template.jinja")
    if file is not None:
        return file.read_text("utf-8"), f"{path}/{file.name}"
    if tokenizer.chat_template is not None:
        return _default_template(tokenizer.chat_template, path), f"the tokenizer at {path}"
    return None, f"no chat template at {path}"


def _default_template(template: Any, where: str) -> str:
    """Of a file with several templates, the one for plain conversations."""
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        if "default" not in template:
            raise ValueError(
                f"chat template: {where} holds those named {', '.join(sorted(template))} and no default; "
                "copy one to a file and set data.chat_template to it"
            )
        template = template["default"]
    return str(template)


# -- pixels --------------------------------------------------------------------------------------------------------


def choose_image_fit(encoder: Encoder, wanted: str | None) -> ImageFit:
    """How an image becomes the square: as `wanted` says, else as the encoder's own image processor does it.

    Raises ValueError where that processor does what none of ours does and nothing else is wanted.
    """
    path = encoder.path
    try:
        own = LIBRARIES[encoder.library].read_image_fit(encoder)
    except Exception as error:  # whatever a processor of any kind may raise
        reason = str(error).strip().partition("\n")[0]
        why = f"the image processor at {path} cannot be followed: {reason}"
        if wanted is not None:
            return ImageFit(wanted, "bicubic", f"data.image.fit; {why}")
        raise ValueError(
            f"model.vision_tower.path: {why}; set data.image.fit to squash, crop or pad to train on those pixels all "
            "the same"
        ) from error
    if own is None:
        return ImageFit(wanted or "squash", "bicubic", "data.image.fit" if wanted else f"no image processor at {path}")
    if wanted is None:
        return own
    differs = "" if wanted == own.fit else f"; {own.source} would {own.fit}"
    return ImageFit(wanted, own.resample, f"data.image.fit{differs}")


# -- both, of a whole processor ------------------------------------------------------------------------------------

_TEXTS = ("What is on it? ", "A cup.", "Are you sure?")


def same_features(encoder: Encoder, path: str) -> bool:
    """Whether the run takes the features of an image that the HF LLaVA at `path` takes, and so as many tokens."""
    strategy = getattr(read_config(path, "model.language_model.path"), "vision_feature_select_strategy", None)
    section = encoder.section
    same_cls = strategy is not None and (not encoder.facts.has_cls or (strategy == "full") == (section.cls == "keep"))
    same_registers = not encoder.facts.num_registers or section.registers == "keep"  # LLaVA has no word for them
    return same_cls and same_registers and section.path == path and section.image_size is None


def describe_other_ids(processor: Processor, path: str, *, images: bool, own_template: bool) -> str | None:
    """How the stock processor at `path` encodes sample conversations otherwise than ours; None where it does not.

    Without `images` only text is compared. `own_template`: the chat template is the checkpoint's; else ours is given to
    the stock processor too. What that raises is passed on.
    """
    stock: Any = AutoProcessor.from_pretrained(path, trust_remote_code=False)
    picture = {"type": "image", "image": Image.fromarray(sample_images(processor.geometry.size)[0])}
    for with_image in (False, True) if images else (False,):
        messages = _conversation({"type": "image", "image": 0} if with_image else None)
        shown = _conversation(picture if with_image else None)
        ours = processor.encode(messages, {}).prompt.tolist()
        theirs = _stock_ids(stock, shown, None if own_template else processor.chat_template, processor.chat_template)
        if ours != theirs:
            return _describe_ids(ours, theirs, processor, with_image)
    return None


def describe_other_pixels(geometry: ImageGeometry, facts: EncoderFacts, image_processor: Any) -> str | None:
    """How a stock image processor prepares sample images otherwise than ours; None where it does not."""
    images = sample_images(geometry.size)
    stock = as_levels(image_processor, images, facts)
    if stock.shape[-1] != geometry.size:
        return f"images have {stock.shape[-1]} pixels a side there and {geometry.size} here"
    levels = max_difference(stock, images, facts, geometry.fit, geometry.resample)
    return None if levels <= MAX_LEVELS else f"a pixel differs by {levels:.0f} of 255 levels"


def require_same(processor: Processor, path: str) -> None:
    """RuntimeError unless the stock processor that was written to `path` makes the ids and pixels that ours makes."""
    image_processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=False)
    difference = describe_other_ids(processor, path, images=True, own_template=True) or describe_other_pixels(
        processor.geometry, processor.encoder, image_processor
    )
    if difference is not None:
        raise RuntimeError(f"{path}: the processor that was written does not prompt as the run did: {difference}")


def _conversation(image: dict[str, Any] | None) -> list[dict[str, Any]]:
    asked, answered, again = ({"type": "text", "text": text} for text in _TEXTS)
    return [
        {"role": "user", "content": [*([image] if image else []), asked]},
        {"role": "assistant", "content": [answered]},
        {"role": "user", "content": [again]},
    ]


def _stock_ids(stock: Any, messages: list[dict[str, Any]], template: str | None, prefixed: str) -> list[int]:
    settings = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    try:
        encoded = stock.apply_chat_template(messages, chat_template=template, **settings)
    except TypeError:  # a template for content that is a string; with our prefix it takes any
        encoded = stock.apply_chat_template(messages, chat_template=prefixed, **settings)
    return list(encoded["input_ids"][0])


def _describe_ids(ours: list[int], theirs: list[int], processor: Processor, with_image: bool) -> str:
    pairs = list(zip(ours, theirs, strict=False))  # one may be the beginning of the other
    place = next((i for i, (our, their) in enumerate(pairs) if our != their), len(pairs))
    our, their = (processor.tokenizer.decode(ids[place : place + 8]) for ids in (ours, theirs))
    sample = "with an image" if with_image else "of text alone"
    return (
        f"a conversation {sample} is {len(theirs)} tokens there and {len(ours)} here, which differ from token {place} "
        f"on: {their!r} there, {our!r} here"
    )
