"""The imagefolder of `datasets`: ``metadata.jsonl`` (or .csv, .parquet) beside images that its records name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vig.data.formats import FORMATS, Format
from vig.data.rows import OfLine, Wanted


def imagefolder_rows(path: Path, wanted: Wanted) -> Iterator[Any]:
    """The records of the metadata, with the images that they name from its own folder on."""
    for found in _table_format(path).read(path, wanted):
        record = found.record if isinstance(found, OfLine) else found
        if isinstance(record, dict):
            names = record.pop("file_name", None) or record.pop("file_names", None)
            if names is not None:
                names = [names] if isinstance(names, str) else list(names)
                record |= {"images": [str(path.parent.absolute() / name) for name in names]}
        yield found


def count_imagefolder(path: Path) -> int | None:
    return _table_format(path).n_records(path)


def _table_format(path: Path) -> Format:
    """How the metadata are written."""
    dotted = (row for row in FORMATS if not row.whole_folder and row.suffixes[0].startswith("."))
    return next(row for row in dotted if row.fits(path.name))
