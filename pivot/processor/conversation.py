"""A conversation as the shards hold it: checked, and in the one form that a chat template is given.

Messages are `{"role": ..., "content": text or parts}`, a part `{"type": "text", "text": ...}` or
`{"type": "image", "image": k}`, images numbered in the order in which they are shown.
"""

from __future__ import annotations

from typing import Any

ROLES = ("system", "user", "assistant")


class ChangedAnswer(ValueError):
    """The chat template does not leave an answer as it is; such a sample is left out and counted."""


def check_prompt(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """The messages with content as a list of parts, neighbouring texts joined, and the number of images."""
    if not messages:
        raise ValueError("prompt: found no message; expected at least one")
    num_images = 0
    checked = []
    for message in messages:
        parts = _parts(message, "prompt")
        for part in parts:
            if part["type"] == "image":
                if part.get("image") != num_images:
                    raise ValueError(
                        f"prompt: found image {part.get('image')!r} where image {num_images} was expected; images are "
                        "numbered 0, 1, ... in the order in which they are shown"
                    )
                num_images += 1
        checked.append({"role": message["role"], "content": parts})
    return checked, num_images


def check_completion(role: str, messages: list[dict[str, Any]]) -> dict[str, Any]:
    if len(messages) != 1 or messages[0].get("role") != "assistant":
        roles = [message.get("role") for message in messages]
        raise ValueError(f"{role}: found messages of {roles}; expected exactly one, of the assistant")
    parts = _parts(messages[0], role)
    if any(part["type"] == "image" for part in parts):
        raise ValueError(f"{role}: found an image; expected text alone")
    return {"role": "assistant", "content": parts}


def _parts(message: dict[str, Any], where: str) -> list[dict[str, Any]]:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"{where}: found role {role!r}, expected one of {', '.join(ROLES)}")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    parts: list[dict[str, Any]] = []
    for piece in content if isinstance(content, list) else [content]:
        part: dict[str, Any] = piece if isinstance(piece, dict) else {}
        kind = part.get("type")
        if kind != "image" and not (kind == "text" and isinstance(part.get("text"), str)):
            raise ValueError(f"{where}: found content {piece!r}, expected a string or a list of text and image parts")
        if kind == "text" and parts and parts[-1]["type"] == "text":  # a special token may be spread over two parts
            parts[-1] = {"type": "text", "text": parts[-1]["text"] + part["text"]}
        else:
            parts.append(part)
    return parts


def escape_text(message: dict[str, Any], escapes: dict[str, str]) -> dict[str, Any]:
    """The message with a letter in place of each special token that a user wrote."""
    parts = []
    for part in message["content"]:
        if part["type"] == "text":
            text = part["text"]
            for token, letter in escapes.items():
                text = text.replace(token, letter)
            part = {"type": "text", "text": text}
        parts.append(part)
    return {"role": message["role"], "content": parts}
