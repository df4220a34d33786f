"""Parquet and Arrow: the columns are the fields of a record; read through pyarrow, a few rows at a time.

(The streaming reader of `datasets` runs ahead of a slow consumer by two thirds of a Parquet file, and takes the magic
bytes of an Arrow file for a length of 1.3 GB.)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vig.data.rows import DAMAGE, SKIPPED, Lost, Wanted, check_header, reason_of

ROWS = 16  # decoded at a time


def parquet_rows(file: Path, wanted: Wanted) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file, memory_map=True, buffer_size=1 << 20, pre_buffer=False) as table:
        check_header(file, table.schema_arrow.names)
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
                lost = Lost(f"row group {group} of the Parquet file cannot be read ({reason_of(error)})")
                yield from (lost for _ in rows[done:])


def count_parquet(file: Path) -> int | None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(file).num_rows
    except (pa.ArrowException, OSError):  # damaged: how far it reads is seen when it is read
        return None


def _batch_rows(batch: Any, first: int, wanted: Wanted) -> list[Any]:
    """All records of a batch whose first row is number `first`, if one of them is wanted."""
    if any(map(wanted, range(first, first + batch.num_rows))):
        return batch.to_pylist()
    return [SKIPPED] * batch.num_rows


def arrow_rows(file: Path, wanted: Wanted) -> Iterator[Any]:
    number = 0
    for batch in _arrow_batches(file):
        check_header(file, batch.schema.names)
        for start in range(0, batch.num_rows, ROWS):
            few = batch.slice(start, ROWS)
            yield from _batch_rows(few, number, wanted)
            number += few.num_rows


def count_arrow(file: Path) -> int | None:
    import pyarrow as pa

    try:
        return sum(batch.num_rows for batch in _arrow_batches(file))
    except (pa.ArrowException, OSError):
        return None


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
