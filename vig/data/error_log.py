"""Errors of samples, counted by reason with the first few of each, and written out in full as JSON lines."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vig.data.files import whole_file
from vig.data.formats import IMAGES

EXAMPLES = 3  # kept of a reason
REASONS = 1000  # that are told apart
LONGEST = 800  # characters of a message that are shown
CURE = 600  # of its end, where the cure is: a longer message is cut before these
GROUPED = 2000  # that are compared
NAMES = "|".join(suffix[1:] for suffix in (*IMAGES, ".txt"))
# Of one sample: what is quoted or in brackets, paths, names of files, numbers. Paths and names are tried where a word
# may begin: tried at each character of a long word, they take quadratic time.
PARTICULARS = re.compile(
    rf"'[^']*'|\"[^\"]*\"|\([^()]*\)|(?<![^\s'\")])(?:\S*[/\\]\S+|\S+\.(?:{NAMES})\b)|[-+]?\d[\d.,e+-]*",
    re.IGNORECASE,
)
RUN = re.compile(r"(?:… ?)+(?=…)")
LINE = re.compile(r"(?P<key>.+?#\S+) \(id (?P<id>'.*?'|\".*?\")\): (?P<message>.*)", re.DOTALL)


def masked(message: str) -> str:
    """A message without what is particular to its sample, each an ellipsis: what errors are grouped by."""
    reason = RUN.sub("", PARTICULARS.sub("…", message[:GROUPED])).strip()
    return reason[:LONGEST]  # a cut before would depend on the particulars


def group_of(message: str, groups: Collection[str]) -> str:
    """The name of a message's group among those that there are; of more than REASONS the rest stand together."""
    reason = masked(message)
    return reason if reason in groups or len(groups) < REASONS else "other reasons"


@dataclass
class ErrorGroup:
    """Errors for one reason: how many, and (key, id, message) of the first. A message ends in its cure."""

    count: int = 0
    examples: list[tuple[str, str, str]] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The first error in full, and the keys of two more."""
        key, id, message = self.examples[0]
        if len(message) > LONGEST:
            message = f"{message[: LONGEST - CURE]} ... {message[-CURE:]}"
        first = f"{key} (id {id!r}): {message}" if key else message
        if self.count == 1:
            return [first]
        others = ", ".join(f"{key} (id {id!r})" if key else id for key, id, _ in self.examples[1:])
        more = ", ..." if self.count > len(self.examples) else ""
        return [f"{self.count:,} samples: {first}", f"    likewise {others}{more}"]


class ErrorLog:
    """Takes errors as they come. path: a file of JSON lines that all of them are written to, whole or not at all."""

    def __init__(self, path: str | Path | None = None):
        self.groups: dict[str, ErrorGroup] = {}
        self.path, self._stack, self._file = path, ExitStack(), None

    def __enter__(self) -> ErrorLog:
        if self.path is not None:
            self._file = self._stack.enter_context(whole_file(Path(self.path)))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def add(self, key: str, id: str, message: str) -> None:
        group = self.groups.setdefault(group_of(message, self.groups), ErrorGroup())
        group.count += 1
        if len(group.examples) < EXAMPLES:
            group.examples.append((key, id, message))
        if self._file is not None:
            entry = {"key": key, "id": id, "message": message}
            self._file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")

    def add_line(self, line: str) -> None:
        """An error as a SampleError prints itself."""
        found = LINE.fullmatch(line)
        if found is None:
            self.add("", "", line)
        else:
            self.add(found["key"], found["id"][1:-1], found["message"])

    def extend(self, errors: Iterable[tuple[str, str, str]]) -> ErrorLog:
        for error in errors:
            self.add(*error)
        return self

    @property
    def count(self) -> int:
        return sum(group.count for group in self.groups.values())

    def by_count(self) -> list[ErrorGroup]:
        return sorted(self.groups.values(), key=lambda group: -group.count)

    def lines(self, most: int = 10) -> Iterator[str]:
        """For a terminal: the most frequent reasons."""
        groups = self.by_count()
        for group in groups[:most]:
            yield from group.lines()
        if len(groups) > most:
            left = sum(group.count for group in groups[most:])
            yield f"... and {left:,} samples for {len(groups) - most:,} more reasons"

    def summary(self) -> list[dict[str, Any]]:
        """For `--json`."""
        names = ("key", "id", "message")
        return [
            {"count": group.count, "examples": [dict(zip(names, one, strict=True)) for one in group.examples]}
            for group in self.by_count()
        ]
