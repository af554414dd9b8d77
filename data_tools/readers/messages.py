"""Conversations as lists of messages: their texts, the pictures that they carry, and prompts that answers repeat.

A message carries pictures as parts of its content, or in a field beside it: {role, content, images}.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from data_tools.readers.media import UNREAD, Image, images_of
from data_tools.readers.pictures import as_images, is_absent, is_embedded_media
from data_tools.records import Malformed, Record, shown

IMAGE_PLACEHOLDER = "<image>"
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
TEXT_PARTS = (None, "text", "input_text", "output_text")
IMAGE_PARTS = ("image", "image_url", "input_image")
# What stands in a text for media of its row. In a sentence these are words about HTML, so a line must begin or end so.
_MARK = re.compile(r"<\|?(?:image|img|video|audio)(?:[ _-]?(?:\d{1,3}|pad|here))?\|?>", re.IGNORECASE)
_FILM_MARKS = ("<video", "<audio", "<|video", "<|audio")
_DATA_URL = re.compile(r"data:(?:image|video|audio)/[\w.+-]{1,40};base64,[A-Za-z0-9+/]{16}")
LEAST_REPEATED_WORDS = 3  # an answer may begin like a shorter prompt by chance
_ANSWERS_ARE_TEXT = "{field} holds an image in a message of the assistant; answers are text"
Turn = tuple[str, str]  # role, text
Part = dict[str, Any]


def turns_of(messages: Any, field: str, speaker: str = "from", text: str = "value") -> list[Turn]:
    """(role, text) of a conversation; a content list becomes text with `<image>` where its images are."""
    if not isinstance(messages, list):
        raise Malformed(f"expected {field} as a list of messages, found {type(messages).__name__}")
    turns = []
    for message in messages:
        role = SPEAKERS.get(str(message.get(speaker, ""))) if isinstance(message, dict) else None
        if role is None:
            raise Malformed(f"{field} holds {shown(message)}, expected {speaker} to be one of {', '.join(SPEAKERS)}")
        content = _content(message.get(text), field, role)
        beside = _pictures_beside(message, text)
        if beside and role == "assistant":
            raise Malformed(_ANSWERS_ARE_TEXT.format(field=field), UNREAD)
        turns.append((role, content if IMAGE_PLACEHOLDER in content else IMAGE_PLACEHOLDER * len(beside) + content))
    return turns


def images_in(messages: Any, text: str = "value") -> tuple[Image, ...]:
    """The pictures that the messages carry themselves; () where their parts only say where one belongs."""
    pictures: list[tuple[bool, tuple[Image, ...]]] = []  # (whether all of its parts of type image carry one, pictures)
    for message in messages:
        if isinstance(message, dict):
            content = message.get(text)
            parts = [part for part in content if _is_image(part)] if isinstance(content, list) else []
            carried = [as_images(_carried(part)) or () for part in parts]
            images = tuple(image for images in carried for image in images)
            beside = _pictures_beside(message, text, images)
            pictures.append((all(carried) or len(beside) == len(parts), beside))
    if any(images for _, images in pictures) and not all(whole for whole, _ in pictures):
        raise Malformed("some parts of type image carry a picture that can be read, and others do not", UNREAD)
    return tuple(image for _, images in pictures for image in images)


def question_of(turns: Sequence[Turn], field: str) -> tuple[tuple[Turn, ...], str]:
    """(history, question): the last message, which must be the user's, and those before."""
    if not turns or turns[-1][0] != "user":
        raise Malformed(f"expected {field} to end with a message of the user, found {[role for role, _ in turns]}")
    return tuple(turns[:-1]), turns[-1][1]


def answer_of(turns: Sequence[Turn], field: str, prompt: Sequence[Turn] = ()) -> str:
    """The text of the one message of the assistant, or of the last one behind those of `prompt`."""
    if turns[:-1] and same_turns(turns[:-1], prompt):
        turns = turns[-1:]
    if len(turns) != 1 or turns[0][0] != "assistant":
        behind = ", alone or behind the messages of the prompt" if prompt else ""
        roles = [role for role, _ in turns]
        raise Malformed(f"expected {field} to be one message of the assistant{behind}, found {roles}")
    return turns[0][1]


