"""Benchmarks in their published forms, made small from the demo's scenes: one writer a task, for tests."""

from __future__ import annotations

import base64
import csv
import json
import random
from collections.abc import Callable
from pathlib import Path

from vig.demo import scenes
from vig.demo.arms import CHECKPOINT

__all__ = ["CHECKPOINT", "WRITERS", "pictures"]

SPLITS = ("random", "popular", "adversarial")


def pictures(folder: Path, count: int) -> list[scenes.Scene]:
    """Scenes drawn to folder/0.png, folder/1.png, ..."""
    rng = random.Random("benchmark")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [scenes.random_scene(rng, 0.5) for _ in range(count)]
    for number, scene in enumerate(drawn):
        scenes.draw(scene).save(folder / f"{number}.png")
    return drawn


def pope(folder: Path, count: int = 4) -> tuple[Path, list[str]]:
    """coco_pope_{split}.json, a JSON object a line, and the folder of its images."""
    rng = random.Random("pope")
    drawn = pictures(folder / "val2014", count)
    (folder / "output").mkdir()
    for split in SPLITS:
        lines = []
        for number, scene in enumerate(drawn):
            present = [item.name for item in scene.items]
            absent = rng.choice([name for name in scenes.OBJECTS if name not in present])
            for name, label in ((present[0], "yes"), (absent, "no")):
                text = f"Is there a {name} in the image?"
                line = {"question_id": len(lines) + 1, "image": f"{number}.png", "text": text, "label": label}
                lines.append(json.dumps(line))
        (folder / "output" / f"coco_pope_{split}.json").write_text("\n".join(lines) + "\n")
    return folder / "output", ["--image-root", str(folder / "val2014")]


def exact(folder: Path, count: int = 4) -> tuple[Path, list[str]]:
    """LLaVA JSON: what colour is the ...?"""
    rng = random.Random("exact")
    drawn = pictures(folder, count)
    records = []
    for number, scene in enumerate(drawn):
        turn = scenes.name_colour(rng, scene)
        asked = {"from": "human", "value": f"<image>\n{turn.question}"}
        answer = {"from": "gpt", "value": turn.truth}
        records.append({"id": str(number), "image": f"{number}.png", "conversations": [asked, answer]})
    (folder / "test.json").write_text(json.dumps(records))
    return folder / "test.json", []


def chair(folder: Path, count: int = 4) -> tuple[Path, list[str]]:
    """COCO's annotations: instances_val2014.json, captions_val2014.json; synonyms.txt."""
    rng = random.Random("chair")
    drawn = pictures(folder / "val2014", count)
    ids = {name: number for number, name in enumerate(scenes.OBJECTS, 1)}
    notes = folder / "annotations"
    notes.mkdir()
    images = [{"id": 100 + number, "file_name": f"{number}.png"} for number in range(count)]
    objects = [
        {"id": 10 * number + place, "image_id": 100 + number, "category_id": ids[item.name]}
        for number, scene in enumerate(drawn)
        for place, item in enumerate(scene.items[1:])
    ]  # the first object of each scene is in its captions alone
    categories = [{"id": id, "name": name, "supercategory": "thing"} for name, id in ids.items()]
    instances = {"info": {}, "images": images, "annotations": objects, "categories": categories}
    (notes / "instances_val2014.json").write_text(json.dumps(instances))
    captions = [
        {"id": number, "image_id": 100 + number, "caption": scenes.caption(rng, scene).truth}
        for number, scene in enumerate(drawn)
    ]
    (notes / "captions_val2014.json").write_text(json.dumps({"images": images, "annotations": captions}))
    (folder / "synonyms.txt").write_text("".join(f"{name}, tiny {name}\n" for name in scenes.OBJECTS))
    options = ["--image-root", folder / "val2014", "--synonyms", folder / "synonyms.txt"]
    return notes, [*map(str, options), "--max-new-tokens", "40", "--prompt", "describe the image ."]


def docvqa(folder: Path, count: int = 4) -> tuple[Path, list[str]]:
    """val_v1.0_withQT.json, as the RRC gives it out, and the pages in documents/."""
    rng = random.Random("docvqa")
    drawn = pictures(folder / "documents", count)
    data = []
    for number, scene in enumerate(drawn):
        turn = scenes.name_colour(rng, scene)
        data.append(
            {
                "questionId": 300 + number, "question": turn.question, "question_types": ["layout"],
                "image": f"documents/{number}.png", "docId": number, "ucsf_document_id": f"u{number}",
                "ucsf_document_page_no": "1", "answers": [turn.truth, turn.truth.upper()], "data_split": "val",
            }
        )  # fmt: skip
    whole = {"dataset_name": "SP-DocVQA", "dataset_version": "1.0", "dataset_split": "val", "data": data}
    (folder / "val_v1.0_withQT.json").write_text(json.dumps(whole))
    return folder / "val_v1.0_withQT.json", []


def mmbench(folder: Path, count: int = 4) -> tuple[Path, list[str]]:
    """A TSV with the pictures in base64; the last question has no hint and three options."""
    rng = random.Random("mmbench")
    drawn = pictures(folder, count)
    names = [
        "index",
        "question",
        "hint",
        "A",
        "B",
        "C",
        "D",
        "answer",
        "category",
        "image",
        "l2-category",
        "split",
    ]
    with (folder / "mmbench_dev.tsv").open("w", newline="") as file:
        table = csv.DictWriter(file, names, delimiter="\t")
        table.writeheader()
        for number, scene in enumerate(drawn):
            item = scene.items[0]
            options = rng.sample([colour for colour in scenes.COLOURS if colour != item.colour], 3)
            options = options[: 2 if number == count - 1 else 3]
            place = rng.randrange(len(options) + 1)
            options.insert(place, item.colour)
            image = base64.b64encode((folder / f"{number}.png").read_bytes()).decode()
            row = dict(zip("ABCD", options, strict=False))
            row |= {"index": number, "question": f"what colour is the {item.name} ?", "answer": "ABCD"[place]}
            row |= {"image": image, "category": ("colour", "object")[number % 2], "split": "dev"}
            table.writerow(row if number == count - 1 else row | {"hint": "there are things"})
    return folder / "mmbench_dev.tsv", []


def cv_bench(folder: Path, count: int = 6) -> Path:
    """test.parquet: pictures as bytes, choices as a list, answers as (A)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    drawn = pictures(folder / "pictures", count)
    sources = (("2D", "Count", "ADE20K"), ("2D", "Relation", "COCO"), ("3D", "Depth", "Omni3D"))
    rows = []
    for number, scene in enumerate(drawn):
        kind, task, source = sources[number % 3]
        image = {"bytes": (folder / "pictures" / f"{number}.png").read_bytes(), "path": None}
        right = scenes.NUMBERS[len(scene.items) - 1]
        choices = sorted({right, "one", "two", "three"})
        row = {
            "idx": number,
            "type": kind,
            "task": task,
            "image": image,
            "question": "how many things are there ?",
        }
        answer = f"({'ABCD'[choices.index(right)]})"
        rows.append(row | {"choices": choices, "answer": answer, "source": source, "source_filename": "x"})
    pq.write_table(pa.Table.from_pylist(rows), folder / "test.parquet")
    return folder / "test.parquet"


WRITERS: dict[str, Callable[..., tuple[Path, list[str]]]] = {
    "pope": pope,
    "chair": chair,
    "docvqa": docvqa,
    "choice": mmbench,
    "exact": exact,
}  # task -> f(folder) -> its data, further options of the command
