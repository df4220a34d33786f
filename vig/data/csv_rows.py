"""CSV and TSV with a header: its names are the fields of a record; an empty cell is what null is in JSON."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vig.data.json_rows import open_text
from vig.data.rows import SKIPPED, Lost, OfLine, Wanted, check_header

LONGEST_CELL = 1 << 28  # characters: pictures may be written in them


def csv_rows(path: Path, wanted: Wanted) -> Iterator[Any]:
    with open_text(path, newline="") as file:
        table = _table(path, file)
        header = next(table, [])
        check_header(path, header)
        for number, cells in enumerate(filter(None, table)):
            if not wanted(number):
                yield SKIPPED
            elif len(cells) != len(header):
                problem = f"line {table.line_num} has {len(cells)} cells, the header has {len(header)}"
                yield Lost(problem, "Quote cells that hold separators or line ends")
            else:
                yield OfLine(table.line_num, {n: cell or None for n, cell in zip(header, cells, strict=True)})


def count_csv(path: Path) -> int:
    with open_text(path, newline="") as file:
        return max(sum(1 for _ in filter(None, _table(path, file))) - 1, 0)


def _table(path: Path, file: Any) -> Any:
    csv.field_size_limit(LONGEST_CELL)
    return csv.reader(file, delimiter="\t" if path.name.lower().endswith(".tsv") else ",")
