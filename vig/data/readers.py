"""The rows of data files as they lie there, in order and in constant memory: JSON, Parquet, Arrow, WebDataset.

    JSON             an array, or one object a line, told apart by the first character; read by hand
    Parquet, Arrow   the columns are the fields of a record; read through pyarrow, a few rows at a time. (The
                     streaming reader of `datasets` runs ahead of a slow consumer by two thirds of a Parquet file,
                     and takes the magic bytes of an Arrow file for a length of 1.3 GB.)
    WebDataset       a tar file, compressed or not, streamed through `tarfile`, a record at a time; consecutive
                     members of one name, which ends at the first dot of the file's name, are a record:
                     ``<name>.json`` holds its fields, ``<name>.jpg`` is its image (several: ``<name>.0.jpg``,
                     ``<name>.1.jpg``, ...), and ``<name>.txt`` in the place of the JSON is a caption. (The reader
                     of `datasets` fixes fields and types on the first 5 records, and loses what differs later.)

Images within the files stay undecoded bytes. A damaged file ends in a row that says so; the rows before it are
read. Of a Parquet file whose rows can be counted every row that cannot be read says so, and those behind are read;
a bad member of a tar file costs its own record alone. Rows that are not wanted keep their numbers and cost as
little as the format allows: Parquet's and Arrow's are not read, JSON lines are not decoded. What a record means is
the business of `vig.data.samples`.
"""

from __future__ import annotations

import functools
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

JSON = (".json", ".jsonl")
KINDS = {
    ".parquet": "Parquet",
    ".arrow": "Arrow",
    ".tar": "WebDataset",
    ".tar.gz": "WebDataset",
    ".tgz": "WebDataset",
}  # by the end of the name
MAX_RECORD = 1 << 28  # characters; a longer run without a record means that the JSON is broken
ROWS = 16  # decoded at a time
REPAIR = "Repair the file; the records before it are read"
MEND = "Mend that member; the other records are read"
SHORTEN = "Shorten or remove it"


SKIPPED = object()  # stands in the place of a record that is not wanted
Wanted = Callable[[int], bool]  # of a row's number


def every(_: int) -> bool:
    return True


class Lost(NamedTuple):
    """A record that cannot be read."""

    problem: str
    cure: str = REPAIR


class Row(NamedTuple):
    """One row of a file: its number from 0 and its record, or what is wrong with it and what helps."""

    number: int
    record: Any
    problem: str | None = None
    cure: str = REPAIR


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
    return _json_rows(file, wanted) if file.suffix in JSON else _table_rows(file, wanted)


def count_rows(path: Path) -> int | None:
    """The number of rows that the files of `path` have; None where only reading all the images too would tell."""
    counts = [_count(file) for file in data_files(path)]
    return None if None in counts else sum(counts)


# --- JSON ---


def _json_rows(path: Path, wanted: Wanted = every) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        first = next((char for line in file for char in line if not char.isspace()), "")
        file.seek(0)
        yield from array_rows(file) if first == "[" else _line_rows(file, wanted)


def _line_rows(file, wanted: Wanted) -> Iterator[Row]:
    number = 0
    for line_number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            yield Row(number, json.loads(line) if wanted(number) else SKIPPED)
        except json.JSONDecodeError as error:
            problem = f"line {line_number} is not JSON ({error.msg} at column {error.colno})"
            yield Row(number, None, problem, "Write one JSON object a line")
        except (ValueError, RecursionError) as error:
            yield Row(number, None, f"line {line_number} cannot be decoded ({_why(error)})", SHORTEN)
        number += 1


def _decoded(buffer: str, at: int) -> tuple[Any, int, str | None]:
    """The item of an array at `at`, where it ends, and what is wrong with it. Raises JSONDecodeError."""
    try:
        return *json.JSONDecoder().raw_decode(buffer, at), None
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        _, end = json.JSONDecoder(parse_int=len).raw_decode(buffer, at)
        return None, end, f"the record cannot be decoded ({_why(error)})"


def _why(error: ValueError | RecursionError) -> str:
    """Python takes neither integers of thousands of digits nor thousands of brackets within each other."""
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(":")[0]


def array_rows(file, chunk: int = 1 << 20) -> Iterator[Row]:
    """Decodes a JSON array item by item, so that a file of any size needs the memory of one record."""
    buffer, at, number, ended = "", 0, 0, False
    opened = False
    while True:
        while at < len(buffer) and buffer[at] in " \t\r\n,[" and (buffer[at] != "[" or not opened):
            opened = opened or buffer[at] == "["
            at += 1
        if at < len(buffer) and buffer[at] == "]":
            behind = next(filter(None, map(str.strip, _rest(buffer[at + 1 :], file))), "")
            if behind:
                problem = (
                    f"the JSON array ends after {number} records, but more follows ({behind[:20]!r} ...)"
                )
                yield Row(number, None, problem, "Join all of it into one array")
            return
        try:
            item, end, problem = _decoded(buffer, at)
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
        except RecursionError as error:
            yield Row(number, None, f"the JSON array breaks off after {number} records ({_why(error)})")
            return
        yield Row(number, item) if problem is None else Row(number, None, problem, SHORTEN)
        number, at, chunk = number + 1, end, 1 << 20


def _rest(buffer: str, file, chunk: int = 1 << 20) -> Iterator[str]:
    while buffer:
        yield buffer
        buffer = file.read(chunk)


# --- tables and archives ---


DAMAGE = (OSError, ValueError, RuntimeError, KeyError, TypeError, EOFError, tarfile.TarError, zlib.error)


