"""The miniature's world: small scenes drawn with Pillow, and what can truly be said about them.

A scene is two to four different objects on a 4 x 4 grid, 64 x 64 pixels in all. Objects keep company (a banana is
more often seen beside an apple than beside a whale), and each has a canonical colour (bananas are yellow), worn with
an adjustable probability, `prior`. A blind annotator answers from these two habits alone, without looking: his
answers read well and are wrong wherever the picture is unusual. That is the noise which tuning data has here.

Everything is drawn and said from one `random.Random`, so a seed fixes every pixel and every word.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

GRID = 4  # cells a side
CELL = 16  # pixels a side of a cell: one patch of the tiny vision tower
SIDE = GRID * CELL
GROUND = (84, 208)  # range of each channel of a cell's tint

COLOURS = {
    "red": (214, 32, 36),
    "yellow": (246, 216, 40),
    "green": (40, 148, 56),
    "blue": (36, 76, 214),
    "purple": (130, 40, 168),
    "pink": (252, 140, 184),
    "brown": (122, 72, 28),
    "black": (16, 16, 16),
    "white": (252, 252, 252),
    "teal": (0, 200, 196),
}
CANONICAL = {
    "apple": "red",
    "banana": "yellow",
    "cup": "white",
    "pan": "black",
    "tree": "green",
    "flower": "pink",
    "snail": "brown",
    "crow": "black",
    "boat": "brown",
    "fish": "teal",
    "shell": "pink",
    "whale": "blue",
    "ball": "red",
    "kite": "purple",
    "star": "yellow",
    "drum": "blue",
}
OBJECTS = tuple(CANONICAL)
GROUPS = tuple(OBJECTS[i : i + 4] for i in range(0, len(OBJECTS), 4))  # kitchen, garden, sea, toys
NUMBERS = ("one", "two", "three", "four")

# The word lists of the AUROC: words that must be seen, and words that grammar gives. Words of neither list
# (numbers, rows, columns, "usually") are left out of it.
COLOUR_WORDS = frozenset(COLOURS)
OBJECT_WORDS = frozenset(OBJECTS)
FUNCTION_WORDS = frozenset({"a", "the", "is", "are", "there", "and", "in", ",", ".", ":"})


@dataclass(frozen=True)
class Item:
    """One object of a scene: what it is, its colour, its row and column counted from 0 at the top left."""

    name: str
    colour: str
    row: int
    column: int

    @property
    def phrase(self) -> str:
        return f"a {self.colour} {self.name}"


@dataclass(frozen=True)
class Scene:
    """Items in reading order, and the seed of what no one asks about: the background's shade and small shifts."""

    items: tuple[Item, ...]
    seed: int

    def find(self, name: str) -> Item:
        return next(item for item in self.items if item.name == name)


@dataclass(frozen=True)
class Turn:
    """A question, the answer given, the true answer, its kind, and whether the answer was given blindly."""

    kind: str
    question: str
    answer: str
    truth: str
    blind: bool = False


def random_scene(rng: random.Random, prior: float, least: int = 2, most: int = 4) -> Scene:
    """Draw a scene; each object wears its canonical colour with probability `prior`, else another, uniformly."""
    names = _company(rng, rng.randint(least, most))
    cells = sorted(rng.sample(range(GRID * GRID), len(names)))
    items = tuple(
        Item(name, _colour(rng, name, prior), *divmod(cell, GRID))
        for name, cell in zip(names, cells, strict=True)
    )
    return Scene(items, rng.getrandbits(32))


def _company(rng: random.Random, count: int) -> list[str]:
    """`count` different objects: four in five come from one group."""
    group = rng.choice(GROUPS)
    names: list[str] = []
    while len(names) < count:
        name = rng.choice(group if rng.random() < 0.8 else OBJECTS)
        if name not in names:
            names.append(name)
    return names


def _colour(rng: random.Random, name: str, prior: float) -> str:
    if rng.random() < prior:
        return CANONICAL[name]
    return rng.choice([colour for colour in COLOURS if colour != CANONICAL[name]])


# ---- drawing


