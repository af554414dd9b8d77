"""Leave out what others must not read: passwords and queries of URLs, secret settings, values of the environment.

    redact("https://me:pw@host/set?token=abc")    # "https://***@host/set?token=***"
    remember("HF_TOKEN", "abc")                   # pivot.config_load does it for what a YAML takes from there
    redact("data.train: abc/set")                 # "data.train: ${oc.env:HF_TOKEN}/set"

Whatever prints for a reader or writes into a run's folder passes its text through here.
"""

from __future__ import annotations

import re
from typing import Any, TextIO

from pivot.system.plain import plain

MARK = "***"
_SECRET = re.compile(r"token(?!s)|key|secret|passw|credential|auth(?!or)", re.IGNORECASE)  # max_tokens counts tokens
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)([^\s'\"<>]+)")
_HOST = re.compile(r"(?:\[[^]]*\]|[^:]*)(?::\d*)?")  # name or [IPv6], and a port
_QUERY = re.compile(r"([^=&#?]+=?)([^&#?]*)")
_HEADER = re.compile(r"(authorization:\s*(?:(?:basic|bearer)\s+)?)[^\s'\"]+", re.IGNORECASE)
_WORD = r"[\w-]*(?:token(?!s)|secret|passw|credential|api_?key|access_?key)[\w-]*"
_ASSIGNED = re.compile(rf"((?:--{_WORD}[\s=]|{_WORD}=)\s*)([^\s'\"&;,)]+)", re.IGNORECASE)
_PLAIN = re.compile(r"[-+0-9.eE]*|true|false|null|none", re.IGNORECASE)
_SHORT = 6  # characters; a shorter value would be replaced in words that have nothing to do with it

_remembered: dict[str, str] = {}  # value -> what is shown for it


def is_secret_name(name: str) -> bool:
    return _SECRET.search(name) is not None


def remember(name: str, value: str, *, key: str = "") -> None:
    """Show `${oc.env:NAME}` for this value of the environment from now on, whatever `key` of a YAML it stands under.

    A path, a number or a short word is shown as it is unless the variable's name or the key says that it is secret:
    a reader needs to know where his files are.
    """
    is_path = value.startswith(("/", "~", "."))
    known = is_path or len(value) < _SHORT or _PLAIN.fullmatch(value) is not None
    if value and (is_secret_name(name) or is_secret_name(key) or not known):
        _remembered[value] = f"${{oc.env:{name}}}"


def redact(text: str) -> str:
    """`text` without what may be a secret. Redacting twice is redacting once."""
    for value in sorted(_remembered, key=len, reverse=True):
        text = text.replace(value, _remembered[value])
    text = _URL.sub(lambda match: match[1] + _redact_address(match[2]), text)
    text = _HEADER.sub(rf"\1{MARK}", text)
    return _ASSIGNED.sub(_hide_assigned, text)


def _redact_address(address: str) -> str:
    """What follows the :// of a URL. A password with a /, ? or # in it is not legal, but goes as well."""
    end = re.match(r"[^/?#]*", address)
    assert end is not None
    authority, rest = end[0], address[end.end() :]
    if "@" not in authority and not _HOST.fullmatch(authority) and "@" in rest:
        authority, rest = address.rsplit("@", 1)[0] + "@", address.rsplit("@", 1)[1]
    user, at, host = authority.rpartition("@")
    parts = re.split(r"([?#])", rest, maxsplit=1)
    hidden = _QUERY.sub(lambda part: part[1] + MARK if part[1].endswith("=") else MARK, "".join(parts[2:]))
    return (MARK if user else "") + at + host + "".join(parts[:2]) + hidden


def _hide_assigned(match: re.Match[str]) -> str:
    is_shown = _PLAIN.fullmatch(match[2]) or match[2].startswith("${")
    return match[0] if is_shown else match[1] + MARK


def redact_values(value: Any, name: str = "") -> Any:
    """The same for every text of nested lists and mappings; a text under a secret key goes as a whole."""
    if isinstance(value, dict):
        return {key: redact_values(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact_values(item, name) for item in value]
    if not isinstance(value, str):
        return value
    return MARK if is_secret_name(name) and "${" not in value else redact(value)


def redact_setting(text: str) -> str:
    """key=value of a command line, or what somebody took for one."""
    key, equals, value = text.partition("=")
    if equals:
        return key + equals + redact_values(value, key)
    return re.sub(r"(?<=[\w.-])[^\w.-].*", MARK, text, flags=re.DOTALL) if is_secret_name(text) else redact(text)


def is_redacted(text: str) -> bool:
    """Whether `text` holds a mark that `redact` left where something was."""
    return MARK in text


def tell(text: str, *, to: TextIO | None = None) -> None:
    """Print a line for the reader, without secrets and with control characters written out; to stdout by default."""
    print(plain(redact(text)), file=to, flush=True)
