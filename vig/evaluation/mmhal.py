"""MMHal-Bench: a model's answers in the benchmark's published form. The judge is not part of this package.

The template is a JSON list of records with `FIELDS`; answers go to `model_answer`, and the benchmark's own script gives
them to a judge. Source: Sun et al., "Aligning Large Multimodal Models with Factually Augmented RLHF", 2023;
response_template.json of the data set Shengcao1006/MMHal-Bench.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vig.data.files import check_writable, write_atomically
from vig.data.records import IMAGE_MARK, sample_from_record
from vig.data.sample import DataError, Sample, SampleError
from vig.evaluation.probes.answering import greedy_answers
from vig.scoring.scorer import Scorer

FIELDS = (
    "question_type",
    "question_topic",
    "image_id",
    "image_src",
    "image_content",
    "question",
    "gt_answer",
)
ANSWER = "model_answer"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def read_template(path: str | Path) -> list[dict[str, Any]]:
    """The records of response_template.json. Raises DataError for a file that is none."""
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read ({error}). Give MMHal-Bench's response_template.json"
        ) from None
    if not isinstance(records, list) or not records:
        raise DataError(f"{path} holds no list of records. Give MMHal-Bench's response_template.json")
    for number, record in enumerate(records):
        missing = [name for name in FIELDS if not isinstance(record, dict) or name not in record]
        if missing:
            raise DataError(
                f"record {number} of {path} has no {missing[0]}, expected {', '.join(FIELDS)}. Give MMHal-Bench's "
                "response_template.json"
            )
    return records


def find_image(record: dict[str, Any], root: Path) -> Path | None:
    """The record's picture below `root` or its images/: named like the end of its address, or like its id."""
    names = [str(record["image_src"]).rpartition("/")[2], *(f"{record['image_id']}{end}" for end in SUFFIXES)]
    places = (
        folder / name for folder in (root, root / "images") for name in names if name and "/" not in name
    )
    return next((place for place in places if place.is_file()), None)


def read_questions(path: str | Path, image_root: str | Path | None = None) -> tuple[list[dict], list[Sample]]:
    """The template's records, and a sample of each.

    image_root: folder of the pictures; the template's own, or images/ in it, unless given. Raises DataError that names
    the pictures which are not there: nothing is downloaded.
    """
    records = read_template(path)
    root = Path(image_root) if image_root is not None else Path(path).parent
    images = [find_image(record, root) for record in records]
    missing = [record for record, image in zip(records, images, strict=True) if image is None]
    if missing:
        raise DataError(
            f"{len(missing):,} of {len(records):,} pictures are not in {root}, the first of them "
            f"{missing[0]['image_src']} ({missing[0]['image_id']}). Download them there under the names that their "
            "addresses end in, or give their folder with --image-root"
        )
    samples = []
    for number, (record, image) in enumerate(zip(records, images, strict=True)):
        turns = [("human", f"{IMAGE_MARK}\n{record['question']}"), ("gpt", str(record["gt_answer"]) or "-")]
        conversation = [{"from": role, "value": text} for role, text in turns]
        about = {"id": str(record["image_id"]), "image": image.name, "conversations": conversation}
        key = f"{Path(path).name}#{number}"
        samples.append(
            sample_from_record(about, key=key, image_root=image.parent.absolute(), source=Path(path).name)
        )
    return records, samples


def answered(records: Sequence[dict[str, Any]], answers: Sequence[str]) -> list[dict[str, Any]]:
    """The records in their order, all their fields as they were, with the answers."""
    return [record | {ANSWER: answer} for record, answer in zip(records, answers, strict=True)]


def write_mmhal(
    scorer: Scorer,
    data: str | Path,
    out: str | Path,
    *,
    image_root: str | Path | None = None,
    max_new_tokens: int = 512,
    on_share: Callable[[float], None] | None = None,
) -> list[dict[str, Any]]:
    """Answers every question greedily and writes `out` in the published form, `out`.provenance.json beside it.

    The judge wants all questions answered, so a question that cannot be writes no file: raises DataError.
    """
    out = Path(out)
    check_writable(out.parent)
    records, samples = read_questions(data, image_root)
    answers = greedy_answers(scorer, samples, max_new_tokens, on_share)
    failed = [answer for answer in answers if isinstance(answer, SampleError)]
    if failed:
        raise DataError(f"{len(failed):,} of {len(answers):,} questions could not be answered: {failed[0]}")
    found = answered(records, answers)
    about = scorer.provenance(data, image_root) | {"max_new_tokens": max_new_tokens, "decoding": "greedy"}
    beside = out.with_name(f"{out.name}.provenance.json")
    write_atomically(beside, json.dumps(about, indent=1, default=str).encode() + b"\n")
    write_atomically(out, json.dumps(found, indent=2, ensure_ascii=False).encode() + b"\n")
    return found
