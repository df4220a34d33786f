"""The rows of a score file: schema, one sample as a row, many samples as columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from vig.store.token_stats import TOKEN_STATS, StatColumn, stat_columns

METADATA_KEY = b"vig"  # of the Parquet files' metadata
LIST_LIMIT = 2**31 - 1  # offsets of an Arrow list are int32
CACHED_ROWS = 256  # whose float64 values, 300 kB for 150 tokens each, stay in the cache

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


def score_schema(stats: Iterable[str] = ()) -> pa.Schema:
    """SCORE_SCHEMA with the columns of these statistics behind it (`vig.store.token_stats`)."""
    more = [pa.field(column.name, pa.list_(pa.float32())) for column in stat_columns(stats)]
    return pa.schema([*SCORE_SCHEMA, *more])


@dataclass
class ScoreRow:
    """One sample as scored. ``token_nll_null`` is empty for a text-only sample, every column for an error.

    vig = mean_t(token_nll_null_t - token_nll_image_t) in nats, in float64 (paper, section 3).
    ``token_stats``: the statistics that were asked for, by the names of their columns (``token_kl``); of a text-only
    sample those of its one pass. The scorer's columns are arrays of the stored dtype, which are joined as they are;
    any other sequence is converted token by token.
    """

    key: str
    id: str
    source: str = ""
    status: str = "ok"
    token_ids: np.ndarray | Sequence[int] = ()  # (n,) int32
    positions: np.ndarray | Sequence[int] = ()  # (n,) int32
    token_nll_image: np.ndarray | Sequence[float] = ()  # (n,) float32
    token_nll_null: np.ndarray | Sequence[float] = ()  # (n,) float32
    token_stats: Mapping[str, np.ndarray] = field(default_factory=dict)  # column -> (n,) float32

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
    def token_vig(self) -> np.ndarray | None:
        """(n,) float64, token_nll_null - token_nll_image; None where `vig` is: without an image, or in an error row."""
        if not len(self.token_nll_null):
            return None
        return np.asarray(self.token_nll_null, np.float64) - np.asarray(self.token_nll_image, np.float64)

    @property
    def vig(self) -> float | None:
        token_vig = self.token_vig
        return None if token_vig is None else float(token_vig.mean())


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
    token_stats: Mapping[str, np.ndarray] = field(default_factory=dict)  # column -> (S,) float32

    @property
    def stats(self) -> tuple[str, ...]:
        """The statistics that it has, wholly or as far as its rows have them."""
        return tuple(
            name
            for name, columns in TOKEN_STATS.items()
            if any(column.name in self.token_stats for column in columns)
        )

    @classmethod
    def from_rows(cls, rows: Iterable[ScoreRow]) -> ScoreBlock:
        rows = list(rows)
        status = [row.status for row in rows]
        ids, n_tokens = _joined([row.token_ids for row in rows], np.int32)
        positions, n_positions = _joined([row.positions for row in rows], np.int32)
        image, n_image = _joined([row.token_nll_image for row in rows], np.float32)
        null, n_null = _joined([row.token_nll_null for row in rows], np.float32)
        ok = np.array([text == "ok" for text in status], bool)
        wrong = (n_positions != n_tokens) | (n_image != n_tokens) | (n_null != np.where(ok, n_tokens, 0))
        if wrong.any():
            row = int(wrong.argmax())
            n, n_expected = int(n_tokens[row]), int(n_tokens[row]) if ok[row] else 0
            raise ValueError(
                f"{rows[row].key} ({status[row]}): {n} token_ids but positions, token_nll_image, token_nll_null "
                f"have {(int(n_positions[row]), int(n_image[row]), int(n_null[row]))}; expected {(n, n, n_expected)}"
            )
        if len(null) < len(ids):  # a filler for rows that have no null pass
            filled = np.zeros(len(ids), np.float32)
            filled[np.repeat(ok, n_tokens)] = null
            null = filled
        names = ([getattr(row, name) for row in rows] for name in ("key", "id", "source"))
        return cls(*names, status, n_tokens, ids, positions, image, null, _stats_of(rows, len(ids)))

    def table(self, stats: Iterable[str] = ()) -> pa.Table:
        """The rows as an Arrow table of `score_schema(stats)`, with the sample values computed from the tokens."""
        more = stat_columns(stats)
        lengths = np.asarray(self.n_tokens, np.int64)
        ids, positions, image, null = self._checked_tokens(lengths)
        ok, status, problems = self._judge(lengths, image, null)
        scored = ok | (status == "text_only")
        extra = [self._stat(column, np.repeat(scored if column.of_nll else ok, lengths)) for column in more]
        if (~scored & (lengths > 0)).any():  # error rows keep no tokens
            kept = np.repeat(scored, lengths)
            ids, positions, image, null = ids[kept], positions[kept], image[kept], null[kept]
            extra = [values[kept] for values in extra]
            lengths = np.where(scored, lengths, 0)
        pair = slice(None)
        if not ok.all():
            pair = np.repeat(ok, lengths)
            null = np.where(pair, null, np.float32(0))
        vig, nll_image, nll_null = sample_means(image, null, lengths)
        columns = [
            pa.array(self.key, pa.string()),
            pa.array(self.id, pa.string()),
            pa.array(self.source, pa.string()),
            pa.array([problems.get(row, text) for row, text in enumerate(self.status)], pa.string()),
            pa.array(lengths, pa.int32()),
            pa.array(vig, pa.float64(), mask=~ok),
            pa.array(nll_image, pa.float64(), mask=~scored),
            pa.array(nll_null, pa.float64(), mask=~ok),
            list_array(ids, lengths, scored),
            list_array(positions, lengths, scored),
            list_array(image, lengths, scored),
            list_array(null[pair], np.where(ok, lengths, 0), ok),
        ]
        for column, values in zip(more, extra, strict=True):
            if column.of_nll is None:
                columns.append(list_array(values[pair], np.where(ok, lengths, 0), ok))
            else:
                columns.append(list_array(values, lengths, scored))
        return pa.Table.from_arrays(columns, schema=score_schema(stats))

    def _stat(self, column: StatColumn, needed: np.ndarray) -> np.ndarray:
        """A column of statistics, (S,) float32. needed: (S,) bool, the tokens that must have it."""
        if column.name not in self.token_stats and not needed.any():
            return np.zeros(len(needed), np.float32)
        if column.name not in self.token_stats:
            raise ValueError(f"{self.key[0]}: no {column.name}, which the settings of these scores ask for")
        values = np.ascontiguousarray(self.token_stats[column.name], np.float32)
        if values.shape != needed.shape:
            raise ValueError(f"expected {column.name} {needed.shape} as n_tokens sums to, got {values.shape}")
        return values

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
        finite = np.isfinite(image)
        finite &= np.isfinite(null) if ok.all() else np.isfinite(null) | np.repeat(~ok, lengths)
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


def _stats_of(rows: Sequence[ScoreRow], total: int) -> dict[str, np.ndarray]:
    """The rows' statistics one after another, (total,) float32 each; 0 where a row has no such value."""
    joined = {name: np.zeros(total, np.float32) for row in rows for name in row.token_stats}
    of_text = {column.name for column in stat_columns(TOKEN_STATS) if column.of_nll}
    start = 0
    for row in rows:
        end = start + row.n_tokens
        expected = {"ok": joined.keys(), "text_only": joined.keys() & of_text}.get(row.status, ())
        for name in expected if row.n_tokens else ():
            values = row.token_stats.get(name, ())
            if len(values) != row.n_tokens:
                raise ValueError(
                    f"{row.key} ({row.status}): {row.n_tokens} token_ids but {len(values)} values of {name}"
                )
            joined[name][start:end] = values
        start = end
    return joined


def _joined(parts: list[Sequence], dtype) -> tuple[np.ndarray, np.ndarray]:
    """The values of all parts one after another, and the length of each part, (R,) int32."""
    lengths = np.fromiter(map(len, parts), np.int32, len(parts))
    arrays = [np.asarray(part, dtype) for part in parts]
    return np.concatenate(arrays) if arrays else np.empty(0, dtype), lengths


def sample_means(image: np.ndarray, null: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(3, R) float64: the means of null - image, of image and of null (S,) over each run of ``lengths`` tokens."""
    means = np.empty((3, len(lengths)))
    ends = np.concatenate([[0], np.cumsum(lengths)])
    for first in range(0, len(lengths), CACHED_ROWS):
        rows = slice(first, min(first + CACHED_ROWS, len(lengths)))
        tokens = slice(ends[rows.start], ends[rows.stop])
        image64, null64 = image[tokens].astype(np.float64), null[tokens].astype(np.float64)
        for mean, values in zip(means, (null64 - image64, image64, null64), strict=True):
            mean[rows] = segment_means(values, lengths[rows])
    return means


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
