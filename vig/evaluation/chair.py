"""CHAIR: captions against what COCO's annotations say is in the image."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from vig.data.image_sources import image_source
from vig.data.sample import BrokenRecord, DataError, Sample, SampleError
from vig.evaluation.coco_objects import Synonyms, synonyms_of
from vig.evaluation.figures import Figures, Tally
from vig.evaluation.pairs import ratio
from vig.evaluation.questions import PLACEHOLDER, DataSpec, Question


def questions(spec: DataSpec) -> Iterator[Question | BrokenRecord]:
    """One caption an image of the instances file, in its order.

    What an image holds is what its instances are, and what its reference captions mention. Raises DataError for files
    that are none of COCO's, and for categories that the synonyms do not know.
    """
    instances = instances_file(spec.source.path)
    content = _read(instances, "images", "annotations", "categories")
    synonyms = synonyms_of(spec.synonyms)
    objects = _instances(content, synonyms, instances)
    captions = spec.captions or _captions_beside(instances)
    for annotation in _read(captions, "annotations")["annotations"]:
        if annotation.get("image_id") in objects:
            objects[annotation["image_id"]].update(synonyms.mentioned(str(annotation.get("caption", ""))))
    root = str((spec.image_root or instances.parent).absolute())
    for image in islice(content["images"], spec.limit):
        yield _question(image, objects, instances.name, root, spec.prompt)


def _question(
    image: Mapping[str, Any], objects: Mapping[Any, set[str]], source: str, root: str, prompt: str
) -> Question | BrokenRecord:
    id = str(image["id"])
    key = f"{source}#{id}"
    try:
        picture = image_source(image.get("file_name"), root, key, id)
    except SampleError as error:
        return BrokenRecord(key, id, source, error)
    asked = [{"type": "image"}, {"type": "text", "text": prompt}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": PLACEHOLDER}]}
    sample = Sample(key, id, (picture,), ({"role": "user", "content": asked}, answer), source)
    return Question(sample, id, {"objects": sorted(objects[image["id"]])})


def instances_file(path: Path) -> Path:
    """The instances_*.json that was given, or the only one of a folder. Raises DataError."""
    if not path.is_dir():
        return path
    found = sorted(path.rglob("instances_*.json"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise DataError(f"{path}: expected one instances_*.json, found {names}. Give the file itself")
    return found[0]


def _captions_beside(instances: Path) -> Path:
    beside = instances.with_name(instances.name.replace("instances", "captions", 1))
    if beside == instances or not beside.is_file():
        cure = "Give it with --captions: what the reference captions mention is in the image too"
        raise DataError(f"no captions file at {beside}. {cure}")
    return beside


def _read(path: Path, *fields: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}). Give COCO's annotation file") from None
    missing = [
        name for name in fields if not isinstance(content, dict) or not isinstance(content.get(name), list)
    ]
    if missing:
        raise DataError(f"{path} has no list {missing[0]!r}. Give COCO's annotation file, as it is published")
    return content


def _instances(content: Mapping[str, Any], synonyms: Synonyms, path: Path) -> dict[Any, set[str]]:
    """image id -> its categories, as the synonyms call them."""
    names = {one["id"]: str(one["name"]).lower() for one in content["categories"]}
    unknown = [name for name in names.values() if name not in synonyms.category]
    if unknown:
        raise DataError(
            f"{synonyms.path} does not know {len(unknown)} categories of {path.name}: {', '.join(unknown[:5])}. "
            "Write a line for each"
        )
    objects: dict[Any, set[str]] = {image["id"]: set() for image in content["images"]}
    for annotation in content["annotations"]:
        if annotation["image_id"] in objects:
            objects[annotation["image_id"]].add(synonyms.category[names[annotation["category_id"]]])
    return objects


def judge(row: Mapping[str, Any], rule: str, spec: DataSpec) -> dict[str, Any]:
    """parsed: the objects mentioned, each mention once. right: whether all of them are there."""
    mentioned = synonyms_of(spec.synonyms).mentioned(row["prediction"])
    wrong = [name for name in mentioned if name not in row["objects"]]
    return {"parsed": mentioned, "hallucinated": wrong, "right": not wrong}


def tally(rows: Sequence[Mapping[str, Any]]) -> Tally:
    def column(of) -> np.ndarray:
        return np.array([of(row) for row in rows], float)

    return Tally(
        [row["key"] for row in rows],
        [row["image"] for row in rows],
        {
            "mentions": column(lambda row: len(row["parsed"])),
            "wrong": column(lambda row: len(row["hallucinated"])),
            "bad": column(lambda row: bool(row["hallucinated"])),
            "covered": column(lambda row: len(set(row["parsed"]) & set(row["objects"]))),
            "present": column(lambda row: len(row["objects"])),
            "words": column(lambda row: len(re.findall(r"\w+", row["prediction"]))),
        },
        _figures,
        right=np.array([row["right"] for row in rows]),
    )


def _figures(sums: Mapping[str, np.ndarray]) -> Figures:
    """CHAIR_i, CHAIR_s (`vig.evaluation.hallucination`), the share of what is there that is mentioned, words."""
    return {
        "chair_i": ratio(sums["wrong"], sums["mentions"]),
        "chair_s": sums["bad"] / sums["n"],
        "recall": ratio(sums["covered"], sums["present"]),
        "length": sums["words"] / sums["n"],
    }
