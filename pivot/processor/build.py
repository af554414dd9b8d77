"""The processor of a run, built from what its config names, and what the first screen says about it."""

from __future__ import annotations

from pathlib import Path

from pivot.config import DataConfig, ModelConfig
from pivot.encoders.facts import Encoder
from pivot.encoders.library import resolve_encoder
from pivot.encoders.transformers import read_image_settings
from pivot.processor.processor import Processor
from pivot.processor.stock import choose_image_fit, describe_other_ids, find_chat_template, same_features
from pivot.processor.tokenizer import load_tokenizer


def build_processor(model: ModelConfig, data: DataConfig, encoder: Encoder | None = None) -> Processor:
    """The processor of a run; the tokenizer lies with the language model (beside it, for a bare CONFIG.json).

    `encoder`: what `model.vision_tower` names, where that was resolved before.
    """
    path = model.language_model.path
    if path is None:
        raise ValueError("model.language_model.path: absent; give a folder or a hub id that holds the tokenizer")
    place = str(Path(path).parent) if Path(path).is_file() else path
    tokenizer = load_tokenizer(place)
    own, source = find_chat_template(place, tokenizer)
    given = read_chat_template(data.chat_template)
    encoder = encoder or resolve_encoder(model.vision_tower)
    image_fit = choose_image_fit(encoder, data.image.fit)
    processor = Processor(
        tokenizer,
        encoder.facts,
        cls=model.vision_tower.cls,
        fit=image_fit.fit,
        resample=image_fit.resample,
        registers=model.vision_tower.registers,
        chat_template=own if given is None else given,
    )
    processor.notes = (
        _describe_template(processor, own, source, given),
        f"pixels     {image_fit.fit}, {image_fit.resample}: {image_fit.source}",
        *_compare_to_stock(processor, place, encoder, own_template=given is None and own is not None),
    )
    return processor


def _describe_template(processor: Processor, own: str | None, source: str, given: str | None) -> str:
    """For the first screen: whose prompts the run trains on."""
    whose = f"the template of {source}"
    if given is not None:
        same = own is not None and given == own
        whose = "data.chat_template" + ("" if same or own is None else f", which is not the template of {source}")
    elif own is None:
        whose = f"ChatML: {source}, and data.chat_template is absent"
    added = "".join(processor.tokenizer.convert_ids_to_tokens(processor.lead_ids))
    return f"prompts    {whose}" + (f"; the tokenizer begins each with {added}" if added else "")


def _compare_to_stock(processor: Processor, place: str, encoder: Encoder, *, own_template: bool) -> list[str]:
    """What could not be compared; ValueError where the processor in the checkpoint's folder prompts otherwise."""
    if not read_image_settings(place):
        return []  # a tokenizer alone: the processor will be ours
    try:
        difference = describe_other_ids(
            processor, place, images=same_features(encoder, place), own_template=own_template
        )
    except Exception as error:  # whatever a processor of any kind may raise
        reason = str(error).strip().partition("\n")[0]
        return [f"processor  not compared to the one at {place}, which fails: {type(error).__name__}: {reason}"]
    if difference is not None:
        raise ValueError(
            f"model.language_model.path: the processor at {place} makes other prompts than its tokenizer, its chat "
            f"template and config.json ask for: {difference}; repair its processor_config.json or chat template"
            + (", or set data.chat_template" if own_template else "")
        )
    return []


def read_chat_template(value: str | None) -> str | None:
    """`data.chat_template`: the text of a file, or Jinja given inline."""
    if value is None or "{" in value:
        return value
    if not Path(value).is_file():
        raise ValueError(f"data.chat_template: '{value}' is neither a file nor Jinja text (which would hold a '{{')")
    return Path(value).read_text()
