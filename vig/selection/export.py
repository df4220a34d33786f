"""The kept records of a selection, as they lie in the data: for trainers that know nothing of selections.

    JSON                          as they are
    CSV, TSV, Parquet, Arrow      the row's fields under the names of its columns; null where a cell is empty
    WebDataset                    the fields of its JSON or its caption, and its images
    imagefolder, photographs      the fields, and the images' paths from the data's folder on

in their order. Images whose bytes are in the data are written as data URIs (base64), which `vig` reads, and a warning
says so. The exported file is read with the options that the data were read with (`how_to_read`).

Kept are the samples with at least one selected token, as in `vig.keep_samples`. Which of their tokens are
selected stands in the selection alone. Memory: one byte a record of the data; of photographs, the kept names.
"""

from __future__ import annotations

import base64
import json
import math
import os
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from vig.data.files import StoreError, whole_file
from vig.data.formats import IMAGE_FIELDS, Format
from vig.data.locate import Located, locate
from vig.data.reading import Reading, Source, names_of
from vig.data.rows import SKIPPED, Row, read_rows
from vig.data.sample import writable
from vig.selection.select import Selection
from vig.store.fingerprints import data_fingerprint, renamed
from vig.store.folder import score_files
from vig.store.rows import segment_means
from vig.store.scores import first_key, score_metadata

WRITTEN = (".json", ".jsonl")  # an array, one record a line
MEDIA_TYPES = (
    (b"\x89PNG", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"BM", "image/bmp"),
    (b"II*\0", "image/tiff"),
    (b"MM\0*", "image/tiff"),
)  # by how pictures begin


def check_export(path: str | Path) -> None:
    """Raises ValueError where the name does not say whether to write an array or lines."""
    if Path(path).suffix not in WRITTEN:
        raise ValueError(f"{path} is not the name of a {' or '.join(WRITTEN)} file")


def export_records(selection: Selection, path: str | Path, *, data: str | Path | None = None) -> int:
    """Writes the kept records to `path`, an array (.json) or one a line (.jsonl), and returns how many they are.

    data: the scored data, if it has moved, under its old name. The file holds all records or what it held before.
    Warns where image bytes are written in base64. Raises StoreError for data that is gone, renamed, or not what was
    scored.
    """
    path = Path(path)
    check_export(path)
    files = {name: file for one in _scored_data(selection, data) for name, file in one.files().items()}
    if any(path.exists() and path.samefile(file.path) for file in files.values()):
        raise StoreError(f"{path} is the scored data itself. Give another file")
    before, between, after = (b"[\n", b",\n", b"\n]\n") if path.suffix == ".json" else (b"", b"\n", b"\n")
    count = with_bytes = 0
    with whole_file(path) as file:
        file.write(before)
        for record, has_bytes in _records(selection, files):
            file.write((between if count else b"") + _text(record))
            count += 1
            with_bytes += has_bytes
        file.write(after if count or before else b"")
    if with_bytes:
        warnings.warn(
            f"{with_bytes:,} of the {count:,} records in {path} hold the bytes of their images, written as data URIs "
            f"(base64): the file has {path.stat().st_size / 1e6:,.1f} MB. vig reads them; for a trainer that does not, "
            "use `vig train --selection`, or take the rows from the data by the selection's keys (FILE#ROW)",
            stacklevel=2,
        )
    return count


def how_to_read(selection: Selection, data: str | Path | None = None) -> list[str]:
    """For each scored data set the options of `vig score` that its exported records are read with."""
    lines = []
    for one in _scored_data(selection, data):
        options = {"--image-root": [str(one.root)]}
        for option, given in (("--columns", one.data.reading.columns), ("--roles", one.data.reading.roles)):
            options[option] = [f"{ours}={name}" for ours, names in names_of(given).items() for name in names]
        lines.append(
            " ".join(f"{option} {shlex.quote(','.join(given))}" for option, given in options.items() if given)
        )
    return list(dict.fromkeys(lines))


class _File(NamedTuple):
    """A file of the scored data (of photographs, their folder). root: that relative image paths start from."""

    path: Path
    form: Format
    root: Path


class _ScoredData(NamedTuple):
    """One data set that was scored, what its scores say of it, and where it is now."""

    about: dict[str, Any]
    data: Source
    located: Located

    @property
    def root(self) -> Path:
        """The folder that relative image paths start from: as it was scored, or the data's own."""
        given = self.about.get("image_root")
        return Path(given) if given and Path(given).is_dir() else self.located.root.absolute()

    def files(self) -> dict[str, _File]:
        """Its files, by the name that keys begin with."""
        where = self.located
        return {
            writable(name): _File(path, where.format, self.root)
            for name, path in zip(where.names, where.paths, strict=True)
        }


