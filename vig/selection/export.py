"""The kept records of a selection, as they lie in the data: for trainers that know nothing of selections.

    records of JSON data               as they are, in their order
    records of other data              {"key", "id", "file", "row"}: their images are not for JSON to hold

Kept are the samples with at least one selected token, as in `vig.keep_samples`. Which of their tokens are
selected stands in the selection alone. Memory: one byte a record of the data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vig.data.files import StoreError, whole_file
from vig.data.formats import FORMATS, format_of
from vig.data.locate import locate
from vig.data.reading import Reading, Source
from vig.data.rows import read_rows
from vig.data.sample import writable
from vig.selection.select import Selection
from vig.store.fingerprints import data_fingerprint, renamed
from vig.store.folder import score_files
from vig.store.rows import segment_means
from vig.store.scores import first_key, score_metadata

WRITTEN = (".json", ".jsonl")  # an array, one record a line


def check_export(path: str | Path) -> None:
    """Raises ValueError where the name does not say whether to write an array or lines."""
    if Path(path).suffix not in WRITTEN:
        raise ValueError(f"{path} is not the name of a {' or '.join(WRITTEN)} file")


def export_records(selection: Selection, path: str | Path, *, data: str | Path | None = None) -> int:
    """Writes the kept records to `path`, an array (.json) or one a line (.jsonl), and returns how many they are.

    data: the scored data, if it has moved, under its old name. The file holds all records or what it held before.
    Raises StoreError for data that is gone, renamed, or not what was scored.
    """
    path = Path(path)
    check_export(path)
    files = _json_files(selection, data)
    if any(path.exists() and path.samefile(source) for source in files.values()):
        raise StoreError(f"{path} is the scored data itself. Give another file")
    before, between, after = (b"[\n", b",\n", b"\n]\n") if path.suffix == ".json" else (b"", b"\n", b"\n")
    count = 0
    with whole_file(path) as file:
        file.write(before)
        for record in _records(selection, files):
            file.write((between if count else b"") + _text(record))
            count += 1
        file.write(after if count or before else b"")
    return count


def _json_files(selection: Selection, moved: str | Path | None) -> dict[str, Path]:
    """The files of JSON data that was scored, by the name that keys begin with."""
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
    found = {}
    for name, (about, table) in settings.items():
        if moved is None and name is None:
            raise StoreError("the scores do not name their data. Give it with --data (data=)")
        data = Source(Path(name if moved is None else moved), Reading.stored(about))
        if not _is_json(data.path, about):
            continue
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
        where = locate(data.path, data.reading.split)
        found |= {writable(name): path for name, path in zip(where.names, where.paths, strict=True)}
    return found


def _is_json(data: Path, about: dict) -> bool:
    """By its name, or by what the scores say; folders of JSON were not read before they said it."""
    form = format_of(data)
    return (
        form.as_json
        if form is not None
        else any(row.as_json for row in FORMATS if row.name == about.get("data_format"))
    )


def _records(selection: Selection, files: dict[str, Path]) -> Iterator[Any]:
    kept = {name: bytearray() for name in files}
    for key, id in _kept(selection):
        name, _, row = key.rpartition("#")
        if name not in files:
            yield {"key": key, "id": id, "file": name, "row": int(row) if row.isdigit() else row}
            continue
        marks, row = kept[name], int(row)
        marks.extend(bytes(max(0, row + 1 - len(marks))))
        marks[row] = 1
    for name, marks in kept.items():
        missing = sum(marks)

        def wanted(row: int, marks: bytearray = marks) -> bool:
            return row < len(marks) and marks[row] == 1

        for row in read_rows(files[name], format_of(files[name]), wanted):
            if wanted(row.number) and row.problem is None:
                missing -= 1
                yield row.record
        if missing:
            raise StoreError(
                f"{files[name]}: {missing:,} of the kept records are not there. Score the data again"
            )


def _kept(selection: Selection) -> Iterator[tuple[str, str]]:
    """Key and id of the samples with a selected token, in the order of the scores."""
    for batch in selection.batches():
        lengths = pc.fill_null(pc.list_value_length(batch["token_keep"]), 0).to_numpy(zero_copy_only=False)
        chosen = batch["token_keep"].flatten().to_numpy(zero_copy_only=False)
        kept = batch.filter(pc.and_(batch["keep"], pa.array(segment_means(chosen, lengths) > 0)))
        yield from zip(kept["key"].to_pylist(), kept["id"].to_pylist(), strict=True)


def _text(record: Any) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a lone surrogate, which UTF-8 does not hold
        return json.dumps(record).encode()
