"""The on-disk contract of one sample: what the JSON member of a shard holds, and what makes it wrong.

    {"v": 1, "id": "rlaif-v/000123", "kind": "preference",
     "prompt":   [{"role": "user", "content": [{"type": "image", "image": 0}, {"type": "text", "text": "..."}]}],
     "chosen":   [{"role": "assistant", "content": "A red cup."}],
     "rejected": [{"role": "assistant", "content": "Two blue plates."}],
     "images":   [{"member": "jpg", "w": 640, "h": 480, "sha256": "...", "origin": "coco/000.jpg"}],
     "answer": "a red cup", "rejected_images": null, "margin": null, "source": "rlaif-v", "meta": {}}

Of kind "sft" there is no `rejected`; of kind "unpaired" neither, but one answer and what it is:

     "completion": [{"role": "assistant", "content": "A red cup."}], "label": true,       true: desirable; false: not

The image parts of the prompt name the images 0, 1, ... in this order, each once; completions hold text only. `answer`
is what a generated answer is compared with: a text, a list of equally right ones, or null.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from functools import reduce
from typing import Any

from pivot.batch import CHOSEN, REJECTED

SAMPLE_VERSION = 1
UNPAIRED = "unpaired"
# The roles that samples of a kind have; one of kind unpaired has one of the two, by its label.
ROLES_OF_KIND = {"preference": (CHOSEN, REJECTED), "sft": (CHOSEN,), UNPAIRED: (CHOSEN, REJECTED)}
KEY_PATTERN = re.compile(r"[0-9A-Za-z_-]{1,80}")  # no dot: webdataset cuts the key at the first one
MEMBER_PATTERN = re.compile(r"(img\d+\.)?(jpg|jpeg|png|webp)")

Sample = dict[str, Any]


def parse_sample(data: bytes) -> Sample:
    """The checked sample in the JSON text `data`. Raises ValueError when it breaks the contract."""
    try:
        sample = json.loads(data)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"the sample's JSON cannot be read ({error})") from error
    check_sample(sample)
    return sample


def dump_sample(sample: Sample) -> bytes:
    """The bytes that go into the shard. Raises UnicodeEncodeError on text with lone surrogates."""
    return json.dumps(sample, ensure_ascii=False, separators=(",", ":")).encode()


def check_sample(sample: Any) -> None:
    """Raise ValueError, naming the field, unless `sample` keeps the contract above."""
    if not isinstance(sample, dict) or sample.get("v") != SAMPLE_VERSION:
        raise ValueError(f"expected a sample of version {SAMPLE_VERSION}; pack the data again with this version")
    kind = sample.get("kind")
    if kind not in ROLES_OF_KIND:
        raise ValueError(f"field kind is {kind!r}, expected one of {', '.join(ROLES_OF_KIND)}")
    for field in ("id", "source"):
        if not isinstance(sample.get(field, ""), str | None):
            raise ValueError(f"field {field} is {sample[field]!r:.200}, expected text")
    answers = ("completion",) if kind == UNPAIRED else ROLES_OF_KIND[kind]
    for field in ("prompt", *answers):
        _check_messages(field, sample.get(field))
    if kind == UNPAIRED and not isinstance(sample.get("label"), bool):
        raise ValueError(f"field label is {sample.get('label')!r:.200}, expected true (desirable) or false")
    images = sample.get("images")
    if not isinstance(images, list):
        raise ValueError("field images must be a list")
    for image in images:
        if not MEMBER_PATTERN.fullmatch(str(image.get("member"))) or not image.get("sha256"):
            raise ValueError(f"field images holds {image!r:.200}, expected member (an image extension) and sha256")
    named = [part["image"] for part in image_parts(sample["prompt"])]
    if named != list(range(len(images))):
        raise ValueError(
            f"the prompt's image parts name the images {named}, but the sample holds {len(images)} image(s); "
            "expected each once, in order"
        )
    for field in answers:
        if image_parts(sample[field]):
            raise ValueError(f"field {field} holds an image part; only the prompt may")
    answers_of(sample)


def sample_shape(extensions: Iterable[str], sample: Sample) -> str:
    """What the samples of one shard have in common: `json+jpg/9f31c2d4`, members and a hash over the JSON's types.

    `datasets` takes both from the first five samples of a tar and refuses one that follows with others: a second
    image, or an answer where those had none.
    """
    types = json.dumps(_type_of(sample), sort_keys=True)
    return f"{'+'.join(extensions)}/{hashlib.sha256(types.encode()).hexdigest()[:8]}"


def _type_of(value: Any) -> Any:
    """The type that Arrow infers: objects in a list are one type with the fields of all of them."""
    if isinstance(value, dict):
        return {name: _type_of(field) for name, field in value.items()}
    if isinstance(value, list):
        return [reduce(_unite, map(_type_of, value), None)]
    return None if value is None else type(value).__name__


def _unite(one: Any, other: Any) -> Any:
    if isinstance(one, dict) and isinstance(other, dict):
        return {name: _unite(one.get(name), other.get(name)) for name in {**one, **other}}
    if isinstance(one, list) and isinstance(other, list):
        return [_unite(one[0], other[0])]
    return other if one is None else one


def answers_of(sample: Sample) -> tuple[str, ...]:
    """The right answers to a sample's question; () when it carries none."""
    answer = sample.get("answer")
    answers = answer if isinstance(answer, list) else [] if answer is None else [answer]
    if not all(isinstance(one, str) for one in answers):
        raise ValueError(
            f"sample {sample.get('id')}: answer is {answer!r:.200}, expected a string or a list of strings"
        )
    return tuple(one for one in answers if one)


def image_parts(messages: list[dict]) -> list[dict]:
    """The parts of type image, in reading order."""
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    return [part for content in contents for part in content if part["type"] == "image"]


def message_text(messages: list[dict]) -> str:
    """All text of `messages`, for counting characters and for looking at it."""
    texts = []
    for message in messages:
        content = message["content"]
        texts += [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    return "\n".join(texts)


def completions_of(sample: Sample, roles: tuple[str, ...]) -> dict[str, list[dict]]:
    """role -> messages, of those roles that the sample has. Raises ValueError when its kind does not have a role."""
    missing = [role for role in roles if role not in ROLES_OF_KIND[sample["kind"]]]
    if missing:
        raise ValueError(f"sample {sample.get('id')} is of kind {sample['kind']} and has no {missing[0]} completion")
    if sample["kind"] == UNPAIRED:
        own = CHOSEN if sample["label"] else REJECTED
        return {own: sample["completion"]} if own in roles else {}
    return {role: sample[role] for role in roles}


def all_completions(sample: Sample) -> dict[str, list[dict]]:
    """role -> messages of all that the sample has: chosen, rejected, or both."""
    return completions_of(sample, ROLES_OF_KIND[sample["kind"]])


def _check_messages(field: str, messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"field {field} must be a non-empty list of messages")
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"field {field} holds {message!r:.200}, expected a message with role and content")
        if isinstance(content, str):
            continue
        if not isinstance(content, list) or not all(_is_part(part) for part in content):
            raise ValueError(f"field {field}: content must be a string or a list of image and text parts")


def _is_part(part: Any) -> bool:
    if not isinstance(part, dict):
        return False
    text = part.get("type") == "text" and isinstance(part.get("text"), str)
    return text or (part.get("type") == "image" and isinstance(part.get("image"), int))
