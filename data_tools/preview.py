"""`preview`: a few samples for people to look at, as a contact sheet (PNG) or as one HTML page that needs nothing else.

The words in which chosen and rejected differ are marked. Every text is escaped; the page runs no script and loads
nothing from anywhere.
"""

from __future__ import annotations

import base64
import difflib
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from string import Template

from PIL import Image

from data_tools.console import bytes_text, count_text
from data_tools.draw import shuffled
from data_tools.where import Condition
from pivot.batch import CHOSEN, REJECTED
from pivot.data.images import ImageError, decode_rgb
from pivot.data.samples import UNPAIRED, Sample, all_completions, answers_of, message_text
from pivot.data.shards import DamagedSample, ShardSet

THUMBNAIL = 560  # pixels, the longer side; twice what the page shows, for sharp screens
_WORDS = re.compile(r"\s+|\w+|[^\w\s]")


Piece = tuple[str, bool]  # text, whether the other answer lacks it


@dataclass(frozen=True)
class Shown:
    """One sample, ready to be drawn."""

    row: int
    sample: Sample
    images: list[Image.Image]
    sizes: list[int]  # bytes of the files

    def answers(self, clean: Callable[[str], str] = str) -> list[tuple[str, str, list[Piece]]]:
        """(role, heading, pieces of the cleaned text) of each answer; of a pair what the other one lacks is marked."""
        texts = {role: clean(message_text(messages)) for role, messages in all_completions(self.sample).items()}
        if len(texts) == 2:
            both = difference(*texts.values())
            return [(role, role, pieces) for role, pieces in zip(texts, both, strict=True)]
        names = (
            {CHOSEN: "desirable", REJECTED: "undesirable"} if self.sample["kind"] == UNPAIRED else {CHOSEN: "answer"}
        )
        return [(role, names[role], [(text, False)]) for role, text in texts.items()]


def choose(shards: ShardSet, num: int, seed: int, conditions: Sequence[Condition] = ()) -> list[int]:
    """`num` rows that meet the conditions, drawn with `seed`, in the order of the data set."""
    rows: list[int] = []
    for row in shuffled(shards.index["key_hash"], seed).tolist():
        if len(rows) == num:
            break
        if not conditions or all(c.holds(row, s) for s in [shards.read_text(row)] for c in conditions):
            rows.append(row)
    return sorted(rows)


def read_shown(shards: ShardSet, rows: Sequence[int]) -> list[Shown]:
    """A sample that cannot be read is left out: `validate` is there to find such."""
    shown = []
    for row in rows:
        try:
            sample, files = shards.read(row)
            images = [Image.fromarray(decode_rgb(data)) for data in files]
        except (DamagedSample, ImageError):
            continue
        for image in images:
            image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        shown.append(Shown(row, sample, images, [len(data) for data in files]))
    return shown


def difference(left: str, right: str) -> tuple[list[Piece], list[Piece]]:
    """Both texts in pieces. Words are compared; a blank between two words that differ counts as part of them."""
    words = _WORDS.findall(left), _WORDS.findall(right)
    pieces: tuple[list[Piece], list[Piece]] = ([], [])
    matcher = difflib.SequenceMatcher(None, *words, autojunk=False)
    for tag, *ends in matcher.get_opcodes():
        for side, (start, end) in enumerate((ends[:2], ends[2:])):
            if end > start:
                pieces[side].append(("".join(words[side][start:end]), tag != "equal"))
    return _joined(pieces[0]), _joined(pieces[1])


def _joined(pieces: list[Piece]) -> list[Piece]:
    joined: list[Piece] = []
    for number, (text, differs) in enumerate(pieces):
        between = 0 < number < len(pieces) - 1 and not differs and not text.strip()
        differs = differs or between
        if joined and joined[-1][1] == differs:
            joined[-1] = (joined[-1][0] + text, differs)
        else:
            joined.append((text, differs))
    return [part for text, differs in joined for part in (_trimmed(text) if differs else [(text, False)])]


def _trimmed(text: str) -> list[Piece]:
    """Blanks at the ends of what is marked are not marked."""
    if not text.strip():
        return [(text, False)]
    start, end = len(text) - len(text.lstrip()), len(text.rstrip())
    return [piece for piece in ((text[:start], False), (text[start:end], True), (text[end:], False)) if piece[0]]


def to_html(shards: ShardSet, shown: Sequence[Shown], title: str) -> str:
    cards = "\n".join(_card(one) for one in shown)
    facts = [
        f"{len(shards):,} samples",
        f"{int(shards.index['n_images'].sum()):,} images",
        f"{bytes_text(sum(shard.bytes for shard in shards.shards))} in {count_text(len(shards.shards), 'shard')}",
        f"kind {shards.kind}",
        f"{len(shown)} shown",
    ]
    return _PAGE.substitute(
        title=escape(title),
        facts=" · ".join(escape(fact) for fact in facts),
        fingerprint=escape(shards.fingerprint[:16]),
        cards=cards,
    )


def _card(shown: Shown) -> str:
    sample = shown.sample
    pictures = "".join(_picture(shown, number) for number in range(len(shown.images)))
    many = " many" if len(shown.images) > 1 else ""
    tags = [f"row {shown.row}", sample.get("source") or ""]
    tags += [f"answer {' or '.join(accepted)}"] if (accepted := answers_of(sample)) else []
    answers = "".join(_answer(role, heading, pieces) for role, heading, pieces in shown.answers())
    kind = "" if pictures else " class=text"
    return (
        f'<article{kind}><div class="pictures{many}">{pictures}</div><div class="words">'
        f"<header><code>{escape(str(sample.get('id')))}</code>"
        f"{''.join(f'<span>{escape(tag)}</span>' for tag in tags if tag)}</header>"
        f'<div class="prompt">{_prompt(sample)}</div><div class="answers">{answers}</div></div></article>'
    )


