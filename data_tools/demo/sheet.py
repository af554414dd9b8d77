"""A contact sheet: a dozen scenes, each with one question, its right and its wrong answer. Needs Pillow alone.

python -m data_tools.demo.sheet OUT.png [PRESET] [SEED]
"""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw, ImageFont

from data_tools.demo.questions import SLOTS, Question, ask
from data_tools.demo.scenes import Scene, draw_scene

COLUMNS, ROWS = 4, 3
PICTURE, PADDING, TEXT = 256, 20, 92  # pixels
PAPER, INK, RIGHT, WRONG = (250, 250, 247), (30, 30, 34), (18, 120, 62), (180, 42, 42)


def draw_sheet(preset: str, seed: int) -> Image.Image:
    """COLUMNS x ROWS scenes, their questions' kinds in turn. They are drawn apart from those of any data set."""
    width, height = PICTURE + PADDING, PICTURE + TEXT + PADDING
    sheet = Image.new("RGB", (COLUMNS * width + PADDING, ROWS * height + PADDING), PAPER)
    kinds = list(dict.fromkeys(SLOTS[preset]))
    for number in range(COLUMNS * ROWS):
        random = Random(f"{seed}/sheet/{number}")
        scene, question = _scene_with(random, preset, kinds[number % len(kinds)])
        picture, _ = draw_scene(scene, random)
        left, top = PADDING + number % COLUMNS * width, PADDING + number // COLUMNS * height
        sheet.paste(picture.resize((PICTURE, PICTURE), Image.Resampling.LANCZOS), (left, top))
        _write_text(ImageDraw.Draw(sheet), left, top + PICTURE + 8, question)
    return sheet


def _scene_with(random: Random, preset: str, kind: str) -> tuple[Scene, Question]:
    """A scene that admits a question of this kind, and the question."""
    while True:
        scene = Scene.sample(random, preset)
        for question in ask(scene, random, len(SLOTS[preset])):
            if question.kind == kind:
                return scene, question


def _write_text(pen: ImageDraw.ImageDraw, left: int, top: int, question: Question) -> None:
    font = ImageFont.load_default(16)
    lines = [
        *_wrap(question.text, pen, font),
        ("right:  " + question.right, RIGHT),
        ("wrong:  " + question.wrong, WRONG),
    ]
    for number, (line, colour) in enumerate(lines):
        pen.text((left, top + 21 * number), line, colour, font=font)


def _wrap(text: str, pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if pen.textlength(longer, font=font) > PICTURE:
            lines.append(word)
        else:
            lines[-1] = longer
    return [(line, INK) for line in lines]


def main(arguments: list[str]) -> int:
    path = Path(arguments[0])
    preset, seed = (*arguments[1:], *("positions", "0")[len(arguments) - 1 :])
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(preset, int(seed)).save(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
