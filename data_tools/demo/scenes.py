"""Scenes: a few objects on a three by three grid before a cluttered background, drawn by Pillow alone.

`Scene.sample` decides what is in a scene, `draw_scene` paints it together with its instance mask. Both are functions
of a `random.Random`, whose stream Python keeps the same over its versions.

Two presets. "positions": every object within its own cell. "rich": objects that may overlap, have textures and carry
digits. Colours, shapes, textures, digits and cells are drawn independently and uniformly; questions.py relies on that
for answers that text alone cannot guess.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cache
from random import Random
from typing import Any

from PIL import Image, ImageDraw, ImageFilter, ImageFont

PRESETS = ("positions", "rich")
SIDE = 128  # pixels of a scene
SCALE = 2  # drawn so many times larger, then reduced: smooth edges
GRID = 3
POSITIONS = (
    ("top left", "top", "top right"),
    ("left", "centre", "right"),
    ("bottom left", "bottom", "bottom right"),
)
ALL_POSITIONS = tuple(name for row in POSITIONS for name in row)
COLOURS = {
    "red": (208, 38, 38),
    "orange": (240, 138, 24),
    "yellow": (242, 222, 40),
    "green": (38, 148, 56),
    "blue": (36, 76, 212),
    "purple": (138, 48, 176),
    "white": (246, 246, 246),
    "black": (22, 22, 22),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
NUM_SHAPES = {"positions": 5, "rich": 6}  # the first so many
SIZES = {"small": 0.64, "large": 0.88}  # width as a share of the cell
TEXTURES = ("plain", "striped", "dotted", "checked")
DIGITS = tuple("123456789")
NUM_OBJECTS = (3, 6)  # fewest and most in a scene
NUM_CLUTTER = (14, 26)
DIGIT_RATIO = 0.5  # of the objects of a rich scene

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Object:
    """One thing in a scene; `row` and `column` count from the top left."""

    row: int
    column: int
    colour: str
    shape: str
    size: str
    texture: str = "plain"
    digit: str | None = None

    @property
    def position(self) -> str:
        return POSITIONS[self.row][self.column]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What is in a scene, its objects in raster order; a later one may cover an earlier one."""

    preset: str
    objects: tuple[Object, ...]

    @classmethod
    def sample(cls, random: Random, preset: str) -> Scene:
        cells = sorted(random.sample(range(GRID * GRID), random.randint(*NUM_OBJECTS)))
        return cls(preset, tuple(_sample_object(random, preset, cell) for cell in cells))

    @property
    def labels(self) -> list[dict[str, Any]]:
        """One dict per object; the object number i (from 1) has the value i in the mask."""
        return [{"position": thing.position, **asdict(thing)} for thing in self.objects]


def _sample_object(random: Random, preset: str, cell: int) -> Object:
    plain = Object(
        row=cell // GRID,
        column=cell % GRID,
        colour=random.choice(tuple(COLOURS)),
        shape=random.choice(SHAPES[: NUM_SHAPES[preset]]),
        size=random.choice(tuple(SIZES)),
    )
    if preset == "positions":
        return plain
    digit = random.choice(DIGITS) if random.random() < DIGIT_RATIO else None
    return Object(**asdict(plain) | {"texture": random.choice(TEXTURES), "digit": digit})


def draw_scene(scene: Scene, random: Random) -> tuple[Image.Image, Image.Image]:
    """The picture (RGB) and its mask (one byte a pixel: 0 background, i the i-th object, as far as it is visible)."""
    canvas = _draw_background(random)
    mask = Image.new("L", canvas.size, 0)
    for number, thing in enumerate(scene.objects, start=1):
        outline, inside = _outline(thing, random)
        where = _place(thing, scene.preset, outline.width, random)
        canvas.paste(_fill(thing, inside, random), where, outline)
        mask.paste(number, where, outline.point(_half))
        if thing.digit is not None:
            _write_digit(canvas, thing.digit, where, outline.width)
    small = (SIDE, SIDE)
    return canvas.resize(small, Image.Resampling.BOX), mask.resize(small, Image.Resampling.NEAREST)


def _half(level: int) -> int:
    return 255 if level > 127 else 0