def _picture(shown: Shown, number: int) -> str:
    facts = shown.sample["images"][number]
    file = io.BytesIO()
    shown.images[number].save(file, "JPEG", quality=82)
    data = base64.b64encode(file.getvalue()).decode()
    width, height = shown.images[number].size
    words = f"{facts['w']} × {facts['h']} · {bytes_text(shown.sizes[number])}"
    return (
        f'<figure><img src="data:image/jpeg;base64,{data}" width="{width}" height="{height}" loading="lazy" '
        f'alt="image {number} of {escape(str(shown.sample.get("id")), quote=True)}">'
        f'<figcaption title="{escape(str(facts.get("origin") or ""), quote=True)}">{words}</figcaption></figure>'
    )


def _prompt(sample: Sample) -> str:
    messages = []
    for message in sample["prompt"]:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = "".join(
            f"<i>image {part['image']}</i>" if part["type"] == "image" else escape(part["text"]) for part in parts
        )
        role = "" if message["role"] == "user" and len(sample["prompt"]) == 1 else f"<b>{escape(message['role'])}</b>"
        messages.append(f"<p>{role}{text}</p>")
    return "".join(messages)


def _answer(kind: str, label: str, pieces: Sequence[Piece]) -> str:
    text = "".join(f"<mark>{escape(words)}</mark>" if differs else escape(words) for words, differs in pieces)
    count = count_text(len("".join(words for words, _ in pieces).split()), "word")
    return f'<section class="{kind}"><h3>{label}<span>{count}</span></h3><p>{text}</p></section>'


_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark"><title>$title</title><style>
:root { color-scheme: light dark; --page: #f6f5f2; --card: #ffffff; --ink: #1c1e21; --soft: #6b6f76; --line: #e4e2dc;
  --good: #1a7f4b; --good-mark: #c9f0d8; --bad: #b3382c; --bad-mark: #ffd9d2; --tag: #efede8; }
@media (prefers-color-scheme: dark) { :root { --page: #131416; --card: #1c1e21; --ink: #e8e6e1; --soft: #969ba3;
  --line: #2c2f34; --good: #5fce96; --good-mark: #16452d; --bad: #f08a7c; --bad-mark: #57201a; --tag: #282b30; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 78rem; padding: 2.5rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 1.6rem; font-weight: 650; letter-spacing: -0.01em; margin: 0; overflow-wrap: anywhere; }
.facts { color: var(--soft); margin: 0.3rem 0 2rem; }
article { display: grid; grid-template-columns: 17.5rem minmax(0, 1fr); background: var(--card); margin-bottom: 1.25rem;
  border: 1px solid var(--line); border-radius: 12px; overflow: hidden; }
article.text { grid-template-columns: minmax(0, 1fr); } article.text .pictures { display: none; }
.pictures { padding: 1rem 0 1rem 1rem; display: flex; flex-direction: column; gap: 0.75rem; }
.pictures.many { display: grid; grid-template-columns: 1fr 1fr; gap: 0.5rem; align-content: start; }
figure { margin: 0; min-width: 0; }
img { display: block; width: 100%; height: auto; border-radius: 8px; background: var(--tag); }
figcaption { color: var(--soft); font-size: 0.78rem; margin-top: 0.3rem; }
.words { padding: 1rem 1.25rem 1.25rem; min-width: 0; }
header { display: flex; flex-wrap: wrap; gap: 0.35rem; align-items: center; font-size: 0.78rem; color: var(--soft); }
header span, header code { background: var(--tag); border-radius: 6px; padding: 0.1rem 0.45rem;
  overflow-wrap: anywhere; }
code { font: 0.95em ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.prompt p { margin: 0.6rem 0; font-size: 1.05rem; font-weight: 550; white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt b, .prompt i { font: 600 0.7rem/1 system-ui, sans-serif; color: var(--soft); margin-right: 0.5rem; }
.prompt i { border: 1px solid var(--line); border-radius: 5px; padding: 0.1rem 0.35rem; font-weight: 450; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: 1rem; margin-top: 0.9rem; }
section { border-top: 2px solid var(--good); padding-top: 0.5rem; min-width: 0; }
section.rejected { border-color: var(--bad); }
h3 { display: flex; justify-content: space-between; margin: 0 0 0.3rem; font-size: 0.8rem; color: var(--good); }
h3 span { color: var(--soft); font-weight: 400; } .rejected h3 { color: var(--bad); }
section p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
mark { color: inherit; border-radius: 3px; padding: 0.05em 0.1em; background: var(--good-mark);
  box-decoration-break: clone; -webkit-box-decoration-break: clone; }
.rejected mark { background: var(--bad-mark); }
@media (max-width: 46rem) { article { grid-template-columns: minmax(0, 1fr); } .pictures { padding: 1rem 1rem 0; } }
@media print { body { background: none; } article { break-inside: avoid; } }
</style></head><body>
<h1>$title</h1><p class="facts">$facts · <code>$fingerprint</code></p>
$cards
</body></html>
""")
