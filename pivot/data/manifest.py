"""manifest.json of a packed data set: which shards there are, and that they belong together."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from pivot.data.remote import ShardCache, is_remote, join_url, shown
from pivot.data.samples import ROLES_OF_KIND

MANIFEST_VERSION = 1
MANIFEST_FIELDS = {"name": str, "kind": str, "fingerprint": str, "shards": list}  # those that are read here
MANIFEST_MEND = "the file was edited or mixed up: copy the data set again or pack it again"
SHARD_NAME = re.compile(r"[0-9A-Za-z_-]{1,80}")


@dataclass(frozen=True)
class Shard:
    """One entry of the manifest's shard list."""

    name: str
    samples: int
    bytes: int
    sha256: str
    idx_sha256: str
    shape: str = ""  # of every sample in it, by samples.sample_shape; '' where they differ, or nobody looked


@dataclass(frozen=True)
class Part:
    """One packed folder of a data set that may be made of several."""

    folder: str  # as it was named: a path or a URL
    name: str
    fingerprint: str
    manifest: dict[str, Any]
    shards: tuple[Shard, ...]

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)


def set_fingerprint(shards: list[Shard]) -> str:
    """sha256 over the format version and the content of all shards, in order."""
    listed = [[shard.name, shard.samples, shard.sha256] for shard in shards]
    text = json.dumps({"version": MANIFEST_VERSION, "shards": listed}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_part(path: str | Path, cache: ShardCache | None) -> Part:
    """The data set at a path or, with a `cache`, at a URL. Raises ValueError that says what is wrong."""
    folder = str(path).rstrip("/") or "/"
    if is_remote(folder) and cache is None:
        raise ValueError(f"{shown(folder)} is remote and there is no shard cache; copy the set to this machine first")
    manifest = _read_manifest(folder, cache)
    shards = [Shard(**entry) for entry in manifest["shards"]]
    listed = set_fingerprint(shards)
    if listed != manifest["fingerprint"]:
        raise ValueError(
            f"{shown(folder)}/manifest.json: fingerprint {manifest['fingerprint'][:12]} does not match its shard list "
            f"({listed[:12]}); {MANIFEST_MEND}"
        )
    return Part(folder, manifest["name"], manifest["fingerprint"], manifest, tuple(shards))


def _read_manifest(folder: str, cache: ShardCache | None) -> dict[str, Any]:
    path = join_url(folder, "manifest.json") if is_remote(folder) else str(Path(folder) / "manifest.json")
    try:
        manifest = json.loads(_read_manifest_text(folder, path, cache))
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
            raise ValueError(f"{shown(path)} is not JSON ({error}); copy the data set again") from error
        raise
    if not isinstance(manifest, dict) or manifest.get("version") != MANIFEST_VERSION:
        version = manifest.get("version") if isinstance(manifest, dict) else None
        raise ValueError(f"{shown(path)}: version {version}, expected {MANIFEST_VERSION}; pack the data again")
    _check_manifest(shown(path), manifest)
    return manifest


def _check_manifest(path: str, manifest: dict[str, Any]) -> None:
    _require_fields(path, "", manifest, MANIFEST_FIELDS)
    if manifest["kind"] not in ROLES_OF_KIND:
        raise ValueError(
            f"{path}: kind is {manifest['kind']!r}, expected {' or '.join(ROLES_OF_KIND)}; {MANIFEST_MEND}"
        )
    if not manifest["shards"]:
        raise ValueError(f"{path} lists no shards; pack the data again")
    expected = get_type_hints(Shard)
    for number, entry in enumerate(manifest["shards"]):
        where = f"shards[{number}]"
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: {where} is {entry!r:.80}, expected an object; {MANIFEST_MEND}")
        for field in set(entry) - set(expected):
            raise ValueError(f"{path}: {where} has a field {field!r}, expected {', '.join(expected)}; {MANIFEST_MEND}")
        _require_fields(path, f"{where}.", {"shape": "", **entry}, expected)
        if not SHARD_NAME.fullmatch(entry["name"]):
            raise ValueError(f"{path}: shard name {entry['name']!r} may hold letters, digits, _ and - only")


def _require_fields(path: str, where: str, found: dict[str, Any], expected: Mapping[str, type[Any]]) -> None:
    words = {str: "a text", int: "a whole number above 0", list: "a list"}
    for field, kind in expected.items():
        value = found.get(field)
        if not isinstance(value, kind) or (kind is int and value < 1):
            text = f"{value!r:.80}" if field in found else "missing"
            raise ValueError(f"{path}: {where}{field} is {text}, expected {words[kind]}; {MANIFEST_MEND}")


def _read_manifest_text(folder: str, path: str, cache: ShardCache | None) -> bytes:
    if is_remote(folder):
        assert cache is not None
        return cache.read(path)
    if not Path(path).is_file():
        state = "pack did not finish" if Path(folder).is_dir() else "the folder does not exist"
        raise ValueError(
            f"{folder} holds no manifest.json ({state}); run python -m data_tools pack again (it resumes), "
            "or name the folder that it wrote"
        )
    return Path(path).read_bytes()
