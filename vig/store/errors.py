"""The error rows of scores, gathered: `_errors.jsonl` beside them, and counts by reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow.compute as pc

from vig.data.error_log import ErrorLog
from vig.store.folder import shards_in
from vig.store.scores import read_scores

ERRORS = "_errors.jsonl"  # readers of Parquet folders skip names that begin with "_"


def stored_errors(scores: str | Path) -> Iterator[tuple[str, str, str]]:
    """(key, id, message) of the rows that could not be scored, in reading order."""
    for batch in read_scores(scores, ["key", "id", "status"]):
        rows = batch.filter(pc.starts_with(batch["status"], "error: "))
        for key, id, status in zip(
            *(rows[name].to_pylist() for name in ("key", "id", "status")), strict=True
        ):
            yield key, id, status.removeprefix("error: ")


def log_errors(folder: Path) -> ErrorLog:
    """Writes all errors of a folder of scores into its `_errors.jsonl`, which goes where there are none."""
    path = folder / ERRORS
    with ErrorLog(path) as log:
        if shards_in(folder):
            log.extend(stored_errors(folder))
    if not log.count:
        path.unlink(missing_ok=True)
    return log
