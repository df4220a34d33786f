"""The rows of a score file: schema, one sample as a row, many samples as columns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

METADATA_KEY = b"vig"  # of the Parquet files' metadata
LIST_LIMIT = 2**31 - 1  # offsets of an Arrow list are int32

SCORE_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("id", pa.string()),
        ("source", pa.string()),
        ("status", pa.string()),
        ("n_tokens", pa.int32()),
        ("vig", pa.float64()),
        ("nll_image", pa.float64()),
        ("nll_null", pa.float64()),
        ("token_ids", pa.list_(pa.int32())),
        ("positions", pa.list_(pa.int32())),
        ("token_nll_image", pa.list_(pa.float32())),
        ("token_nll_null", pa.list_(pa.float32())),
    ]
)


@dataclass
class ScoreRow:
    """One sample as scored. ``token_nll_null`` is empty for a text-only sample, every list for an error.

    vig = mean_t(token_nll_null_t - token_nll_image_t) in nats, in float64 (paper, section 3).
    """

    key: str
    id: str
    source: str = ""
    status: str = "ok"
    token_ids: Iterable[int] = ()
    positions: Iterable[int] = ()
    token_nll_image: Iterable[float] = ()
    token_nll_null: Iterable[float] = ()

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def nll_image(self) -> float | None:
        return _mean(self.token_nll_image)

    @property
    def nll_null(self) -> float | None:
        return _mean(self.token_nll_null)

    @property
    def vig(self) -> float | None:
        if not len(self.token_nll_null):
            return None
        difference = np.asarray(self.token_nll_null, np.float64) - np.asarray(
            self.token_nll_image, np.float64
        )
        return float(difference.mean())


def _mean(values) -> float | None:
    return float(np.mean(np.asarray(values, np.float64))) if len(values) else None


@dataclass
class ScoreBlock:
    """Many samples in columns, the quick way to append. R rows, S = n_tokens.sum() answer tokens.

    Token columns are the rows' tokens one after another. Values of ``token_nll_null`` that belong to
    text-only rows are not read (any filler will do). A row with status "ok" or "text_only" that has no
    token, or a value that is not finite, becomes an error row that says so; it is never stored as a score.
    """

    key: list[str]
    id: list[str]
    source: list[str]
    status: list[str]
    n_tokens: np.ndarray  # (R,) int32
    token_ids: np.ndarray  # (S,) int32
    positions: np.ndarray  # (S,) int32
    token_nll_image: np.ndarray  # (S,) float32
    token_nll_null: np.ndarray  # (S,) float32

    @classmethod
    def from_rows(cls, rows: Iterable[ScoreRow]) -> ScoreBlock:
        rows = list(rows)
        for row in rows:
            null_tokens = row.n_tokens if row.status == "ok" else 0
            lengths = (len(row.positions), len(row.token_nll_image), len(row.token_nll_null))
            if lengths != (row.n_tokens, row.n_tokens, null_tokens):
                raise ValueError(
                    f"{row.key} ({row.status}): {row.n_tokens} token_ids but positions, token_nll_image, "
                    f"token_nll_null have {lengths}; expected {(row.n_tokens, row.n_tokens, null_tokens)}"
                )

        def joined(name: str, dtype) -> np.ndarray:
            parts = [np.asarray(getattr(row, name), dtype) for row in rows]
            return np.concatenate(parts) if parts else np.empty(0, dtype)

        nulls = [
            np.asarray(row.token_nll_null if row.status == "ok" else np.zeros(row.n_tokens), np.float32)
            for row in rows
        ]
        return cls(
            *([getattr(row, name) for row in rows] for name in ("key", "id", "source", "status")),
            np.array([row.n_tokens for row in rows], np.int32),
            joined("token_ids", np.int32),
            joined("positions", np.int32),
            joined("token_nll_image", np.float32),
            np.concatenate(nulls) if nulls else np.empty(0, np.float32),
        )

    def table(self) -> pa.Table:
        """The rows as an Arrow table of SCORE_SCHEMA, with the sample values computed from the tokens."""
        lengths = np.asarray(self.n_tokens, np.int64)
        ids, positions, image, null = self._checked_tokens(lengths)
        ok, status, problems = self._judge(lengths, image, null)
        scored = ok | (status == "text_only")
        if (~scored & (lengths > 0)).any():  # error rows keep no tokens
            kept = np.repeat(scored, lengths)
            ids, positions, image, null = ids[kept], positions[kept], image[kept], null[kept]
            lengths = np.where(scored, lengths, 0)
        pair = np.repeat(ok, lengths) if not ok.all() else slice(None)
        image64, null64 = (
            image.astype(np.float64),
            np.where(np.repeat(ok, lengths), null, 0).astype(np.float64),
        )
        columns = [
            pa.array(self.key, pa.string()),
            pa.array(self.id, pa.string()),
            pa.array(self.source, pa.string()),
            pa.array([problems.get(row, text) for row, text in enumerate(self.status)], pa.string()),
            pa.array(lengths, pa.int32()),
            pa.array(segment_means(null64 - image64, lengths), pa.float64(), mask=~ok),
            pa.array(segment_means(image64, lengths), pa.float64(), mask=~scored),
            pa.array(segment_means(null64, lengths), pa.float64(), mask=~ok),
            list_array(ids, lengths, scored),
            list_array(positions, lengths, scored),
            list_array(image, lengths, scored),
            list_array(null[pair], np.where(ok, lengths, 0), ok),
        ]
        return pa.Table.from_arrays(columns, schema=SCORE_SCHEMA)

    def _checked_tokens(self, lengths: np.ndarray) -> list[np.ndarray]:
        rows, total = len(self.key), int(lengths.sum())
        for name in ("id", "source", "status", "n_tokens"):
            if len(getattr(self, name)) != rows:
                raise ValueError(f"expected {rows} values in {name}, got {len(getattr(self, name))}")
        if total > LIST_LIMIT:
            raise ValueError(f"{total} answer tokens in one shard; a file holds at most {LIST_LIMIT}")
        columns = []
        for name, dtype in (
            ("token_ids", "i4"),
            ("positions", "i4"),
            ("token_nll_image", "f4"),
            ("token_nll_null", "f4"),
        ):
            column = np.ascontiguousarray(getattr(self, name), dtype=dtype)
            if column.shape != (total,):
                raise ValueError(f"expected {name} ({total},) as n_tokens sums to, got {column.shape}")
            columns.append(column)
        return columns

    def _judge(self, lengths, image, null) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
        """Mask of ok rows, the status of each row, and the messages of rows that turn into errors."""
        status = np.array(self.status, dtype=object)
        ok, text_only = status == "ok", status == "text_only"
        unknown = ~ok & ~text_only & ~np.array([str(text).startswith("error: ") for text in status], bool)
        if unknown.any():
            row = int(np.argmax(unknown))
            raise ValueError(
                f'{self.key[row]}: status {status[row]!r} is not "ok", "text_only" or "error: ..."'
            )
        finite = np.isfinite(image) & (np.isfinite(null) | np.repeat(~ok, lengths))
        problems = {
            int(row): "error: no answer tokens" for row in np.flatnonzero((ok | text_only) & (lengths == 0))
        }
        if not finite.all():
            starts = np.cumsum(lengths) - lengths
            owners = np.searchsorted(starts + lengths, np.flatnonzero(~finite), side="right")
            for row, token in zip(owners.tolist(), np.flatnonzero(~finite).tolist(), strict=True):
                if ok[row] or text_only[row]:
                    values = f"nll_image {image[token]}" + (f", nll_null {null[token]}" if ok[row] else "")
                    text = f"error: answer token {token - starts[row]}: {values}; try --dtype float32"
                    problems.setdefault(row, text)
        for row, text in problems.items():
            status[row], ok[row] = text, False
        return ok, status, problems


def segment_means(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Mean of each run of ``lengths`` values, (R,) float64; 0.0 for an empty run.

    A run's bits depend on its own values only, not on the rows beside it."""
    means = np.zeros(len(lengths))
    filled = lengths > 0
    if filled.any():
        starts = (np.cumsum(lengths) - lengths)[filled]
        means[filled] = np.add.reduceat(values, starts) / lengths[filled]
    return means


def list_array(values, lengths: np.ndarray, valid: np.ndarray) -> pa.ListArray:
    """Arrow lists of the given lengths over ``values``; rows that are not valid (length 0) are null."""
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    mask = None if valid.all() else pa.array(~valid)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), mask=mask)
