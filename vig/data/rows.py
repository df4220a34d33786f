"""Rows of data files as they lie there: numbers, what is lost and why, what is not wanted.

Images within the files stay undecoded bytes. A damaged file ends in a row that says so; the rows before it are
read. Of a Parquet file whose rows can be counted every row that cannot be read says so, and those behind are read;
a bad member of a tar file costs its own record alone. Rows that are not wanted keep their numbers and cost as
little as the format allows: Parquet's and Arrow's are not read, JSON lines are not decoded. What a record means is
the business of `vig.data.records`.
"""

from __future__ import annotations

import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vig.data.formats import Format
from vig.data.sample import DataError

REPAIR = "Repair the file; the records before it are read"
DAMAGE = (OSError, ValueError, RuntimeError, KeyError, TypeError, EOFError, tarfile.TarError, zlib.error)
SKIPPED = object()  # stands in the place of a record that is not wanted
Wanted = Callable[[int], bool]  # of a row's number


def every(_: int) -> bool:
    return True


class Lost(NamedTuple):
    """A record that cannot be read."""

    problem: str
    cure: str = REPAIR


class Named(NamedTuple):
    """A record with a name of its own, which its key ends in instead of its number."""

    name: str
    record: Any


class OfLine(NamedTuple):
    """A record of a file that people read by its lines, counted from 1."""

    line: int
    record: Any


class Row(NamedTuple):
    """One row of a file: its number from 0, its record, or what is wrong with it and what helps, and its name.

    line: of the file, where it ends, from 1; None where a file has none that people look for.
    """

    number: int
    record: Any
    problem: str | None = None
    cure: str = REPAIR
    name: str | None = None
    line: int | None = None


def check_header(path: Path, names: Sequence[str]) -> None:
    """Raises DataError where two columns have one name, of which a record would hold the last. Empty names may repeat:
    nothing is read by them."""
    twice = next((name for name, count in Counter(filter(None, names)).items() if count > 1), None)
    if twice is not None:
        raise DataError(
            f"{path} has two columns {twice!r}, of which a record can hold one. Rename one of them"
        )


def read_rows(path: Path, form: Format, wanted: Wanted = every) -> Iterator[Row]:
    """The rows of one file of this format, or of one folder where the format is read a folder at once.

    wanted: asked when a row is reached; what is not wanted may be SKIPPED."""
    number = 0
    try:
        for record in form.read(path, wanted):
            name = line = None
            if isinstance(record, Named):
                name, record = record
            elif isinstance(record, OfLine):
                line, record = record
            if isinstance(record, Lost):
                yield Row(number, None, *record, name)
            else:
                yield Row(number, record, name=name, line=line)
            number += 1
    except DataError:
        raise
    except DAMAGE as error:
        yield Row(
            number, None, f"the {form.name} file breaks off after {number} records ({reason_of(error)})"
        )


def reason_of(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
