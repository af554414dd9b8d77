"""The contact sheet of `preview`: samples as cards on one picture, for a paper or where there is no browser."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from data_tools.preview import Piece, Shown
from pivot.batch import REJECTED
from pivot.data.samples import Sample

CARD_WIDTH, PICTURE, GAP, MARGIN = 1040, 300, 24, 40
LINES = 9  # of an answer; what is longer ends with an ellipsis
PROMPT_LINES = 3
SHARED = 360  # letters that both answers may start with before they are cut
_PLAIN = str.maketrans({"–": "-", "—": "-", "‘": "'", "’": "'", "“": '"', "”": '"', "•": "-", "…": "..."})

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Colours:
    page: str
    card: str
    line: str
    ink: str
    soft: str
    good: str
    good_mark: str
    bad: str
    bad_mark: str


LIGHT = Colours("#f6f5f2", "#ffffff", "#e4e2dc", "#1c1e21", "#6b6f76", "#1a7f4b", "#c9f0d8", "#b3382c", "#ffd9d2")
DARK = Colours("#131416", "#1c1e21", "#2c2f34", "#e8e6e1", "#969ba3", "#5fce96", "#16452d", "#f08a7c", "#57201a")


class Fonts:
    """A font of this machine that knows many scripts, in the sizes that are used; where there is none, Pillow's own."""

    def __init__(self) -> None:
        self.title, self.prompt, self.text, self.small = (_load_font(size) for size in (29, 19, 16, 13))


def _load_font(size: int) -> Font:
    for name in ("NotoSans-Regular.ttf", "DejaVuSans.ttf", "LiberationSans-Regular.ttf", "Arial.ttf"):
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def draw_sheet(shown: Sequence[Shown], title: str, *, columns: int = 2, dark: bool = False) -> Image.Image:
    """The samples in rows of `columns` cards, each row as high as its highest card."""
    colours, fonts = DARK if dark else LIGHT, Fonts()
    cards = [_draw_card(one, colours, fonts) for one in shown]
    columns = min(columns, max(1, len(cards)))
    rows = [cards[start : start + columns] for start in range(0, len(cards), columns)]
    heights = [max(card.height for card in row) for row in rows]
    width = 2 * MARGIN + columns * CARD_WIDTH + (columns - 1) * GAP
    top = MARGIN + 60
    sheet = Image.new("RGB", (width, top + sum(heights) + GAP * max(0, len(rows) - 1) + MARGIN), colours.page)
    ImageDraw.Draw(sheet).text((MARGIN, MARGIN), _printable(title), colours.ink, fonts.title)
    for row, height in zip(rows, heights, strict=True):
        for column, card in enumerate(row):
            place = (MARGIN + column * (CARD_WIDTH + GAP), top)
            draw = ImageDraw.Draw(sheet)
            box = (*place, place[0] + CARD_WIDTH - 1, place[1] + height - 1)
            draw.rounded_rectangle(box, 14, colours.card, colours.line)
            sheet.paste(card.crop((8, 8, CARD_WIDTH - 8, card.height - 8)), (place[0] + 8, place[1] + 8))
        top += height + GAP
    return sheet


def _draw_card(shown: Shown, colours: Colours, fonts: Fonts) -> Image.Image:
    """One sample on a card of its own height."""
    canvas = Image.new("RGB", (CARD_WIDTH, 4000), colours.card)
    draw = ImageDraw.Draw(canvas)
    bottom = _paste_pictures(canvas, shown, colours)
    left = GAP + (PICTURE + GAP if shown.images else 0)
    pen = _Pen(draw, left, CARD_WIDTH - GAP, GAP)
    pen.write(
        [(_printable(f"{shown.sample.get('id')}   {shown.sample.get('source') or ''}"), False)],
        fonts.small,
        colours.soft,
        1,
    )
    pen.skip(6)
    pen.write([(_printable(_question(shown.sample)), False)], fonts.prompt, colours.ink, PROMPT_LINES)
    for role, heading, pieces in shown.answers(_printable):
        colour, mark = (colours.bad, colours.bad_mark) if role == REJECTED else (colours.good, colours.good_mark)
        _write_answer(pen, heading, _from_difference(pieces), colour, mark, colours, fonts)
    return canvas.crop((0, 0, CARD_WIDTH, max(bottom, pen.y) + GAP))


