"""From files to samples: readers of instruction data, one `Sample` or one `BrokenRecord` a record.

Records: LLaVA / ShareGPT (``conversations``) and Hugging Face ``messages``. Files: a JSON array, JSON lines,
Parquet, Arrow or WebDataset, or a folder of photographs with a caption beside each. Nothing is ever dropped
silently: what cannot become a sample is yielded as a `BrokenRecord` that carries its key, its id and the cure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from vig.data import readers
from vig.data.photographs import photographs, read_folder
from vig.data.records import TURNS, sample_from_record, turns_of_caption
from vig.data.rows import SKIPPED, Wanted, every
from vig.data.sample import BrokenRecord, DataError, Sample, SampleError, writable


def read_samples(
    path: str | Path,
    *,
    image_root: str | Path | None = None,
    limit: int | None = None,
    wanted: Callable[[int], bool] | None = None,
) -> Iterator[Sample | BrokenRecord | None]:
    """Reads `path` record by record, in order, in constant memory.

    path: a ``.json`` array, a ``.jsonl`` file, ``.parquet``, ``.arrow`` or WebDataset ``.tar`` or ``.tar.gz``
        files (one, or a folder of them), or a folder of photographs (caption ``photo.txt`` beside ``photo.jpg``).
    image_root: folder that relative image paths start from; the data file's own folder unless given. Paths
        that leave it are refused, also by symbolic links, which VIG_FOLLOW_LINKS=1 follows. (The links of the hub's
        cache are followed without it.)
    limit: read at most this many records.
    wanted: of a record's number, counted from 0 over all files, whether it is needed; asked when it is reached.
        None stands in the place of the others, which cost as little as the format allows (`vig.data.readers`).
    Raises DataError where the file is missing or of an unknown format, ValueError for a negative limit.
    """
    if limit is not None and limit < 0:
        raise ValueError(f"limit = {limit}, expected at least 0 records")
    path, reader = _reader_of(path)
    root = Path(image_root) if image_root is not None else (path if path.is_dir() else path.parent)
    if not root.is_dir():
        raise DataError(f"no such image root: {root}. Give the folder of the images with --image-root")
    return islice(reader.read(path, root.absolute(), wanted or every), limit)


def count_records(path: str | Path) -> int | None:
    """How many records `read_samples` yields; None where only reading all the images too would tell."""
    path, reader = _reader_of(path)
    return reader.count(path)


def _reader_of(path: str | Path) -> tuple[Path, Reader]:
    path = Path(path)
    if not path.exists():
        raise DataError(
            f"no such data: {path}. Give a .json, .jsonl, .parquet, .arrow, .tar or .tar.gz file, or a folder"
        )
    reader = next((reader for reader in READERS if reader.knows(path)), None)
    if reader is None:
        got = f"{path.suffix or 'no suffix'!r}"
        raise DataError(
            f"cannot read {path}: expected .json, .jsonl, .parquet, .arrow, .tar, .tar.gz or a folder, got {got}"
        )
    return path, reader


def _read_files(path: Path, root: Path, wanted: Wanted) -> Iterator[Sample | BrokenRecord | None]:
    total = 0  # records of the files before
    for file in readers.data_files(path):
        before, number, source = total, -1, writable(file.name)
        for number, record, problem, cure in readers.read_rows(file, lambda row, n=before: wanted(n + row)):
            if record is SKIPPED or not wanted(before + number):
                yield None
                continue
            key = f"{source}#{number}"
            try:
                if problem is not None:
                    raise SampleError(key, "", problem, cure)
                if isinstance(record, dict) and "caption" in record and not record.keys() & TURNS:
                    record = record | {"conversations": turns_of_caption(record, key)}
                yield sample_from_record(record, key=key, image_root=root, source=source)
            except SampleError as error:
                yield BrokenRecord(key, error.id, source, error)
        total = before + number + 1


class Reader(NamedTuple):
    """One format: whether a path is of it, its records, and how many they are if that is cheap to know."""

    knows: Callable[[Path], Any]
    read: Callable[[Path, Path, Wanted], Iterator[Sample | BrokenRecord | None]]
    count: Callable[[Path], int | None]


READERS = (
    Reader(readers.data_files, _read_files, readers.count_rows),
    Reader(Path.is_dir, read_folder, lambda path: len(photographs(path))),
)
