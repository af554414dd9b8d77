"""Questions about a scene, each with the right answer and a wrong one that only looking can refute; and captions.

The wrong answer is true of something else in the scene, and text alone cannot tell the two apart: given a question,
"a is right and b is wrong" is exactly as probable as "b is right and a is wrong". For that, two different values that
the scene holds are drawn first, then a fair coin says which of them shall be right, then the question is put where it
is. (Asking about a random place and taking some other value as the wrong answer would not do: the more frequent value
of a scene would more often be right.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

from data_tools.demo.scenes import ALL_POSITIONS, NUM_OBJECTS, Object, Scene

CAPTION_REQUEST = "Describe the image."
NOTHING = "nothing"
OPPOSITES = {"left": "right", "right": "left", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Question:
    kind: str  # a key of ASKERS
    text: str
    right: str
    wrong: str


def caption(scene: Scene) -> str:
    """The objects in raster order, each as position, colour, shape: "top left: red circle, centre: blue ring"."""
    return ", ".join(f"{thing.position}: {_describe(thing)}" for thing in scene.objects)


def ask(scene: Scene, random: Random, count: int) -> list[Question]:
    """At most `count` different questions, their kinds drawn from the preset's without replacement."""
    slots = list(SLOTS[scene.preset])
    random.shuffle(slots)
    questions: dict[str, Question] = {}
    for kind in slots:
        question = ASKERS[kind](scene, random)
        if question is not None:
            questions.setdefault(question.text, question)
        if len(questions) == count:
            break
    return list(questions.values())


def _describe(thing: Object) -> str:
    texture = "" if thing.texture == "plain" else f"{thing.texture} "
    return f"{texture}{thing.name}" + (f" with a {thing.digit}" if thing.digit else "")


# -- one function per kind; None where the scene does not admit the question ------------------------------------------


def _ask_colour(scene: Scene, random: Random) -> Question | None:
    return _ask_place(scene.objects, lambda thing: thing.colour, random, "colour", "What colour is the object {where}?")


def _ask_shape(scene: Scene, random: Random) -> Question | None:
    return _ask_place(scene.objects, lambda thing: thing.shape, random, "shape", "What shape is the object {where}?")


def _ask_size(scene: Scene, random: Random) -> Question | None:
    return _ask_place(scene.objects, lambda thing: thing.size, random, "size", "What size is the object {where}?")


def _ask_texture(scene: Scene, random: Random) -> Question | None:
    text = "What texture has the object {where}?"
    return _ask_place(scene.objects, lambda thing: thing.texture, random, "texture", text)


def _ask_digit(scene: Scene, random: Random) -> Question | None:
    marked = [thing for thing in scene.objects if thing.digit]
    return _ask_place(marked, lambda thing: str(thing.digit), random, "digit", "What digit is on the object {where}?")


def _ask_place(
    objects: Iterable[Object], value: Callable[[Object], str], random: Random, kind: str, text: str
) -> Question | None:
    return _ask_value(((value(thing), thing.position) for thing in objects), random, kind, text)


def _ask_existence(scene: Scene, random: Random) -> Question | None:
    """What, if anything, is at a place."""
    names = {thing.position: f"a {thing.name}" for thing in scene.objects}
    contents = ((names.get(position, NOTHING), position) for position in ALL_POSITIONS)
    return _ask_value(contents, random, "existence", "What is {where}?")


def _ask_value(values: Iterable[tuple[str, str]], random: Random, kind: str, text: str) -> Question | None:
    """A question about a place, from (value, position) of all that might be asked about."""
    places: dict[str, list[str]] = {}
    for value, position in values:
        places.setdefault(value, []).append(position)
    if len(places) < 2:
        return None
    right, wrong = random.sample(sorted(places), 2)  # ordered by chance: the fair coin
    return Question(kind, text.format(where=f"at the {random.choice(places[right])}"), right, wrong)


def _ask_position(scene: Scene, random: Random) -> Question | None:
    """Where an object is that there is only one of; wrong is where another one is."""
    thing = _choose_unique(scene, random)
    if thing is None:
        return None
    other = random.choice([other for other in scene.objects if other is not thing])
    return Question("position", f"Where is the {thing.name}?", thing.position, other.position)


def _choose_unique(scene: Scene, random: Random) -> Object | None:
    names = [thing.name for thing in scene.objects]
    unique = [thing for thing in scene.objects if names.count(thing.name) == 1]
    return random.choice(unique) if unique else None


def _ask_count(scene: Scene, random: Random) -> Question | None:
    """How many objects there are: every number is as frequent, and every other number as often the wrong answer."""
    right = len(scene.objects)
    wrong = random.choice([number for number in range(NUM_OBJECTS[0], NUM_OBJECTS[1] + 1) if number != right])
    return Question("count", "How many objects are there?", str(right), str(wrong))


def _ask_colour_count(scene: Scene, random: Random) -> Question | None:
    colours = [thing.colour for thing in scene.objects]
    numbers: dict[int, list[str]] = {}
    for colour in sorted(set(colours)):
        numbers.setdefault(colours.count(colour), []).append(colour)
    if len(numbers) < 2:
        return None
    right, wrong = random.sample(sorted(numbers), 2)
    text = f"How many {random.choice(numbers[right])} objects are there?"
    return Question("colour count", text, str(right), str(wrong))


def _ask_presence(scene: Scene, random: Random) -> Question | None:
    """Is there such an object? If not, its colour and its shape are those of two others."""
    there = sorted({thing.name for thing in scene.objects})
    colours, shapes = ({getattr(thing, field) for thing in scene.objects} for field in ("colour", "shape"))
    absent = sorted({f"{colour} {shape}" for colour in colours for shape in shapes} - set(there))
    if not absent:
        return None
    right, wrong = random.sample(["yes", "no"], 2)
    return Question("presence", f"Is there a {random.choice(there if right == 'yes' else absent)}?", right, wrong)


def _ask_relation(scene: Scene, random: Random) -> Question | None:
    """Where one object is, seen from another in the same row or column; wrong is the opposite."""
    names = [thing.name for thing in scene.objects]
    unique = [thing for thing in scene.objects if names.count(thing.name) == 1]
    pairs = [(a, b) for a in unique for b in unique if a is not b and (a.row == b.row or a.column == b.column)]
    if not pairs:
        return None
    thing, seen_from = random.choice(pairs)
    if thing.row == seen_from.row:
        right = "left" if thing.column < seen_from.column else "right"
    else:
        right = "above" if thing.row < seen_from.row else "below"
    text = f"Where is the {thing.name}, seen from the {seen_from.name}?"
    return Question("relation", text, right, OPPOSITES[right])


ASKERS: dict[str, Callable[[Scene, Random], Question | None]] = {
    "colour": _ask_colour,
    "shape": _ask_shape,
    "position": _ask_position,
    "existence": _ask_existence,
    "count": _ask_count,
    "size": _ask_size,
    "texture": _ask_texture,
    "digit": _ask_digit,
    "colour count": _ask_colour_count,
    "presence": _ask_presence,
    "relation": _ask_relation,
}
# A kind that stands here twice is asked twice as often.
SLOTS: dict[str, tuple[str, ...]] = {
    "positions": ("colour", "colour", "shape", "shape", "existence", "count"),
    "rich": tuple(ASKERS),
}
