"""From files to samples: one `Sample` or one `BrokenRecord` a record, in order, in constant memory.

Formats of files: `vig.data.formats`. Which files of a path hold the records: `vig.data.locate`. What a record means:
`vig.data.records`. Nothing is ever dropped silently: what cannot become a sample is yielded as a `BrokenRecord` that
carries its key, its id and the cure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path

from vig.data.locate import Located, locate
from vig.data.reading import Reading, Source
from vig.data.records import sample_from_record
from vig.data.rows import SKIPPED, Wanted, every, read_rows
from vig.data.sample import BrokenRecord, DataError, Sample, SampleError, writable


def read_samples(
    path: str | Path | Source,
    *,
    image_root: str | Path | None = None,
    split: str | None = None,
    columns: Mapping[str, str | list[str]] | None = None,
    roles: Mapping[str, str | list[str]] | None = None,
    limit: int | None = None,
    wanted: Callable[[int], bool] | None = None,
    located: Located | None = None,
) -> Iterator[Sample | BrokenRecord | None]:
    """Reads `path` record by record, in order, in constant memory.

    path: a file of one of `vig.data.formats.FORMATS`, or a folder of such files.
    image_root: folder that relative image paths start from; the data file's own folder unless given. Paths
        that leave it are refused, also by symbolic links, which VIG_FOLLOW_LINKS=1 follows. (The links of the hub's
        cache are followed without it.)
    split: which one, of a folder that holds several.
    columns, roles: our names -> the data's: {"messages": "conv", "ignore": ["mask"]}, {"assistant": ["bot"]}.
    limit: read at most this many records.
    wanted: of a record's number, counted from 0 over all files, whether it is needed; asked when it is reached.
        None stands in the place of the others, which cost as little as the format allows (`vig.data.rows`).
    located: what `locate` found at the path, where it was called before; a million photographs take it minutes.
    Raises DataError where the file is missing or of an unknown format, or the folder holds several kinds of data or
    several splits; ValueError for a negative limit, a field or a role that is not known.
    """
    if limit is not None and limit < 0:
        raise ValueError(f"limit = {limit}, expected at least 0 records")
    source = Source.of(path)
    reading = source.reading
    if split or columns or roles:
        reading = Reading(split or reading.split, columns or reading.columns, roles or reading.roles)
    data = located or locate(source.path, reading.split)
    root = Path(image_root) if image_root is not None else data.root
    if not root.is_dir():
        raise DataError(f"no such image root: {root}. Give the folder of the images with --image-root")
    return islice(_read(data, root.absolute(), reading, wanted or every), limit)


def count_records(path: str | Path | Source, split: str | None = None) -> int | None:
    """How many records `read_samples` yields; None where only reading all the images too would tell."""
    source = Source.of(path)
    data = locate(source.path, split or source.reading.split)
    counts = [data.format.n_records(file) for file in data.paths]
    return None if None in counts else sum(counts)


def _read(
    data: Located, root: Path, reading: Reading, wanted: Wanted
) -> Iterator[Sample | BrokenRecord | None]:
    total = 0  # records of the files before
    for file, own_name in zip(data.paths, data.names, strict=True):
        before, number, source = total, -1, writable(own_name)
        rows = read_rows(file, data.format, lambda row, n=before: wanted(n + row))
        for number, record, problem, cure, name, line in rows:
            if record is SKIPPED or not wanted(before + number):
                yield None
                continue
            key = f"{source}#{number if name is None else writable(name)}"
            try:
                if problem is not None:
                    raise SampleError(key, name or "", problem, cure)
                yield sample_from_record(record, key=key, image_root=root, source=source, reading=reading)
            except SampleError as error:
                if line is not None:
                    error = SampleError(key, error.id, f"line {line}: {error.reason}", error.cure)
                yield BrokenRecord(key, error.id, source, error)
        total = before + number + 1
