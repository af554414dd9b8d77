"""`data_tools demo`: the sets, the architecture and a picture of the demo world, byte for byte a function of the seed.

    DIR/scenes.png        a dozen scenes with questions, first of all
    DIR/captions/         kind sft: one caption a training scene
    DIR/questions/        kind sft: questions about the same scenes
    DIR/preference/       kind preference: right and wrong answers, about the first training scenes
    DIR/eval/             kind preference: questions about scenes that are in no other set
    DIR/model/            architecture.py
    DIR/demo.json         the options; written last: with it the folder is complete

Every sample has `answer` (questions), meta.type and meta.objects, and beside its picture a member `mask.png`, named by
meta.mask, in which the pixels of meta.objects[i] have the value i + 1.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from data_tools.convert import Packed, content_key
from data_tools.demo.architecture import write_architecture
from data_tools.demo.questions import CAPTION_REQUEST, Question, ask, caption
from data_tools.demo.scenes import SIDE, Scene, draw_scene
from data_tools.demo.sheet import draw_sheet
from data_tools.writer import ShardWriter
from pivot.data.manifest import MANIFEST_VERSION, Shard, set_fingerprint
from pivot.data.samples import SAMPLE_VERSION, check_sample, dump_sample
from pivot.system.files import write_json
from pivot.system.workers import worker_pool

WORLD_VERSION = 1  # raise it when the same options would give other bytes
SCENES_PER_BLOCK = 500  # a block is what one worker makes: one shard of each set
QUESTIONS_PER_SCENE = 4
JPEG_QUALITY = 90
KINDS = {"captions": "sft", "questions": "sft", "preference": "preference", "eval": "preference"}
Members = list[tuple[str, bytes]]


@dataclass(frozen=True)
class DemoOptions:
    out: Path
    num_train: int  # scenes
    num_eval: int  # scenes
    num_preference: int  # training scenes, the first, that get preference pairs
    seed: int
    preset: str
    workers: int = 1

    def identity(self) -> dict[str, Any]:
        """What decides the bytes."""
        facts = asdict(self) | {"world_version": WORLD_VERSION}
        return {name: value for name, value in facts.items() if name not in ("out", "workers")}


@dataclass(frozen=True)
class Block:
    """The scenes `first` to `last` of a split."""

    split: str  # train | eval
    number: int
    first: int
    last: int


def write_demo(options: DemoOptions, say: Callable[[str], None] = lambda text: None) -> dict[str, int]:
    """Make the folder, or see that it is made already; name -> number of samples.

    Raises ValueError for a folder that holds another world.
    """
    if (options.out / "demo.json").is_file():
        return _read_finished(options)
    options.out.mkdir(parents=True, exist_ok=True)
    draw_sheet(options.preset, options.seed).save(options.out / "scenes.png")
    say(f"a picture of the scenes: {options.out / 'scenes.png'}")
    write_architecture(options.out / "model")
    blocks = [*_cut("train", options.num_train), *_cut("eval", options.num_eval)]
    shards_of: dict[str, list[Shard]] = {name: [] for name in KINDS}
    scenes = 0
    for block, made in zip(blocks, _map(partial(write_block, options), blocks, options.workers), strict=True):
        for name, shard in made.items():
            shards_of[name].append(shard)
        scenes += block.last - block.first
        say(f"{scenes} of {options.num_train + options.num_eval} scenes")
    counts = {name: sum(shard.samples for shard in shards) for name, shards in shards_of.items()}
    for name, shards in shards_of.items():
        write_json(options.out / name / "manifest.json", _manifest(name, shards))
    write_json(options.out / "demo.json", {"options": options.identity(), "samples": counts})
    return counts


def _map(function: Callable[[Any], Any], items: list[Any], workers: int) -> Iterator[Any]:
    if workers <= 1:
        yield from map(function, items)
        return
    with worker_pool(workers) as pool:
        yield from pool.map(function, items)


def _read_finished(options: DemoOptions) -> dict[str, int]:
    world = json.loads((options.out / "demo.json").read_text())
    if world["options"] != options.identity():
        raise ValueError(
            f"{options.out} holds a demo world with other options ({world['options']}, not {options.identity()}); "
            "choose another --out, or remove it"
        )
    return world["samples"]


def _cut(split: str, num_scenes: int) -> list[Block]:
    starts = range(0, num_scenes, SCENES_PER_BLOCK)
    return [Block(split, n, first, min(first + SCENES_PER_BLOCK, num_scenes)) for n, first in enumerate(starts)]


def write_block(options: DemoOptions, block: Block) -> dict[str, Shard]:
    """One shard of each set that the block's scenes go into. Scene i depends on (seed, split, i) alone."""
    names = ["captions", "questions", "preference"] if block.split == "train" else ["eval"]
    if block.split == "train" and block.first >= options.num_preference:
        names.remove("preference")
    writers = {name: ShardWriter(options.out / name, f"{name}-{block.number:06d}") for name in names}
    for number in range(block.first, block.last):
        for name, packed in make_samples(options, block.split, number):
            if name in writers:
                writers[name].add(packed)
    return {name: writer.close() for name, writer in writers.items()}


