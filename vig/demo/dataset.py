"""Scenes on disk: PNG files, a LLaVA JSON that names them, and beside it the ground truth.

folder/tune.json      what a user would tune on: captions and questions, some answered blindly, some text-only
folder/test.json      "what colour is in row ...?" where nothing has its canonical colour, true answers
folder/triples.json   one question and answer with three pictures: matching, partly matching, conflicting
folder/images/*.png   the pictures, 64 x 64
folder/*.truth.json   by id: kind, blind or not, the true answer, the scene's items
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from vig.demo import scenes
from vig.demo.scenes import Item, Scene, Turn

SAMPLES, DATA_SEED = 1200, 0  # of the tuning data that the demo draws
BLIND = 0.5  # share of colours and captions of the tuning data that are answered without looking
PRIOR = 0.6  # how often an object of the tuning data wears its canonical colour
MIX = {"colour": 42, "caption": 22, "look up": 12, "count": 4, "text only": 20}  # per cent
MATCHES = ("match", "partly", "conflict")


@dataclass(frozen=True)
class Record:
    """One sample: its id, the picture (None: text only), the turn, and what kind of match a triple's picture is."""

    id: str
    scene: Scene | None
    turn: Turn
    match: str | None = None

    def as_llava(self) -> dict:
        question = self.turn.question if self.scene is None else f"<image>\n{self.turn.question}"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": self.turn.answer}]
        picture = {} if self.scene is None else {"image": f"images/{self.id}.png"}
        return {"id": self.id, **picture, "conversations": turns}

    def as_truth(self) -> dict:
        turn = asdict(self.turn)
        items = [] if self.scene is None else [asdict(item) for item in self.scene.items]
        return {key: turn[key] for key in ("kind", "blind", "truth")} | {"match": self.match, "items": items}


def tuning_records(count: int, seed: int, blind: float = BLIND, prior: float = PRIOR) -> list[Record]:
    """The tuning data: `MIX` of kinds, a share of it answered by habit."""
    rng = random.Random(f"tune {seed}")
    kinds = rng.choices(list(MIX), list(MIX.values()), k=count)
    return [_tuning_record(rng, f"tune-{i:05d}", kind, blind, prior) for i, kind in enumerate(kinds)]


def _tuning_record(rng: random.Random, id: str, kind: str, blind: float, prior: float) -> Record:
    if kind == "text only":
        return Record(id, None, scenes.habit(rng))
    scene = scenes.random_scene(rng, prior)
    if kind in ("colour", "caption"):
        ask = scenes.name_colour if kind == "colour" else scenes.caption
        return Record(id, scene, ask(rng, scene, rng.random() < blind))
    return Record(id, scene, scenes.look_up(rng, scene) if kind == "look up" else scenes.count(rng, scene))


def test_records(count: int, seed: int) -> list[Record]:
    """The anti-prior test: no object has its canonical colour, so habit is always wrong."""
    rng = random.Random(f"test {seed}")
    drawn = [scenes.random_scene(rng, prior=0.0) for _ in range(count)]
    return [Record(f"test-{i:05d}", scene, scenes.name_colour(rng, scene)) for i, scene in enumerate(drawn)]


def triple_records(count: int, seed: int) -> list[Record]:
    """`count` captions, each with three pictures.

    Partly matching: every second item is swapped for another object in another colour. Conflicting: every item is.
    """
    rng = random.Random(f"triples {seed}")
    records = []
    for i in range(count):
        scene = scenes.random_scene(rng, prior=0.5)
        turn = scenes.caption(rng, scene)
        half = set(rng.sample(range(len(scene.items)), len(scene.items) // 2))
        pictures = (scene, _swap(rng, scene, half), _swap(rng, scene, set(range(len(scene.items)))))
        for match, picture in zip(MATCHES, pictures, strict=True):
            records.append(Record(f"triple-{i:04d}-{match}", picture, turn, match))
    return records


def _swap(rng: random.Random, scene: Scene, which: set[int]) -> Scene:
    """The scene with some items replaced in place by objects and colours that the scene has not."""
    names = rng.sample(sorted(set(scenes.OBJECTS) - {item.name for item in scene.items}), len(which))
    colours = rng.sample(sorted(set(scenes.COLOURS) - {item.colour for item in scene.items}), len(which))
    swaps = {index: (names.pop(), colours.pop()) for index in sorted(which)}
    items: list[Item] = []
    for index, item in enumerate(scene.items):
        name, colour = swaps.get(index, (item.name, item.colour))
        items.append(replace(item, name=name, colour=colour))
    return Scene(tuple(items), rng.getrandbits(32))


def write_records(folder: Path, name: str, records: Iterable[Record]) -> Path:
    """Write folder/NAME.json, folder/NAME.truth.json and the pictures; returns the path of the JSON."""
    records = list(records)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for record in records:
        if record.scene is not None:
            scenes.draw(record.scene).save(folder / "images" / f"{record.id}.png")
    data = folder / f"{name}.json"
    data.write_text(json.dumps([record.as_llava() for record in records], indent=1) + "\n", encoding="utf-8")
    truth = {record.id: record.as_truth() for record in records}
    (folder / f"{name}.truth.json").write_text(json.dumps(truth, indent=1) + "\n", encoding="utf-8")
    return data


def read_truth(data: Path) -> dict[str, dict]:
    """The ground truth that `write_records` put beside a data file, by id."""
    return json.loads(data.with_suffix(".truth.json").read_text(encoding="utf-8"))
