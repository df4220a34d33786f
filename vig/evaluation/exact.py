"""Answers equal to the data's own, for any data that `vig score` reads."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vig.data.locate import locate
from vig.data.sample import BrokenRecord, Sample, SampleError, is_answer, text_of
from vig.data.samples import read_samples
from vig.evaluation.figures import Tally, accuracy
from vig.evaluation.questions import PLACEHOLDER, DataSpec, Question, image_name, with_prompt
from vig.evaluation.similarity import plain


def questions(spec: DataSpec) -> Iterator[Question | BrokenRecord]:
    """Asks for a conversation's last answer; the turns before it are as the data have them."""
    root = spec.image_root or locate(spec.source.path, spec.source.reading.split).root
    for record in read_samples(spec.source, image_root=spec.image_root, limit=spec.limit):
        yield record if isinstance(record, BrokenRecord) else _question(record, spec.prompt, root.resolve())


def _question(sample: Sample, prompt: str, root: Path) -> Question | BrokenRecord:
    last = max(place for place, message in enumerate(sample.messages) if is_answer(message))
    asked = max((place for place in range(last) if sample.messages[place]["role"] == "user"), default=None)
    if asked is None:
        error = SampleError(sample.key, sample.id, "no user turn before its last answer", "Add the question")
        return BrokenRecord(sample.key, sample.id, sample.source, error)
    messages = [dict(message) for message in sample.messages[: last + 1]]
    truth = text_of(messages[last])
    messages[last] = messages[last] | {"content": [{"type": "text", "text": PLACEHOLDER}]}
    if prompt != "{question}":
        content = [part for part in messages[asked]["content"] if part["type"] == "image"]
        text = with_prompt(prompt, text_of(messages[asked]))
        messages[asked] = messages[asked] | {"content": [*content, {"type": "text", "text": text}]}
    images = sum(part["type"] == "image" for message in messages for part in message["content"])
    image = image_name(
        [os.path.relpath(one, root) if isinstance(one, Path) else one for one in sample.images]
    )
    asked_for = replace(sample, messages=tuple(messages), images=sample.images[:images])
    return Question(asked_for, image or sample.key, {"truth": truth})


def judge(row: Mapping[str, Any], rule: str, spec: DataSpec) -> dict[str, Any]:
    read = str.strip if rule == "strict" else plain
    parsed = read(row["prediction"])
    return {"parsed": parsed, "right": parsed == read(row["truth"])}


def tally(rows: Sequence[Mapping[str, Any]]) -> Tally:
    right = np.array([row["right"] for row in rows], float)
    return Tally(
        [row["key"] for row in rows],
        [row["image"] for row in rows],
        {"right": right},
        accuracy,
        right=right.astype(bool),
    )
