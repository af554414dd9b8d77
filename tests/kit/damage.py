"""Ways to spoil a shard."""

import hashlib
import json
import tarfile
import zlib
from dataclasses import asdict, replace

from pivot.data.manifest import set_fingerprint
from pivot.data.shards import BLOCK, ShardSet

SMUGGLED = {
    "pickle": "{key}.pyd",
    "pickle of a picture": "{key}.png.pyd",
    "another's picture": "other.png",
    "picture elsewhere": "elsewhere/{key}.mask.png",
    "link": "{key}.mask.png",
}


def smuggle(folder, rows, name, kind=tarfile.REGTYPE, content=b""):
    """Put a tar entry behind these samples' members and make index and manifest agree with it; `name` holds {key}."""
    opened, path, shards = ShardSet.open(folder), folder / "manifest.json", []
    for number, shard in enumerate(opened.shards):
        first, last = opened.first_rows[number : number + 2].tolist()
        index, tar = opened.index[first:last].copy(), b""
        for record, row in zip(index, range(first, last), strict=True):
            span = opened.read_span(row)
            if row in rows:
                entry = tarfile.TarInfo(name.format(key=span[:BLOCK].split(b".")[0].decode()))
                entry.type, entry.linkname = kind, "/etc/passwd" if kind == tarfile.SYMTYPE else ""
                entry.size = len(content)
                head = entry.tobuf(tarfile.USTAR_FORMAT)
                span += move_folder(head) if "/" in entry.name else head
                span += content + bytes(-len(content) % BLOCK)
            record["offset"], record["span"], record["crc32"] = len(tar), len(span), zlib.crc32(span)
            tar += span
        tar += bytes(2 * BLOCK)
        opened.fetch(number).write_bytes(tar)
        (folder / "index" / f"{shard.name}.idx").write_bytes(index.tobytes())
        hashes = {"sha256": hashlib.sha256(tar).hexdigest(), "idx_sha256": hashlib.sha256(index.tobytes()).hexdigest()}
        shards.append(replace(shard, bytes=len(tar), **hashes))
    listed = {"shards": [asdict(shard) for shard in shards], "fingerprint": set_fingerprint(shards)}
    path.write_text(json.dumps(json.loads(path.read_text()) | listed))


def move_folder(head):
    """The tar header with its folder in USTAR's second field for names, where it is easily overlooked."""
    parts = tarfile.TarInfo.frombuf(head, "ascii", "strict").name.partition("/")
    head = bytearray(
        parts[2].encode().ljust(100, b"\0") + head[100:345] + parts[0].encode().ljust(155, b"\0") + head[500:]
    )
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


def flip_bit(opened, row):
    """Change one bit of the last byte block of a sample on the disk."""
    shard, _ = opened.locate(row)
    path = opened.folder / "shards" / f"{opened.shards[shard].name}.tar"
    record = opened.index[row]
    with path.open("r+b") as file:
        place = int(record["offset"]) + int(record["span"]) - BLOCK
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 4]))