def _scored_data(selection: Selection, moved: str | Path | None) -> list[_ScoredData]:
    scores = selection.scores
    tables = (
        [scores]
        if isinstance(scores, pa.Table)
        else {file.parent: file for file in score_files(scores)}.values()
    )
    settings = {
        about.get("data"): (about, table) for about, table in ((score_metadata(one), one) for one in tables)
    }
    if moved is not None and len(settings) > 1:
        raise StoreError(
            f"the scores are of {len(settings)} data sets, and {moved} is one. Put them back in place"
        )
    found = []
    for name, (about, table) in settings.items():
        if moved is None and name is None:
            raise StoreError("the scores do not name their data. Give it with --data (data=)")
        data = Source(Path(name if moved is None else moved), Reading.stored(about))
        if not data.path.exists():
            raise StoreError(
                f"the scored data is not at {data}. Give it with --data (data=), under its old name"
            )
        if about.get("data_fingerprint") not in (None, data_fingerprint(data)):
            raise StoreError(
                f"{data} changed since it was scored. Score it again, or give the old with --data"
            )
        key = first_key(table)
        problem = None if key is None else renamed(key, data)
        if problem is not None:
            raise StoreError(f"{data}: {problem}")
        found.append(_ScoredData(about, data, locate(data.path, data.reading.split)))
    return found


def _records(selection: Selection, files: dict[str, _File]) -> Iterator[tuple[Any, bool]]:
    """The kept records, file by file, and whether each holds the bytes of an image."""
    kept = {name: _Rows(file.form.whole_folder) for name, file in files.items()}
    for key in _kept(selection):
        name = next((name for name in _file_names(key) if name in kept), None)
        if name is None:
            raise StoreError(f"{key}: no such file in the scored data. Score the data again")
        kept[name].add(key[len(name) + 1 :])
    for name, file in files.items():
        missing = kept[name].count
        for row in read_rows(file.path, file.form, kept[name].wanted):
            if row.problem is None and row.record is not SKIPPED and kept[name].has(row):
                missing -= 1
                yield _as_json(row.record, file)
        if missing:
            raise StoreError(
                f"{file.path}: {missing:,} of the kept records are not there. Score the data again"
            )


def _file_names(key: str) -> Iterator[str]:
    """What may be the name of a key's file, the likeliest first: names of files and photographs may hold a #."""
    at = len(key)
    while (at := key.rfind("#", 0, at)) >= 0:
        yield key[:at]


class _Rows:
    """Which rows of a file are kept: by their numbers, or by their names where these stand in keys."""

    def __init__(self, named: bool):
        self.named, self.count = named, 0
        self.names, self.marks = set(), bytearray()

    def add(self, row: str) -> None:
        self.count += 1
        if self.named:
            self.names.add(row)
            return
        number = int(row)
        self.marks.extend(bytes(max(0, number + 1 - len(self.marks))))
        self.marks[number] = 1

    def wanted(self, number: int) -> bool:
        return self.named or (number < len(self.marks) and self.marks[number] == 1)

    def has(self, row: Row) -> bool:
        return writable(row.name or "") in self.names if self.named else self.wanted(row.number)


# --- records as JSON ---


def _as_json(record: Any, file: _File) -> tuple[Any, bool]:
    """A record as JSON holds it, and whether bytes are in it. What was JSON stays as it is."""
    if file.form.as_json:
        return record, False
    if file.form.absolute_images:
        record = {
            name: _from_root(value, file.root) if name in IMAGE_FIELDS else value
            for name, value in record.items()
        }
    seen: list[int] = []
    return _plain(record, seen), bool(seen)


def _from_root(value: Any, root: Path) -> Any:
    if isinstance(value, list | tuple):
        return [_from_root(one, root) for one in value]
    return Path(os.path.relpath(value, root)).as_posix() if isinstance(value, str) else value


def _plain(value: Any, seen: list[int]) -> Any:
    """Bytes as data URIs (`seen` takes their lengths), NaN as null, dates and decimals as text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, dict):
        return {str(name): _plain(one, seen) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one, seen) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes | bytearray | memoryview):
        content = bytes(value)
        seen.append(len(content))
        return f"data:{_media_type(content)};base64,{base64.b64encode(content).decode()}"
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _media_type(content: bytes) -> str:
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "image/webp"
    if content[4:8] == b"ftyp":
        return "image/avif"
    return next(
        (kind for start, kind in MEDIA_TYPES if content.startswith(start)), "application/octet-stream"
    )


def _kept(selection: Selection) -> Iterator[str]:
    """The keys of the samples with a selected token, in the order of the scores."""
    for batch in selection.batches():
        lengths = pc.fill_null(pc.list_value_length(batch["token_keep"]), 0).to_numpy(zero_copy_only=False)
        chosen = batch["token_keep"].flatten().to_numpy(zero_copy_only=False)
        kept = batch.filter(pc.and_(batch["keep"], pa.array(segment_means(chosen, lengths) > 0)))
        yield from kept["key"].to_pylist()


def _text(record: Any) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a lone surrogate, which UTF-8 does not hold
        return json.dumps(record).encode()
