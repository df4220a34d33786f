"""JSON, decoded a record at a time: an array, one object a line, an object that holds the array, or one record.

An array is known by its first character. An object is one record a line where the name says so (.jsonl, .ndjson) or its
first line is one; else it is a record, or holds the array of records in one of its fields. Files may be compressed.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from vig.data.formats import FIELDS, MEDIA_FIELDS
from vig.data.rows import SKIPPED, Lost, Wanted, every
from vig.data.sample import DataError

MAX_RECORD = 1 << 28  # characters; a longer run without a record means that the JSON is broken
CHUNK = 1 << 20  # characters read at a time
DECODER = json.JSONDecoder()
SHORTEN = "Shorten or remove it"
SPACE = re.compile(r"[ \t\r\n]*")
LINES = (".jsonl", ".ndjson")


def json_rows(path: Path, wanted: Wanted = every) -> Iterator[Any]:
    with open_text(path) as file:
        first = _first_character(file)
        file.seek(0)
        if first == "[":
            yield from array_rows(file)
        elif first == "{" and not _is_lines(path, file):
            file.seek(0)
            yield from _object_rows(file)
        else:
            file.seek(0)
            yield from _line_rows(file, wanted)


def count_json(path: Path) -> int:
    return sum(1 for _ in json_rows(path))


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """UTF-8 with or without a mark, compressed or not. Raises DataError for UTF-16 and UTF-32."""
    raw = (gzip.open if path.name.lower().endswith(".gz") else open)(path, "rb")
    try:
        start = raw.read(4)
        raw.seek(0)
    except BaseException:
        raw.close()
        raise
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in start:
        raw.close()
        cure = f"Make UTF-8 of it: iconv -f UTF-16 -t UTF-8 {path.name} > utf8-{path.name}"
        raise DataError(f"{path} is UTF-16 or UTF-32, expected UTF-8. {cure}")
    return io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _first_character(file: TextIO) -> str:
    while part := file.read(4096):
        if stripped := part.lstrip():
            return stripped[0]
    return ""


def _is_lines(path: Path, file: TextIO) -> bool:
    """Whether objects stand one a line: by the file's name, or since more follows the object of the first line."""
    if path.name.lower().removesuffix(".gz").endswith(LINES):
        return True
    line = next((line for line in file if line.strip()), "").strip()
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos < len(line)  # a broken line; at its end an object goes on
    except (ValueError, RecursionError):
        return True
    return _first_character(file) != ""


def _line_rows(file: TextIO, wanted: Wanted) -> Iterator[Any]:
    number = 0
    for line_number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line) if wanted(number) else SKIPPED
        except json.JSONDecodeError as error:
            problem = f"line {line_number} is not JSON ({error.msg} at column {error.colno})"
            yield Lost(problem, "Write one JSON object a line")
        except (ValueError, RecursionError) as error:
            yield Lost(f"line {line_number} cannot be decoded ({why_undecodable(error)})", SHORTEN)
        number += 1


def why_undecodable(error: ValueError | RecursionError) -> str:
    """Python takes neither integers of thousands of digits nor thousands of brackets within each other."""
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(":")[0]


class _Text:
    """JSON text that is read as it is needed, so that a file of any size needs the memory of one record."""

    def __init__(self, file: TextIO, chunk: int = CHUNK):
        self.file, self.chunk = file, chunk
        self.buffer, self.at, self.ended = "", 0, False

    def peek(self) -> str:
        """The next character that is no space, "" at the end."""
        while True:
            self.at = SPACE.match(self.buffer, self.at).end()
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self._more(self.chunk):
                return ""

    def value(self) -> tuple[Any, str | None]:
        """The value that begins here, and what is wrong with it. Raises JSONDecodeError and RecursionError."""
        chunk = self.chunk
        while True:
            try:
                item, end, problem = _decoded(self.buffer, self.at)
                # A number or a cut literal at the end of the buffer may go on in the next chunk.
                if end == len(self.buffer) and not self.ended:
                    raise json.JSONDecodeError("incomplete", self.buffer, end)
                self.at = end
                return item, problem
            except json.JSONDecodeError:
                if not self._more(chunk):
                    raise
                chunk *= 2  # a record larger than the chunk is read in few steps

    def _more(self, chunk: int) -> bool:
        if self.ended:
            return False
        more = "" if len(self.buffer) - self.at > MAX_RECORD else self.file.read(chunk)
        if more:
            self.buffer, self.at = self.buffer[self.at :] + more, 0
        else:
            self.ended = True
        return True


def _decoded(buffer: str, at: int) -> tuple[Any, int, str | None]:
    """The item of an array at `at`, where it ends, and what is wrong with it. Raises JSONDecodeError."""
    try:
        return *DECODER.raw_decode(buffer, at), None
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        _, end = json.JSONDecoder(parse_int=len).raw_decode(buffer, at)
        return None, end, f"the record cannot be decoded ({why_undecodable(error)})"


def array_rows(file: TextIO, chunk: int = CHUNK) -> Iterator[Any]:
    """Decodes the items of a file that is one JSON array."""
    text = _Text(file, chunk)
    text.peek()
    text.at += 1  # its bracket
    number = yield from _items(text)
    if number is not None and text.peek():
        behind = text.buffer[text.at : text.at + 20]
        problem = f"the JSON array ends after {number} records, but more follows ({behind!r} ...)"
        yield Lost(problem, "Join all of it into one array")


def _items(text: _Text) -> Iterator[Any]:
    """The items of the array whose bracket was read; returns how many they are, None where it breaks off."""
    number = 0
    while True:
        character = text.peek()
        if character == ",":
            text.at += 1
            continue
        if character == "]":
            text.at += 1
            return number
        try:
            item, problem = text.value()
        except (json.JSONDecodeError, RecursionError) as error:
            broken = isinstance(error, json.JSONDecodeError)
            where = f"{error.msg} at character {error.pos}" if broken else why_undecodable(error)
            yield Lost(f"the JSON array breaks off after {number} records ({where})")
            return None
        yield item if problem is None else Lost(problem, SHORTEN)
        number += 1


def _object_rows(file: TextIO) -> Iterator[Any]:
    """An object that is one record, or one of whose fields is the array of records."""
    text, fields, array = _Text(file), {}, None
    text.peek()
    text.at += 1  # its brace
    try:
        while (character := text.peek()) != "}":
            if character == ",":
                text.at += 1
                continue
            name, _ = text.value()
            if text.peek() == ":":
                text.at += 1
            if text.peek() != "[" or name in (*FIELDS, *MEDIA_FIELDS):
                fields[name], _ = text.value()
                continue
            text.at += 1
            if text.peek() == "{":
                if array is not None:
                    problem = (
                        f"of the arrays {array!r} and {name!r} of the JSON object only the first is read"
                    )
                    yield Lost(problem, "Write the records as an array of their own")
                    return
                array = name
                if (yield from _items(text)) is None:
                    return
            else:
                fields[name] = list(_items(text))
    except (json.JSONDecodeError, RecursionError) as error:
        yield Lost(f"the JSON object breaks off ({getattr(error, 'msg', why_undecodable(error))})")
        return
    if array is None:
        yield fields