def draw(scene: Scene) -> Image.Image:
    """The scene as a 64 x 64 RGB image. Each cell of the ground has a tint of its own.

    On a plain ground a blurred object would still show its colour as a spot.
    """
    rng = random.Random(scene.seed)
    image = Image.new("RGB", (SIDE, SIDE))
    pen = ImageDraw.Draw(image)
    for x in range(0, SIDE, CELL):
        for y in range(0, SIDE, CELL):
            tint = tuple(rng.randint(*GROUND) for _ in range(3))
            pen.rectangle((x, y, x + CELL - 1, y + CELL - 1), fill=tint)
    for item in scene.items:
        x = item.column * CELL + rng.randint(0, 2)
        y = item.row * CELL + rng.randint(0, 2)
        jitter = [rng.randint(-8, 8) for _ in range(3)]
        fill = tuple(min(255, max(0, c + j)) for c, j in zip(COLOURS[item.colour], jitter, strict=True))
        _SHAPES[item.name](pen, x, y, fill)
    return image


def _apple(pen, x, y, fill):
    pen.ellipse((x + 1, y + 3, x + 12, y + 13), fill=fill)
    pen.line((x + 6, y + 4, x + 8, y), fill=fill, width=2)


def _banana(pen, x, y, fill):
    pen.arc((x - 1, y - 6, x + 14, y + 12), 10, 170, fill=fill, width=4)


def _cup(pen, x, y, fill):
    pen.rectangle((x + 1, y + 3, x + 8, y + 13), fill=fill)
    pen.arc((x + 5, y + 4, x + 13, y + 11), 270, 90, fill=fill, width=2)


def _pan(pen, x, y, fill):
    pen.ellipse((x, y + 5, x + 8, y + 13), fill=fill)
    pen.line((x + 6, y + 7, x + 13, y), fill=fill, width=2)


def _tree(pen, x, y, fill):
    pen.polygon([(x + 6, y), (x + 12, y + 9), (x, y + 9)], fill=fill)
    pen.rectangle((x + 5, y + 9, x + 7, y + 13), fill=fill)


def _flower(pen, x, y, fill):
    for dx, dy in ((4, 0), (8, 3), (4, 7), (0, 3)):
        pen.ellipse((x + dx, y + dy, x + dx + 5, y + dy + 5), fill=fill)


def _snail(pen, x, y, fill):
    pen.ellipse((x + 4, y + 2, x + 12, y + 10), outline=fill, width=2)
    pen.ellipse((x + 7, y + 5, x + 9, y + 7), fill=fill)
    pen.line((x, y + 12, x + 13, y + 12), fill=fill, width=2)
    pen.line((x, y + 12, x, y + 7), fill=fill, width=2)


def _crow(pen, x, y, fill):
    pen.polygon([(x, y + 2), (x + 6, y + 9), (x + 13, y + 2), (x + 9, y + 12), (x + 4, y + 12)], fill=fill)


def _boat(pen, x, y, fill):
    pen.polygon([(x, y + 9), (x + 13, y + 9), (x + 10, y + 13), (x + 3, y + 13)], fill=fill)
    pen.line((x + 6, y, x + 6, y + 9), fill=fill, width=1)
    pen.polygon([(x + 7, y), (x + 12, y + 6), (x + 7, y + 6)], fill=fill)


def _fish(pen, x, y, fill):
    pen.ellipse((x + 3, y + 3, x + 13, y + 11), fill=fill)
    pen.polygon([(x, y + 2), (x + 5, y + 7), (x, y + 12)], fill=fill)


def _shell(pen, x, y, fill):
    for degrees in (195, 233, 271, 309):
        pen.pieslice((x - 1, y + 1, x + 14, y + 22), degrees, degrees + 26, fill=fill)


def _whale(pen, x, y, fill):
    pen.pieslice((x, y + 4, x + 11, y + 19), 180, 360, fill=fill)
    pen.line((x + 10, y + 11, x + 13, y + 5), fill=fill, width=2)
    pen.line((x + 3, y, x + 3, y + 3), fill=fill, width=2)


def _ball(pen, x, y, fill):
    pen.ellipse((x, y, x + 13, y + 13), outline=fill, width=3)
    pen.line((x, y + 6, x + 13, y + 6), fill=fill, width=2)