def _paste_pictures(canvas: Image.Image, shown: Shown, colours: Colours) -> int:
    """Up to four pictures in the left column; the place where they end."""
    y = GAP
    side = PICTURE if len(shown.images) == 1 else PICTURE // 2 - 4
    for number, image in enumerate(shown.images[:4]):
        small = _fit(image, side)
        if len(shown.images) == 1:
            canvas.paste(small, (GAP, y))
            return y + small.height
        canvas.paste(small, (GAP + (number % 2) * (side + 8), y + (number // 2) * (side + 8)))
    rows = -(-min(len(shown.images), 4) // 2)
    return y + rows * (side + 8) if shown.images else 0


def _fit(image: Image.Image, side: int) -> Image.Image:
    """Not larger than the side; a small one enlarged by a whole number, so that its pixels stay what they are."""
    times = side // max(image.size)
    if times > 1:
        return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return small


def _write_answer(
    pen: _Pen, label: str, pieces: Sequence[Piece], colour: str, mark: str, colours: Colours, fonts: Fonts
) -> None:
    pen.skip(12)
    pen.rule(colour)
    pen.skip(6)
    pen.write([(label, False)], fonts.small, colour, 1)
    pen.write(pieces, fonts.text, colours.ink, LINES, mark)


class _Pen:
    """Writes words from left to right between two edges, and marks the background of some."""

    def __init__(self, draw: ImageDraw.ImageDraw, left: int, right: int, y: int) -> None:
        self._draw, self._left, self._right, self.y = draw, left, right, y

    def skip(self, pixels: int) -> None:
        self.y += pixels

    def rule(self, colour: str) -> None:
        self._draw.rectangle((self._left, self.y, self._right, self.y + 1), colour)
        self.y += 2

    def write(self, pieces: Sequence[Piece], font: Font, ink: str, lines: int, mark: str = "") -> None:
        height = round(1.45 * getattr(font, "size", 16))
        x, line = self._left, 1
        for word, differs in _tokens(pieces):
            if word == "\n":
                if x == self._left and line == 1:
                    continue
                x, line = self._left, line + 1
                self.y += height
            else:
                width = round(font.getlength(word))
                if x + width > self._right and x > self._left:
                    x, line = self._left, line + 1
                    self.y += height
                    if word.isspace():
                        continue
                if line <= lines:
                    if differs and mark:
                        self._draw.rectangle((x, self.y, x + width, self.y + height - 3), mark)
                    self._draw.text((x, self.y), word, ink, font)
                x += width
            if line > lines:
                self._draw.text((self._right - 14, self.y - height), "...", ink, font)
                return
        self.y += height


def _tokens(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """Words, blanks and line breaks; what no line could hold is cut."""
    for text, differs in pieces:
        for number, line in enumerate(text.split("\n")):
            if number:
                yield "\n", False
            for place, word in enumerate(line.split(" ")):
                if place:
                    yield " ", differs
                for start in range(0, len(word), 40):
                    yield word[start : start + 40], differs


def _from_difference(pieces: Sequence[Piece]) -> Sequence[Piece]:
    """Without most of a long beginning that both answers share: the sheet has room for a few lines."""
    if len(pieces) > 1 and not pieces[0][1] and len(pieces[0][0]) > SHARED:
        words = pieces[0][0][-SHARED // 3 :].partition(" ")[2]
        return [("... " + words, False), *pieces[1:]]
    return pieces


def _question(sample: Sample) -> str:
    """The last message of the prompt, with a number where an image is shown; for one image without it."""
    content = sample["prompt"][-1]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    several = len(sample["images"]) > 1
    marks = (f"[{part['image']}] " if part["type"] == "image" and several else part.get("text", "") for part in parts)
    return "".join(marks)


def _printable(text: str) -> str:
    """What can be drawn, on fewer lines: a fallback font knows little besides Latin."""
    text = re.sub(r"\s*\n\s*", "\n", text.translate(_PLAIN).strip())
    return "".join(letter if letter.isprintable() or letter == "\n" else " " for letter in text)
