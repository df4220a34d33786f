"""Which files hold the records, and their rows in order and in constant memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vig.data.json_rows import json_rows
from vig.data.rows import DAMAGE, Lost, Row, Wanted, every, reason_of
from vig.data.tables import arrow_batches, arrow_rows, parquet_rows
from vig.data.webdataset import webdataset_rows

JSON = (".json", ".jsonl")
KINDS = {
    ".parquet": "Parquet",
    ".arrow": "Arrow",
    ".tar": "WebDataset",
    ".tar.gz": "WebDataset",
    ".tgz": "WebDataset",
}  # by the end of the name


def data_files(path: Path) -> list[Path]:
    """The file that `path` is, or the Parquet, Arrow or tar files of one kind in that folder, by name."""
    if path.is_file():
        return [path] if path.suffix in JSON or _kind(path) else []
    if not path.is_dir():
        return []
    files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    for kind in dict.fromkeys(KINDS.values()):
        found = [file for file in files if _kind(file) == kind]
        if found:
            return found
    return []


def _kind(file: Path) -> str | None:
    return next((kind for suffix, kind in KINDS.items() if file.name.endswith(suffix)), None)


def read_rows(file: Path, wanted: Wanted = every) -> Iterator[Row]:
    """The rows of one file.

    wanted: asked when a row is reached; what is not wanted may be SKIPPED."""
    return json_rows(file, wanted) if file.suffix in JSON else _table_rows(file, wanted)


def count_rows(path: Path) -> int | None:
    """The number of rows that the files of `path` have; None where only reading all the images too would tell."""
    counts = [_count(file) for file in data_files(path)]
    return None if None in counts else sum(counts)


def _table_rows(file: Path, wanted: Wanted) -> Iterator[Row]:
    kind, number = _kind(file), 0
    try:
        for record in READ[kind](file, wanted):
            yield Row(number, None, *record) if isinstance(record, Lost) else Row(number, record)
            number += 1
    except DAMAGE as error:
        yield Row(number, None, f"the {kind} file breaks off after {number} records ({reason_of(error)})")


READ = {"Parquet": parquet_rows, "Arrow": arrow_rows, "WebDataset": webdataset_rows}


def _count(file: Path) -> int | None:
    if file.suffix in JSON:
        return sum(1 for _ in json_rows(file))
    import pyarrow as pa  # counting JSON lines starts without it
    import pyarrow.parquet as pq

    try:
        if file.suffix == ".parquet":
            return pq.read_metadata(file).num_rows
        if file.suffix == ".arrow":
            return sum(batch.num_rows for batch in arrow_batches(file))
    except (pa.ArrowException, OSError):
        pass  # damaged: how far it reads is seen when it is read
    return None