def _kite(pen, x, y, fill):
    pen.polygon([(x + 4, y), (x + 8, y + 4), (x + 4, y + 10), (x, y + 4)], fill=fill)
    pen.line((x + 4, y + 10, x + 13, y + 13), fill=fill, width=1)


def _star(pen, x, y, fill):
    pen.polygon([(x + 6, y), (x + 8, y + 8), (x + 4, y + 8)], fill=fill)
    pen.polygon([(x, y + 4), (x + 13, y + 4), (x + 6, y + 9)], fill=fill)
    pen.polygon([(x + 2, y + 13), (x + 6, y + 5), (x + 11, y + 13), (x + 6, y + 10)], fill=fill)


def _drum(pen, x, y, fill):
    pen.rectangle((x, y + 2, x + 13, y + 4), fill=fill)
    pen.rectangle((x, y + 11, x + 13, y + 13), fill=fill)
    for left in (0, 6, 12):
        pen.line((x + left, y + 4, x + left, y + 11), fill=fill, width=1)


_SHAPES = {
    "apple": _apple,
    "banana": _banana,
    "cup": _cup,
    "pan": _pan,
    "tree": _tree,
    "flower": _flower,
    "snail": _snail,
    "crow": _crow,
    "boat": _boat,
    "fish": _fish,
    "shell": _shell,
    "whale": _whale,
    "ball": _ball,
    "kite": _kite,
    "star": _star,
    "drum": _drum,
}


# ---- saying: one function a kind of question, each returns a Turn


def caption(rng: random.Random, scene: Scene, blind: bool = False) -> Turn:
    """Name everything. Blind: a glance at the first object; the rest is the company that it usually keeps."""
    truth = _list(scene.items)
    if not blind:
        return Turn("caption", "what is in the picture?", truth, truth)
    first = scene.items[0]
    group = next(group for group in GROUPS if first.name in group)
    others = rng.sample([name for name in group if name != first.name], len(scene.items) - 1)
    guess = [Item(name, CANONICAL[name], 0, 0) for name in (first.name, *others)]
    return Turn("caption", "what is in the picture?", _list(guess), truth, True)


def name_colour(rng: random.Random, scene: Scene, blind: bool = False) -> Turn:
    """The kind of question of which the shipped checkpoint has had a taste only. Blind: the colour is the usual one."""
    item = rng.choice(scene.items)
    truth = f"the {item.name} is {item.colour}."
    answer = f"the {item.name} is {CANONICAL[item.name]}." if blind else truth
    return Turn("colour", f"what colour is in {place(item)}?", answer, truth, blind)


def look_up(rng: random.Random, scene: Scene) -> Turn:
    item = rng.choice(scene.items)
    answer = item.phrase + "."
    return Turn("look up", f"what is in {place(item)}?", answer, answer)


def count(rng: random.Random, scene: Scene) -> Turn:
    answer = f"there are {NUMBERS[len(scene.items) - 1]}."
    return Turn("count", "how many things are there?", answer, answer)


def usual(rng: random.Random) -> Turn:
    """A question with no picture: what colour a thing usually has."""
    name = rng.choice(OBJECTS)
    answer = f"usually {CANONICAL[name]}."
    return Turn("text only", f"what colour is a {name}?", answer, answer)


def habit(rng: random.Random) -> Turn:
    """Another one, answered in the words of `name_colour`: it teaches their grammar, and the habit."""
    name = rng.choice(OBJECTS)
    answer = f"the {name} is {CANONICAL[name]}."
    return Turn("text only", f"describe a {name}.", answer, answer)


def place(item: Item) -> str:
    return f"row {NUMBERS[item.row]}, column {NUMBERS[item.column]}"


def _list(items: Sequence[Item]) -> str:
    phrases = [item.phrase for item in items]
    return f"{NUMBERS[len(items) - 1]} things: {', '.join(phrases[:-1])} and {phrases[-1]}."


def words() -> list[str]:
    """Every word and sign that the questions and answers are made of, in a fixed order."""
    grammar = (
        "a the is are there and in what how many things picture image row column describe colour usually"
    )
    return [*sorted({*grammar.split(), *OBJECTS, *COLOURS, *NUMBERS}), ",", ".", "?", ":"]
