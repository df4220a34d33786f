"""JSON: an array, or one object a line, told apart by the first character; decoded a record at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vig.data.rows import SKIPPED, Lost, Wanted, every

MAX_RECORD = 1 << 28  # characters; a longer run without a record means that the JSON is broken
SHORTEN = "Shorten or remove it"


def json_rows(path: Path, wanted: Wanted = every) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        first = next((char for line in file for char in line if not char.isspace()), "")
        file.seek(0)
        yield from array_rows(file) if first == "[" else _line_rows(file, wanted)


def count_json(path: Path) -> int:
    return sum(1 for _ in json_rows(path))


def _line_rows(file, wanted: Wanted) -> Iterator[Any]:
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


def _decoded(buffer: str, at: int) -> tuple[Any, int, str | None]:
    """The item of an array at `at`, where it ends, and what is wrong with it. Raises JSONDecodeError."""
    try:
        return *json.JSONDecoder().raw_decode(buffer, at), None
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        _, end = json.JSONDecoder(parse_int=len).raw_decode(buffer, at)
        return None, end, f"the record cannot be decoded ({why_undecodable(error)})"


def why_undecodable(error: ValueError | RecursionError) -> str:
    """Python takes neither integers of thousands of digits nor thousands of brackets within each other."""
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(":")[0]


def array_rows(file, chunk: int = 1 << 20) -> Iterator[Any]:
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
                yield Lost(problem, "Join all of it into one array")
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
            yield Lost(f"the JSON array breaks off after {number} records ({where})")
            return
        except RecursionError as error:
            yield Lost(f"the JSON array breaks off after {number} records ({why_undecodable(error)})")
            return
        yield item if problem is None else Lost(problem, SHORTEN)
        number, at, chunk = number + 1, end, 1 << 20


def _rest(buffer: str, file, chunk: int = 1 << 20) -> Iterator[str]:
    while buffer:
        yield buffer
        buffer = file.read(chunk)