def make_samples(options: DemoOptions, split: str, number: int) -> Iterator[tuple[str, Packed]]:
    """(set, sample) of one scene."""
    random = Random(f"{options.seed}/{options.preset}/{split}/{number}")
    scene = Scene.sample(random, options.preset)
    picture, mask = draw_scene(scene, random)
    files = [("jpg", _to_bytes(picture, "JPEG")), ("mask.png", _to_bytes(mask, "PNG"))]
    build = partial(_build_sample, scene, files, f"{split}/{number}")
    if split == "eval":
        for question in ask(scene, random, QUESTIONS_PER_SCENE):
            yield "eval", build("eval", question)
        return
    yield "captions", build("captions", Question("caption", CAPTION_REQUEST, caption(scene), ""))
    for name in ("questions", "preference"):
        if name == "questions" or number < options.num_preference:
            for question in ask(scene, random, QUESTIONS_PER_SCENE):
                yield name, build(name, question)


def _build_sample(scene: Scene, files: Members, where: str, name: str, question: Question) -> Packed:
    kind = KINDS[name]
    extension, picture = files[0]
    sha256 = hashlib.sha256(picture).hexdigest()
    sample = {
        "v": SAMPLE_VERSION,
        "id": f"{where}/{question.kind}: {question.text}",
        "kind": kind,
        "prompt": [
            {"role": "user", "content": [{"type": "image", "image": 0}, {"type": "text", "text": question.text}]}
        ],
        "chosen": [{"role": "assistant", "content": question.right}],
        **({"rejected": [{"role": "assistant", "content": question.wrong}]} if kind == "preference" else {}),
        "images": [{"member": extension, "w": SIDE, "h": SIDE, "sha256": sha256, "origin": where}],
        "answer": None if question.kind == "caption" else question.right,
        "rejected_images": None,
        "margin": None,
        "source": f"demo-{name}",
        "meta": {"type": question.kind, "scene": where, "mask": "mask.png", "objects": scene.labels},
    }
    check_sample(sample)
    return Packed(content_key(sample), f"demo-{name}", sample, [("json", dump_sample(sample)), *files])


def _to_bytes(image: Image.Image, format: str) -> bytes:
    file = io.BytesIO()
    # Subsampling off: half the colour resolution would blur objects of some 20 pixels.
    image.save(file, format, **({"quality": JPEG_QUALITY, "subsampling": 0} if format == "JPEG" else {}))
    return file.getvalue()


def _manifest(name: str, shards: list[Shard]) -> dict[str, Any]:
    samples = sum(shard.samples for shard in shards)
    return {
        "version": MANIFEST_VERSION,
        "name": f"demo-{name}",
        "kind": KINDS[name],
        "samples": samples,
        "images": samples,
        "bytes": sum(shard.bytes for shard in shards),
        "sources": {f"demo-{name}": {"samples": samples, "repeat_time": 1.0}},
        "drops": {},
        "fingerprint": set_fingerprint(shards),
        "shards": [asdict(shard) for shard in shards],
    }
