"""POPE: files, answers, figures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vig.data.sample import BrokenRecord
from vig.data.turns import Unusable
from vig.evaluation.figures import Figures, Tally, mean_of_groups
from vig.evaluation.questions import DataSpec, Question, Record, image_name, read_records, with_prompt
from vig.evaluation.yes_no import names_one, said, shares

SPLITS = ("random", "popular", "adversarial")
SPLIT = re.compile("|".join(SPLITS), re.IGNORECASE)


def questions(spec: DataSpec) -> Iterator[Question | BrokenRecord]:
    """A question about one object and one image; its split is a field, or stands in the file's name."""

    def make(record: Record) -> Question:
        text, label = record.text("text", "question"), record.text("label", "answer").lower()
        if label not in ("yes", "no"):
            raise Unusable(f"the label is {label!r}", "Write yes or no")
        named = SPLIT.search(str(record.get("category", "split", default=record.source)))
        truth = {"label": label, "split": named[0].lower() if named else ""}
        given = record.get("image")
        sample = record.ask(with_prompt(spec.prompt, text), record.images("image"))
        return Question(sample, str(record.get("image_source", default=image_name(given))), truth)

    return read_records(spec, make)


def judge(row: Mapping[str, Any], rule: str, spec: DataSpec) -> dict[str, Any]:
    """parsed: yes, no, or None. abstained: whether the answer says neither, whatever the rule makes of it."""
    parsed = said(row["prediction"], rule)
    return {"parsed": parsed, "right": parsed == row["label"], "abstained": not names_one(row["prediction"])}


def tally(rows: Sequence[Mapping[str, Any]]) -> Tally:
    yes = np.array([row["parsed"] == "yes" for row in rows], float)
    positive = np.array([row["label"] == "yes" for row in rows], float)
    right = np.array([row["right"] for row in rows], float)
    splits = [(row["split"],) for row in rows]
    order = [name for name in SPLITS if (name,) in splits]
    return Tally(
        [row["key"] for row in rows],
        [row["image"] for row in rows],
        {"right": right, "yes": yes, "positive": positive, "hit": yes * positive},
        _figures,
        right=right.astype(bool),
        groups=splits,
        order=order,
        combine=mean_of_groups if len(order) > 1 else None,
        overall=len(order) != 1 and ("",) in splits,
    )


def _figures(sums: Mapping[str, np.ndarray]) -> Figures:
    return shares(sums["n"], sums["right"], sums["hit"], sums["yes"], sums["positive"])._asdict()
