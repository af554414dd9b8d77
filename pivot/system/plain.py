"""Text from data, files and servers, made safe to print."""

from __future__ import annotations

import re

# C0 without tab and newline, DEL, C1, and the letters that turn the direction of what follows: a terminal obeys them.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str) -> str:
    r"""`text` with each control character written out, as in `\x1b[2J`; lines and tabs stay."""
    return _CONTROLS.sub(lambda control: control[0].encode("unicode_escape").decode(), text)


def plain_json(text: str) -> str:
    r"""The same of a JSON document, which it leaves JSON: as in `\u001b[2J`."""
    return _CONTROLS.sub(lambda control: f"\\u{ord(control[0]):04x}", text)