def _table_rows(file: Path, wanted: Wanted) -> Iterator[Row]:
    kind, number = _kind(file), 0
    try:
        for record in READ[kind](file, wanted):
            yield Row(number, None, *record) if isinstance(record, Lost) else Row(number, record)
            number += 1
    except DAMAGE as error:
        yield Row(number, None, f"the {kind} file breaks off after {number} records ({_reason(error)})")


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _parquet_rows(file: Path, wanted: Wanted) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file, memory_map=True, buffer_size=1 << 20, pre_buffer=False) as table:
        first = 0  # row of the group
        for group in range(table.num_row_groups):
            rows = range(first, first + table.metadata.row_group(group).num_rows)
            first = rows.stop
            if not any(map(wanted, rows)):
                yield from (SKIPPED for _ in rows)
                continue
            done = 0
            try:
                for batch in table.iter_batches(ROWS, row_groups=[group], use_threads=False):
                    for record in _batch_rows(batch, rows.start + done, wanted):
                        yield record
                        done += 1
            except DAMAGE as error:
                lost = Lost(f"row group {group} of the Parquet file cannot be read ({_reason(error)})")
                yield from (lost for _ in rows[done:])


def _batch_rows(batch: Any, first: int, wanted: Wanted) -> list[Any]:
    """All records of a batch whose first row is number `first`, if one of them is wanted."""
    if any(map(wanted, range(first, first + batch.num_rows))):
        return batch.to_pylist()
    return [SKIPPED] * batch.num_rows


def _arrow_rows(file: Path, wanted: Wanted) -> Iterator[Any]:
    number = 0
    for batch in _arrow_batches(file):
        for start in range(0, batch.num_rows, ROWS):
            few = batch.slice(start, ROWS)
            yield from _batch_rows(few, number, wanted)
            number += few.num_rows


def _arrow_batches(file: Path) -> Iterator[Any]:
    """The record batches of an Arrow file or stream; columns are mapped, and read when they are used."""
    import pyarrow as pa

    with pa.memory_map(str(file)) as source:
        try:
            reader = pa.ipc.open_file(source)
        except pa.ArrowInvalid:
            source.seek(0)
            yield from pa.ipc.open_stream(source)
            return
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)


# --- tar files ---


class _Member(tarfile.TarInfo):
    """A tar header; `tarfile` takes a damaged one for the end of the file, and says nothing."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} in the place of a member or the end mark") from None


def _webdataset_rows(file: Path, wanted: Wanted) -> Iterator[Any]:
    """A tar file is read from its beginning, whatever is wanted of it."""
    name, members, number = None, {}, 0  # members: None of a record that is not wanted

    def record() -> Any:
        return SKIPPED if members is None else _record_of_members(name, members)

    with tarfile.open(file, "r|*", tarinfo=_Member) as tar:
        while True:
            try:
                member = tar.next()
            except DAMAGE:
                if name is not None:
                    yield record()  # whole, for all that is known
                raise
            tar.members.clear()  # what tarfile remembers grows with the file
            if member is None:
                break
            stem, field = _name_and_field(member.name)
            if member.isdir() or not stem:
                continue
            if stem != name:
                if name is not None:
                    yield record()
                    number += 1
                name, members = stem, {} if wanted(number) else None
            if members is not None and (field in ("json", "txt") or _is_image(field)):
                members[field] = _content(tar, member, field in members)
    if name is not None:
        yield record()


def _name_and_field(member: str) -> tuple[str, str]:
    """The name of the record that a member belongs to, "" for none, and which field of it the member is."""
    folder, slash, base = member.rpartition("/")
    stem, _, field = base.partition(".")
    if not (stem and field) or base.startswith("__"):  # what systems and tools leave there
        return "", ""
    return f"{folder}{slash}{stem}", field.lower()


def _is_image(field: str) -> bool:
    return f".{field.rpartition('.')[2]}" in _image_suffixes()


@functools.cache
def _image_suffixes() -> frozenset[str]:
    from PIL import Image

    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, again: bool) -> bytes | Lost:
    if again:
        return Lost(f"the member {member.name} is there twice", "Give each record a name of its own")
    if not member.isreg():
        return Lost(f"the member {member.name} is a link or a device", "Store the file itself")
    return tar.extractfile(member).read()


def _record_of_members(name: str, members: dict[str, bytes | Lost]) -> dict[str, Any] | Lost:
    lost = next((content for content in members.values() if isinstance(content, Lost)), None)
    if lost is not None:
        return lost
    fields, caption, images = {}, {}, []
    for field in sorted(members, key=_natural):
        member, content = f"{name}.{field}", members[field]
        try:
            if field == "txt":
                caption = {"caption": content.decode("utf-8-sig")}
            elif field == "json":
                fields = json.loads(content)
            else:
                images.append({"path": member, "bytes": content})
        except UnicodeDecodeError as error:
            return Lost(f"the member {member} is not UTF-8 (at byte {error.start})", MEND)
        except json.JSONDecodeError as error:
            where = f"line {error.lineno}, column {error.colno}"
            return Lost(f"the member {member} is not JSON ({error.msg} at {where})", MEND)
        except (ValueError, RecursionError) as error:
            return Lost(f"the member {member} cannot be decoded ({_why(error)})", MEND)
    if not isinstance(fields, dict):
        return Lost(f"the member {name}.json holds a {type(fields).__name__}, not an object", MEND)
    if images:
        fields = {field: value for field, value in fields.items() if field != "images"} | {"image": images}
    return {"id": name} | caption | fields


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts "2.jpg" before "10.jpg"."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


READ = {"Parquet": _parquet_rows, "Arrow": _arrow_rows, "WebDataset": _webdataset_rows}

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
            return sum(batch.num_rows for batch in _arrow_batches(file))
    except (pa.ArrowException, OSError):
        pass  # damaged: how far it reads is seen when it is read
    return None
