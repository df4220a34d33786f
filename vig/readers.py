"""The rows of data files as they lie there, in order and in constant memory: JSON, Parquet, Arrow, WebDataset.

    JSON             an array, or one object a line, told apart by the first character; read by hand
    Parquet, Arrow   through `datasets`, streamed; the columns are the fields of a record
    WebDataset       through `datasets`, streamed; the members of one name are a record: ``<name>.json`` holds its
                     fields, ``<name>.jpg`` is its image (several: ``<name>.0.jpg``, ``<name>.1.jpg``, ...), and
                     ``<name>.txt`` in the place of the JSON is a caption

Images within the files stay undecoded bytes. A damaged file ends in a row that says so; the rows before it are
read. What a record means is the business of `vig.samples`.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

JSON = (".json", ".jsonl")
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}  # suffix -> builder of `datasets`
MAX_RECORD = 1 << 28  # characters; a longer run without a record means that the JSON is broken
REPAIR = "Repair the file; the records before it are read"


class Row(NamedTuple):
    """One row of a file: its number from 0 and its record, or what is wrong with it and what helps."""

    number: int
    record: Any
    problem: str | None = None
    cure: str = REPAIR


def data_files(path: Path) -> list[Path]:
    """The file that `path` is, or the Parquet, Arrow or tar files of one kind in that folder, by name."""
    if path.is_file():
        return [path] if path.suffix in (*JSON, *BUILDERS) else []
    for suffix in BUILDERS:
        found = sorted(file for file in path.glob(f"*{suffix}") if not file.name.startswith("."))
        if found:
            return found
    return []


def read_rows(file: Path) -> Iterator[Row]:
    """The rows of one file. Raises ImportError, with the cure, where `datasets` is needed and missing."""
    return _json_rows(file) if file.suffix in JSON else _streamed_rows(file)


def count_rows(path: Path) -> int | None:
    """The number of rows that the files of `path` have; None where only reading all the images too would tell."""
    counts = [_count(file) for file in data_files(path)]
    return None if None in counts else sum(counts)


# --- JSON ---


def _json_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        first = next((char for line in file for char in line if not char.isspace()), "")
        file.seek(0)
        yield from array_rows(file) if first == "[" else _line_rows(file)


def _line_rows(file) -> Iterator[Row]:
    number = 0
    for line_number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            yield Row(number, json.loads(line))
        except json.JSONDecodeError as error:
            problem = f"line {line_number} is not JSON ({error.msg} at column {error.colno})"
            yield Row(number, None, problem, "Write one JSON object a line")
        number += 1


def array_rows(file, chunk: int = 1 << 20) -> Iterator[Row]:
    """Decodes a JSON array item by item, so that a file of any size needs the memory of one record."""
    decoder = json.JSONDecoder()
    buffer, at, number, ended = "", 0, 0, False
    opened = False
    while True:
        while at < len(buffer) and buffer[at] in " \t\r\n,[" and (buffer[at] != "[" or not opened):
            opened = opened or buffer[at] == "["
            at += 1
        if at < len(buffer) and buffer[at] == "]":
            return
        try:
            item, end = decoder.raw_decode(buffer, at)
            # A number or a cut literal at the end of the buffer may go on in the next chunk.
            if end == len(buffer) and not ended:
                raise json.JSONDecodeError("incomplete", buffer, end)
        except json.JSONDecodeError as error:
            more = "" if ended or len(buffer) - at > MAX_RECORD else file.read(chunk)
            if more:
                buffer, at = buffer[at:] + more, 0
                chunk *= 2  # a record larger than the chunk is read in few steps
                continue
            if not ended:
                ended = True
                continue
            where = f"{error.msg} at character {error.pos}"
            yield Row(number, None, f"the JSON array breaks off after {number} records ({where})")
            return
        yield Row(number, item)
        number, at, chunk = number + 1, end, 1 << 20


# --- through `datasets` ---


def _streamed_rows(file: Path) -> Iterator[Row]:
    try:
        import datasets
    except ImportError:
        cure = 'Install it: pip install "vig-kernels[data]"'
        raise ImportError(f"reading {file} needs the package datasets, which is missing. {cure}") from None
    kind, number = BUILDERS[file.suffix], 0
    log = logging.getLogger("datasets")
    level = log.level
    log.setLevel(logging.CRITICAL)  # what is wrong with the file is said by the last row
    try:
        rows = datasets.load_dataset(kind, data_files=str(file), split="train", streaming=True)
        for row in rows.decode(False):
            yield Row(number, _record_of_members(row) if kind == "webdataset" else row)
            number += 1
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        yield Row(number, None, f"the {kind} file breaks off after {number} records ({reason})")
    finally:
        log.setLevel(level)


def _record_of_members(members: dict[str, Any]) -> dict[str, Any]:
    fields = members.get("json")
    record = dict(fields) if isinstance(fields, dict) else {}
    images = {name: value for name, value in members.items() if isinstance(value, dict) and "bytes" in value}
    if images:
        record.pop("images", None)
        record["image"] = [images[name] for name in sorted(images, key=_natural)]
    if isinstance(members.get("txt"), str):
        record.setdefault("caption", members["txt"])
    record.setdefault("id", members.get("__key__"))
    return record


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts "2.jpg" before "10.jpg"."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


# --- counting ---


def _count(file: Path) -> int | None:
    if file.suffix in JSON:
        return sum(1 for _ in _json_rows(file))
    import pyarrow as pa  # counting JSON lines starts without it
    import pyarrow.parquet as pq

    try:
        if file.suffix == ".parquet":
            return pq.read_metadata(file).num_rows
        if file.suffix == ".arrow":
            return _count_arrow(file)
    except (pa.ArrowException, OSError):
        return None  # damaged: how far it reads is seen when it is read
    return None


def _count_arrow(file: Path) -> int:
    import pyarrow as pa

    with pa.memory_map(str(file)) as source:  # the columns are mapped, not read
        try:
            reader = pa.ipc.open_file(source)
        except pa.ArrowInvalid:
            source.seek(0)
            return sum(batch.num_rows for batch in pa.ipc.open_stream(source))
        return sum(reader.get_batch(index).num_rows for index in range(reader.num_record_batches))