def _draw_background(random: Random) -> Image.Image:
    """Muted and cluttered, so that neither a colour nor an edge alone gives an object away."""
    side = SIDE * SCALE
    canvas = Image.new("RGB", (side, side), _muted(random))
    pen = ImageDraw.Draw(canvas, "RGBA")
    for _ in range(random.randint(*NUM_CLUTTER)):
        x, y, width, height = (random.randrange(side) for _ in range(4))
        fill = (*_muted(random), random.randint(90, 200))
        box = (x - width // 3, y - height // 3, x + width // 3, y + height // 3)
        kind = random.randrange(3)
        if kind == 0:
            pen.ellipse(box, fill)
        elif kind == 1:
            pen.rectangle(box, fill)
        else:
            pen.line(box, fill, width=random.randint(2, 10))
    return canvas.filter(ImageFilter.BoxBlur(1))


def _muted(random: Random) -> Colour:
    grey = random.randint(95, 175)
    red, green, blue = (grey + random.randint(-22, 22) for _ in range(3))
    return red, green, blue


def _place(thing: Object, preset: str, width: int, random: Random) -> tuple[int, int]:
    """Top left corner of the object's square. In the rich world it may reach into the neighbours' cells."""
    cell = SIDE * SCALE / GRID
    room = (cell - width) / 2
    reach = max(room, 0.16 * cell) if preset == "rich" else room
    left, top = (index * cell + room + random.uniform(-reach, reach) for index in (thing.column, thing.row))
    last = SIDE * SCALE - width
    return min(max(0, round(left)), last), min(max(0, round(top)), last)


def _outline(thing: Object, random: Random) -> tuple[Image.Image, Image.Image]:
    """The object's shape in a square, and the same a little smaller, for its rim."""
    width = round(SIDE * SCALE / GRID * SIZES[thing.size] * random.uniform(0.92, 1.08))
    turn = random.uniform(-12, 12)
    return tuple(_draw_shape(thing.shape, width, turn, inset) for inset in (0, SCALE))  # type: ignore[return-value]


def _draw_shape(shape: str, width: int, turn: float, inset: int) -> Image.Image:
    image = Image.new("L", (width, width), 0)
    pen = ImageDraw.Draw(image)
    middle, radius = (width - 1) / 2, width / 2 - 1 - inset
    box = (middle - radius, middle - radius, middle + radius, middle + radius)
    if shape == "circle":
        pen.ellipse(box, 255)
    elif shape == "ring":
        pen.ellipse(box, 255)
        hole = 0.48 * (width / 2 - 1) + inset
        pen.ellipse((middle - hole, middle - hole, middle + hole, middle + hole), 0)
    else:
        corners = _corners(shape, turn)
        pen.polygon([(middle + radius * x, middle + radius * y) for x, y in corners], 255)
    return image


def _corners(shape: str, turn: float) -> list[tuple[float, float]]:
    """The polygon's corners within the unit circle, turned by so many degrees."""
    if shape == "cross":
        arm = 0.34
        quarter = [(arm, -0.94), (arm, -arm), (0.94, -arm)]
        corners = quarter
        for _ in range(3):
            quarter = [(-y, x) for x, y in quarter]
            corners = corners + quarter
    else:
        count, start, inner = {"square": (4, 45, None), "triangle": (3, -90, None), "star": (5, -90, 0.42)}[shape]
        step = 360 / count
        corners = []
        for i in range(count):
            corners.append(_polar(1.0, start + i * step))
            if inner is not None:
                corners.append(_polar(inner, start + (i + 0.5) * step))
    angle = math.radians(turn)
    cos, sin = math.cos(angle), math.sin(angle)
    return [(cos * x - sin * y, sin * x + cos * y) for x, y in corners]


def _polar(radius: float, degrees: float) -> tuple[float, float]:
    angle = math.radians(degrees)
    return radius * math.cos(angle), radius * math.sin(angle)


def _fill(thing: Object, inside: Image.Image, random: Random) -> Image.Image:
    """The object's paint: a rim in a darker shade, the colour, its texture."""
    colour = _shade(COLOURS[thing.colour], random.randint(-12, 12))
    rim = Image.new("RGB", inside.size, _shade(colour, -60))
    paint = Image.new("RGB", inside.size, colour)
    is_light = sum(colour) > 400
    _draw_texture(ImageDraw.Draw(paint), thing.texture, inside.width, _shade(colour, -85 if is_light else 85))
    rim.paste(paint, (0, 0), inside)
    return rim


def _draw_texture(pen: ImageDraw.ImageDraw, texture: str, width: int, ink: Colour) -> None:
    step = width // 5
    for i in range(0, width, step):
        if texture == "striped":
            pen.rectangle((0, i, width, i + step // 2), ink)
        for j in range(0, width, step):
            if texture == "dotted":
                pen.ellipse((j + step // 5, i + step // 5, j + step * 4 // 5, i + step * 4 // 5), ink)
            elif texture == "checked" and (i // step + j // step) % 2:
                pen.rectangle((j, i, j + step, i + step), ink)


def _shade(colour: Colour, change: int) -> Colour:
    red, green, blue = (min(255, max(0, channel + change)) for channel in colour)
    return red, green, blue


def _write_digit(canvas: Image.Image, digit: str, where: tuple[int, int], width: int) -> None:
    middle = (where[0] + width / 2, where[1] + width / 2)
    font = _font(max(24, round(0.5 * width)))
    pen = ImageDraw.Draw(canvas)
    pen.text(middle, digit, (255, 255, 255), font=font, anchor="mm", stroke_width=3, stroke_fill=(16, 16, 16))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
