"""What a task asks: one `Question` a record, and how the records of a benchmark's files are read.

Nothing is dropped in silence: a record that cannot be asked is a `BrokenRecord` with its key, id, reason and cure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from vig.data.image_sources import image_source
from vig.data.locate import locate
from vig.data.reading import Source
from vig.data.rows import read_rows
from vig.data.sample import BrokenRecord, DataError, ImageSource, Sample, SampleError, writable
from vig.data.turns import Unusable, check_text

PLACEHOLDER = "Yes"  # stands where the answer will; the prompt ends before it


@dataclass(frozen=True)
class DataSpec:
    """Which data a task reads, and how it asks.

    prompt: `{question}` stands for the record's own. way: of `Task.ways`. synonyms, captions: files of CHAIR.
    """

    source: Source
    prompt: str
    way: str | None = None
    image_root: Path | None = None
    limit: int | None = None  # records
    synonyms: Path | None = None
    captions: Path | None = None
    rotate: bool | None = (
        None  # ask each question once a rotation of its options; None: as its benchmark does
    )

    def files(self) -> list[Path]:
        """What it reads, images apart."""
        return [self.source.path, *filter(None, (self.synonyms, self.captions))]


@dataclass(frozen=True)
class Question:
    """One prompt and its truth.

    sample: the conversation, `PLACEHOLDER` in the place of the last answer. image: what it is about; questions of one
    image are drawn together by the bootstrap. truth: stored with the prediction, JSON. candidates: the answers whose
    likelihoods are compared, where nothing is generated.
    """

    sample: Sample
    image: str
    truth: dict[str, Any] = field(default_factory=dict)
    candidates: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return self.sample.key

    @property
    def id(self) -> str:
        return self.sample.id


class Record:
    """One record of a benchmark's file: its fields, and where relative image paths start from."""

    def __init__(self, fields: Any, key: str, root: Path, source: str):
        if not isinstance(fields, dict):
            raise Unusable(
                f"the record is a {type(fields).__name__}, not an object", "Give one object a record"
            )
        self.fields, self.key, self.root, self.source = fields, key, root, source
        self.id = key

    def named(self, *names: str) -> Record:
        """Takes its id from the first of these fields that is there."""
        self.id = str(next((self.fields[name] for name in names if self.get(name) is not None), self.key))
        return self

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of these fields that holds something."""
        found = (self.fields[name] for name in names if self.fields.get(name) not in (None, ""))
        return next(found, default)

    def text(self, *names: str) -> str:
        """The first of these fields. Raises Unusable where none is there, or it is no text."""
        value = self.get(*names)
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str) or not value.strip():
            empty = next((name for name in names if name in self.fields), None)
            if empty is not None and value in (None, ""):
                raise Unusable(f"the field {empty} is empty", "Fill it, or remove the record")
            found = ", ".join(sorted(map(str, self.fields))) or "none"
            raise Unusable(
                f"no text in the field {' or '.join(names)} (fields: {found})", "Fill it, or check --task"
            )
        check_text(names[0], value)
        return value.strip()

    def images(self, *names: str) -> list[Any]:
        """The images of the first of these fields, as `ImageSource`s. Raises Unusable and SampleError."""
        value = self.get(*names)
        if value is None:
            raise Unusable(f"no image in the field {' or '.join(names)}", "Fill it, or check --task")
        values = value if isinstance(value, list | tuple) else [value]
        return [image_source(one, str(self.root), self.key, self.id) for one in values]

    def ask(self, text: str, images: Sequence[ImageSource]) -> Sample:
        """Images, then the text."""
        asked = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
        answer = {"role": "assistant", "content": [{"type": "text", "text": PLACEHOLDER}]}
        messages = ({"role": "user", "content": asked}, answer)
        return Sample(self.key, self.id, tuple(images), messages, self.source)


def read_records(
    spec: DataSpec, make: Callable[[Record], Question | Iterable[Question]]
) -> Iterator[Question | BrokenRecord]:
    """The questions that `make` makes of each record of any of `vig.data.formats.FORMATS`, up to spec.limit records.

    What raises SampleError or Unusable is a BrokenRecord.
    """
    for key, source, root, record, problem in islice(raw_rows(spec), spec.limit):
        id = key
        try:
            if problem is not None:
                raise Unusable(*problem)
            row = Record(spec.source.reading.renamed(record), key, root, source)
            row.named("id", "question_id", "questionId", "index", "idx")
            id = row.id
            made = make(row)
            yield from [made] if isinstance(made, Question) else list(made)
        except Unusable as error:
            yield BrokenRecord(key, id, source, SampleError(key, id, error.reason, error.cure))
        except SampleError as error:
            yield BrokenRecord(key, id, source, error)


def raw_rows(spec: DataSpec) -> Iterator[tuple[str, str, Path, Any, tuple[str, str] | None]]:
    """(key, file, image root, record, what is wrong with it)."""
    found = locate(spec.source.path, spec.source.reading.split)
    root = (spec.image_root or found.root).absolute()
    if not root.is_dir():
        raise DataError(f"no such image root: {root}. Give the folder of the images with --image-root")
    for file, own_name in zip(found.paths, found.names, strict=True):
        source = writable(own_name)
        for row in read_rows(file, found.format):
            name = row.number if row.name is None else writable(row.name)
            yield f"{source}#{name}", source, root, row.record, row.problem and (row.problem, row.cure)


def image_name(value: Any) -> str:
    """What tells an image from another: its path, else its content."""
    if isinstance(value, list | tuple):
        return " ".join(map(image_name, value))
    if isinstance(value, dict):
        value = next((value[name] for name in ("bytes", "path") if value.get(name) is not None), "")
    if isinstance(value, bytes | bytearray):
        return hashlib.blake2b(value, digest_size=8).hexdigest()
    text = str(value)
    return text if len(text) <= 200 else hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def has_image(row: Mapping[str, Any]) -> bool:
    """Whether a stored row is about an image: one of text alone has its record's key in the image's place."""
    return row["key"] != row["image"] and not row["key"].startswith(f"{row['image']}@")  # @1: a rotation


def with_prompt(prompt: str, question: str) -> str:
    return prompt.replace("{question}", question)
