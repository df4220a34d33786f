"""DocVQA: questions about scanned pages, each with several accepted answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vig.data.sample import BrokenRecord
from vig.data.turns import Unusable
from vig.evaluation.figures import Figures, Tally
from vig.evaluation.questions import DataSpec, Question, Record, image_name, read_records, with_prompt
from vig.evaluation.similarity import similarity


def questions(spec: DataSpec) -> Iterator[Question | BrokenRecord]:
    def make(record: Record) -> Question:
        answers = record.get("answers", "answer")
        answers = [answers] if isinstance(answers, str) else answers
        if (
            not isinstance(answers, list | tuple)
            or not answers
            or not all(isinstance(a, str) for a in answers)
        ):
            cure = "Give the accepted ones as a list of texts; the test split has none, and is measured on its server"
            raise Unusable(f"the answers are {answers!r:.60}", cure)
        sample = record.ask(with_prompt(spec.prompt, record.text("question")), record.images("image"))
        return Question(sample, image_name(record.get("image")), {"answers": list(answers)})

    return read_records(spec, make)


def judge(row: Mapping[str, Any], rule: str, spec: DataSpec) -> dict[str, Any]:
    """anls: the similarity to the nearest accepted answer. right: equal to one, but for case and outer white space."""
    parsed = row["prediction"].strip().lower()
    right = parsed in {answer.strip().lower() for answer in row["answers"]}
    return {"parsed": parsed, "anls": similarity(parsed, row["answers"], rule=rule), "right": right}


def tally(rows: Sequence[Mapping[str, Any]]) -> Tally:
    right = np.array([row["right"] for row in rows], float)
    return Tally(
        [row["key"] for row in rows],
        [row["image"] for row in rows],
        {"anls": np.array([row["anls"] for row in rows]), "right": right},
        _figures,
        right=right.astype(bool),
    )


def _figures(sums: Mapping[str, np.ndarray]) -> Figures:
    return {"anls": sums["anls"] / sums["n"], "accuracy": sums["right"] / sums["n"]}