def same_turns(some: Sequence[Turn], others: Sequence[Turn]) -> bool:
    """Whether two conversations say the same; that only one of them says where the images belong is no difference."""
    return [(role, _bare(text)) for role, text in some] == [(role, _bare(text)) for role, text in others]


def require_media_of_texts(record: Record) -> None:
    """Raise Malformed where a text holds a whole picture, or says that media belong there which the row lacks."""
    asked = [text for role, text in record.history if role == "user"] + [record.prompt]
    for text in [*(text for _, text in record.history), record.prompt, record.chosen, record.rejected or ""]:
        if is_embedded_media(text) or _DATA_URL.search(text):
            raise Malformed(
                f"a text holds a picture or a film as base64, which would be trained on as letters: {shown(text, 24)}; "
                "put it into a field of its own, and name that with --map image=COLUMN",
                UNREAD,
            )
    for mark in (mark for text in asked for mark in _marks_in(text)):
        if mark != IMAGE_PLACEHOLDER and (not record.images or mark.lower().startswith(_FILM_MARKS)):
            raise Malformed(
                f"the prompt has {mark}, and the row no such media that can be read; name the column of its images "
                "with --map image=COLUMN, or say with --map image= that the mark is a word like others",
                UNREAD,
            )


def _marks_in(text: str) -> list[str]:
    """The marks with which a line of the text begins or ends."""
    marks = []
    for mark in _MARK.finditer(text):
        before, after = text[: mark.start()].rpartition("\n")[2], text[mark.end() :].partition("\n")[0]
        if not before.strip() or not after.strip():
            marks.append(mark[0])
    return marks


def take_off_prompt(record: Record) -> Record:
    """The pair without the prompt's text at the start of its answers, where both repeat all of it."""
    prompt = _bare(record.prompt)
    if record.rejected is None or len(prompt.split()) < LEAST_REPEATED_WORDS:
        return record
    rests = [_behind(prompt, answer) for answer in (record.chosen, record.rejected)]
    if not all(rests):
        return record
    return replace(record, chosen=rests[0], rejected=rests[1], prompt_taken_off=True)


def _behind(prompt: str, answer: str) -> str:
    """What follows the prompt in an answer, '' where it does not begin with it as whole words."""
    answer = answer.lstrip().removeprefix(IMAGE_PLACEHOLDER).lstrip()
    rest = answer.removeprefix(prompt)
    if rest == answer or (rest[:1].isalnum() and prompt[-1].isalnum()):
        return ""
    return rest.strip()


def _bare(text: str) -> str:
    return text.replace(IMAGE_PLACEHOLDER, "").strip()


def _pictures_beside(message: Part, text: str, carried: tuple[Image, ...] = ()) -> tuple[Image, ...]:
    """The pictures in the fields of a message beside its content, or those that its content carries."""
    beside = {name: value for name, value in message.items() if name not in (text, "role", "from")}
    return images_of(beside, carried=carried) if beside else carried


def _content(content: Any, field: str, role: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        return "".join(_text_of(part, field, role) for part in content)
    raise Malformed(f"{field}: expected a message's content as text or a list of parts, found {shown(content)}")


def _text_of(part: Part, field: str, role: str) -> str:
    if _is_image(part):
        if role == "assistant":
            raise Malformed(_ANSWERS_ARE_TEXT.format(field=field), UNREAD)
        return IMAGE_PLACEHOLDER
    kind, text = part.get("type"), part.get("text")
    if kind not in TEXT_PARTS or not is_absent(_carried(part)):
        raise Malformed(
            f"{field} holds a part of type {shown(kind)}, and only those of type text and image are read; leave the "
            "row out, or name text columns with --map prompt=COLUMN and the like",
            UNREAD,
        )
    if text is not None and not isinstance(text, str):
        raise Malformed(f"{field}: expected the text of a part as text, found {shown(text)}")
    return text or ""


def _is_image(part: Any) -> bool:
    if not isinstance(part, dict):
        return False
    return part.get("type") in IMAGE_PARTS or (part.get("type") is None and not is_absent(_carried(part)))


def _carried(part: Part) -> Any:
    """What a part holds beside its type and text; a number says which of the row's images is meant."""
    others = {name: value for name, value in part.items() if name not in ("type", "text")}
    return {name: value for name, value in others.items() if not isinstance(value, int | float)}
