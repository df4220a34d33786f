"""Two scorings of one dataset beside each other: another model, null image, sigma, checkpoint or dtype.

    rank correlation   Spearman's: Pearson's of the ranks, ties at their mean rank (Spearman 1904)
    overlap at p       |kept by both| / |kept by either|, of samples, and of tokens where the answers have equal tokens
    moved most         by percentile: 100 (rank - 1) / (n - 1) in the one scoring and in the other

Memory: 40 bytes a sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from vig.data.files import StoreError
from vig.data.kinds import refuse_selections
from vig.selection.rule import check_easy, easy_tokens, row_kinds, token_and_sample_vig
from vig.selection.sources import Sources
from vig.selection.stop_tokens import Stops
from vig.store.folder import SettingsDiffer, settings_differences
from vig.store.scores import open_scores, read_scores, score_metadata
from vig.store.selections import hash_keys

SHARES = (10, 30, 50, 70, 90)  # per cent at which overlaps are told beside p
LISTED = 12  # sources of which a terminal shows the overlap


@dataclass(frozen=True)
class Moved:
    """A sample that moved: its key, source, row numbers, VIG in nats and percentile in both scorings."""

    key: str
    source: str
    row_a: int
    row_b: int
    vig_a: float
    vig_b: float
    percentile_a: float
    percentile_b: float


@dataclass(frozen=True)
class SourceComparison:
    """What both scorings say of one source."""

    source: str
    samples: int
    rank_correlation: float | None
    mean_vig_a: float
    mean_vig_b: float
    kept_a: int  # at p
    kept_b: int
    overlap: float | None


@dataclass
class Comparison:
    """Of two scorings, A and B. VIG in nats, shares from 0 to 1; None where there is nothing to divide by."""

    names: tuple[str, str]
    differences: list[tuple[str, Any, Any]]  # settings: (name, in A, in B)
    p: float
    samples: int  # with VIG in both
    only_a: int
    only_b: int
    rank_correlation: float | None
    mean_vig: tuple[float, float]
    largest_difference: float  # of sample VIG
    taus: tuple[float, float]
    sample_overlap: dict[float, float]  # by p
    token_overlap: float | None  # at p; None where the answers have other tokens
    keep_easy: float | None  # nats; easy tokens count as kept in it
    sources: list[SourceComparison]
    rose: list[Moved]
    fell: list[Moved]
    identical: bool
    points: np.ndarray = field(repr=False)  # (n, 2) sample VIG in A and B, at most POINTS, seeded

    @property
    def settings(self) -> str:
        """At which the tokens are compared."""
        easy = (
            ""
            if self.keep_easy is None
            else f", with the tokens under {self.keep_easy:g} nats without the image"
        )
        return f"at p = {self.p:g}{easy}"

    def as_dict(self) -> dict[str, Any]:
        """Everything but the points, for JSON."""
        made = {name: value for name, value in vars(self).items() if name != "points"}
        made["sample_overlap"] = {f"{p:g}": share for p, share in self.sample_overlap.items()}
        for name in ("sources", "rose", "fell"):
            made[name] = [asdict(row) for row in made[name]]
        return made

    def lines(self) -> list[str]:
        """Lines for a terminal."""
        a, b = self.names
        lines = [f"A: {a}", f"B: {b}"]
        lines += [f"  {name}: A {old!r}, B {new!r}" for name, old, new in self.differences]
        lines += [] if self.differences else ["  no setting differs"]
        lines.append(
            f"samples        {self.samples:,} with VIG in both; {self.only_a:,} in A alone, {self.only_b:,} in B"
        )
        if self.identical:
            return [*lines, "identical: every token has the same VIG in both"]
        correlation = "none" if self.rank_correlation is None else f"{self.rank_correlation:.4f}"
        shares = ", ".join(f"{100 * share:.1f} % at p = {p:g}" for p, share in self.sample_overlap.items())
        lines += [
            f"rank corr.     {correlation} (Spearman, sample VIG)",
            f"mean VIG       A {self.mean_vig[0]:+.4f}, B {self.mean_vig[1]:+.4f} nats; largest difference "
            f"{self.largest_difference:.4g}",
            f"kept by both   {shares}, of the samples kept by either",
        ]
        if self.token_overlap is not None:
            lines.append(f"tokens         {100 * self.token_overlap:.1f} % {self.settings}")
        if len(self.sources) > 1:
            lines += [_source_line(row) for row in self.sources[:LISTED]]
            more = len(self.sources) - LISTED
            lines += [f"  and {more} more sources"] if more > 0 else []
        for title, moved in (("rose most, A to B", self.rose[:3]), ("fell most", self.fell[:3])):
            lines += [f"{title}:", *map(_moved_line, moved)] if moved else []
        return lines


def _source_line(row: SourceComparison) -> str:
    correlation = "none" if row.rank_correlation is None else f"{row.rank_correlation:.3f}"
    overlap = "none" if row.overlap is None else f"{100 * row.overlap:.1f} %"
    return (
        f"  {row.source}: {row.samples:,} samples, rank corr. {correlation}, kept A {row.kept_a:,}, B {row.kept_b:,}, "
        f"by both {overlap}"
    )


def _moved_line(row: Moved) -> str:
    return (
        f"  {row.key}: percentile {row.percentile_a:.0f} -> {row.percentile_b:.0f}, "
        f"VIG {row.vig_a:+.3f} -> {row.vig_b:+.3f}"
    )


POINTS = 2000


@dataclass
class _Side:
    """The samples with VIG of one scoring."""

    hashes: np.ndarray  # (n,) uint64 of the keys, as they stand
    vig: np.ndarray  # (n,) nats
    rows: np.ndarray  # (n,) row numbers
    codes: np.ndarray  # (n,) of the sources


def compare(
    a,  # folder, file, list of them, what `Scorer.score` returned, or a pyarrow Table of scores
    b,
    p: float = 70.0,
    *,
    moved: int = 24,
    keep_easy: float | None = None,
) -> Comparison:
    """Compare two scorings of one dataset; B is told relative to A.

    moved: how many samples are listed in each direction. Samples are matched by key; overlaps follow `select` at p with
    level "both" and its other defaults.
    keep_easy: as `select` takes it: the overlap of the tokens counts those with nll_null_t < keep_easy as kept, in
    every sample. That of the samples stays the one by VIG.

    Raises SettingsDiffer where the scores are of other data, StoreError where they share no sample with VIG or cannot
    be read, ValueError for a p or a keep_easy that makes no sense.
    """
    check_p(p)
    check_easy(keep_easy)
    refuse_selections(a, b)
    a, b = open_scores(a), open_scores(b)
    about = score_metadata(a), score_metadata(b)
    _refuse_other_data(*about)
    sources = Sources()
    one, two = _read(a, sources), _read(b, sources)
    at_a, at_b = _matched(one.hashes, two.hashes)
    if not len(at_a):
        raise StoreError("the scores share no sample that has a VIG in both: are they of the same data?")
    vig = np.stack([one.vig[at_a], two.vig[at_b]])
    ranks = np.stack([mean_ranks(values) for values in vig])
    kept = {share: np.stack([_keeps(values, share) for values in vig]) for share in sorted({*SHARES, p})}
    stops = [Stops.of(one, "keep", "all") for one in about]
    tokens = _Tokens([float(np.percentile(values, 100 - p)) for values in vig], stops, keep_easy)
    tokens.read(a, b)
    rose, fell = _movers(a, b, (one.rows[at_a], two.rows[at_b]), vig, ranks, moved)
    places = np.linspace(0, len(at_a) - 1, min(POINTS, len(at_a))).astype(np.int64)
    order = np.argsort(one.hashes[at_a], kind="stable")  # a seeded draw: by the hash of the key
    return Comparison(
        names=tuple("scores" if isinstance(x, pa.Table) else str(x) for x in (a, b)),
        differences=settings_differences(*({**x, "notes": {}} for x in about)),
        p=p,
        samples=len(at_a),
        only_a=len(one.vig) - len(at_a),
        only_b=len(two.vig) - len(at_b),
        rank_correlation=_pearson(*ranks),
        mean_vig=(float(vig[0].mean()), float(vig[1].mean())),
        largest_difference=float(np.abs(vig[0] - vig[1]).max()),
        taus=tuple(tokens.taus),
        sample_overlap={share: _overlap(*marks) or 0.0 for share, marks in kept.items()},
        token_overlap=tokens.overlap,
        keep_easy=keep_easy,
        sources=_by_source(one.codes[at_a], sources.names, vig, ranks, kept[p]),
        rose=rose,
        fell=fell,
        identical=tokens.identical and len(at_a) == len(one.vig) == len(two.vig),
        points=vig[:, order[places]].T,
    )


def check_p(p: float) -> None:
    """Raises ValueError for a percentage that makes no sense."""
    if not 0 < p <= 100:
        raise ValueError(f"p is the percentage of samples to keep, above 0 and up to 100; got {p!r}")


def _refuse_other_data(a: dict, b: dict) -> None:
    prints = [about.get("data_fingerprint") for about in (a, b)]
    if None not in prints and prints[0] != prints[1]:
        names = [str(about.get("data")) for about in (a, b)]
        rows = [("data", *names)] if names[0] != names[1] else []
        raise SettingsDiffer(
            "the scores are of other data",
            ("A has", "B"),
            [*rows, ("content of the data", *prints)],
            "Score the same data file twice to compare models, nulls or settings.",
        )


def _read(scores, sources: Sources) -> _Side:
    hashes, vigs, rows, codes, start = [], [], [], [], 0
    columns = ["key", "source", "status", "n_tokens", "vig"]
    for batch in read_scores(scores, columns, batch_size=1 << 16):
        ok, _, _ = row_kinds(batch)
        hashes.append(hash_keys(batch["key"])[ok])
        vigs.append(batch["vig"].to_numpy(zero_copy_only=False)[ok])
        rows.append(np.flatnonzero(ok) + start)
        codes.append(sources.codes(batch["source"])[ok])
        start += batch.num_rows
    return _Side(*(np.concatenate([np.empty(0, t), *x]) for x, t in (
        (hashes, np.uint64), (vigs, np.float64), (rows, np.int64), (codes, np.int64))))  # fmt: skip


def _matched(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places in a and in b of equal hashes, in the order of a."""
    if np.array_equal(a, b):
        return np.arange(len(a)), np.arange(len(b))
    _, at_a, at_b = np.intersect1d(a, b, return_indices=True)
    order = np.argsort(at_a, kind="stable")
    return at_a[order], at_b[order]


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """(n,) ranks from 1, ties at the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _pearson(x: np.ndarray, y: np.ndarray) -> float | None:
    x, y = x - x.mean(), y - y.mean()
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norm if norm else None


def _keeps(vig: np.ndarray, p: float) -> np.ndarray:
    return vig >= np.percentile(vig, 100 - p)


def _overlap(a: np.ndarray, b: np.ndarray) -> float | None:
    either = int((a | b).sum())
    return int((a & b).sum()) / either if either else None


def _by_source(codes, names: list[str], vig, ranks, kept) -> list[SourceComparison]:
    """A row a source, the largest first. Overlaps are of one tau over all samples."""
    found = []
    for code in np.unique(codes).tolist():
        mine = codes == code
        marks = kept[:, mine]
        found.append(
            SourceComparison(
                names[code],
                int(mine.sum()),
                _pearson(mean_ranks(ranks[0][mine]), mean_ranks(ranks[1][mine])),
                float(vig[0][mine].mean()),
                float(vig[1][mine].mean()),
                int(marks[0].sum()),
                int(marks[1].sum()),
                _overlap(*marks),
            )
        )
    return sorted(found, key=lambda row: (-row.samples, row.source))


class _Tokens:
    """Overlap of the kept tokens, and whether all values are equal; both scorings are streamed side by side.

    Where rows stand in another order, or answers have other tokens, there is no overlap to tell."""

    def __init__(self, taus: list[float], stops: list[Stops], keep_easy: float | None):
        self.taus, self.stops, self.keep_easy = taus, stops, keep_easy
        self.both = self.either = 0
        self.comparable = self.equal = True

    @property
    def overlap(self) -> float | None:
        return self.both / self.either if self.comparable and self.either else None

    @property
    def identical(self) -> bool:
        return self.comparable and self.equal

    def read(self, a, b) -> None:
        columns = ["key", "status", "n_tokens", "vig", "token_ids", "positions"]
        columns += ["token_nll_image", "token_nll_null"]
        for left, right in _side_by_side(read_scores(a, columns), read_scores(b, columns)):
            if left is None or not left["key"].equals(right["key"]):
                self.comparable = False
                return
            kinds = [row_kinds(batch) for batch in (left, right)]
            ok = kinds[0][0] & kinds[1][0]
            rows = [batch.filter(pa.array(ok)) for batch in (left, right)]
            if not rows[0]["token_ids"].equals(rows[1]["token_ids"]):
                self.comparable = False
                return
            self._count(rows, kinds[0][2][ok])
            self.equal = self.equal and bool((kinds[0][0] == kinds[1][0]).all())

    def _count(self, rows: list[pa.RecordBatch], lengths: np.ndarray) -> None:
        every, marks, values = np.ones(len(lengths), bool), [], []
        for batch, tau, stops in zip(rows, self.taus, self.stops, strict=True):
            token_vig, vig = token_and_sample_vig(batch, every, lengths, None)
            passed = token_vig >= tau
            if stops.keep:
                passed |= stops.mask(batch, every)
            kept = passed & np.repeat(vig >= tau, lengths)
            marks.append(kept if self.keep_easy is None else kept | easy_tokens(batch, every, self.keep_easy))
            values.append(token_vig)
        self.both += int((marks[0] & marks[1]).sum())
        self.either += int((marks[0] | marks[1]).sum())
        self.equal = self.equal and np.array_equal(*values)


def _side_by_side(
    a: Iterator[pa.RecordBatch], b: Iterator[pa.RecordBatch]
) -> Iterator[tuple[pa.RecordBatch | None, pa.RecordBatch | None]]:
    """Batches of the same rows of both; (None, None) where one ends before the other."""
    left = right = None
    while True:
        left = left if left is not None and left.num_rows else next(a, None)
        right = right if right is not None and right.num_rows else next(b, None)
        if left is None or right is None:
            if left is not right:
                yield None, None
            return
        rows = min(left.num_rows, right.num_rows)
        yield left.slice(0, rows), right.slice(0, rows)
        left, right = left.slice(rows), right.slice(rows)


def _movers(a, b, rows, vig, ranks, count: int) -> tuple[list[Moved], list[Moved]]:
    """The samples whose percentile rose most, and those whose fell most; ties in the order of the data."""
    scale = 100 / max(len(ranks[0]) - 1, 1)
    change = ranks[1] - ranks[0]
    order = np.argsort(-change, kind="stable")
    picks = [place for place in order[:count].tolist() if change[place] > 0]
    drops = [place for place in order[::-1][:count].tolist() if change[place] < 0]
    names = _names(a, {int(rows[0][place]) for place in [*picks, *drops]})

    def row(place: int) -> Moved:
        key, source = names[int(rows[0][place])]
        percentiles = ((ranks[side][place] - 1) * scale for side in (0, 1))
        return Moved(
            key, source, int(rows[0][place]), int(rows[1][place]), float(vig[0][place]), float(vig[1][place]),
            *map(float, percentiles),
        )  # fmt: skip

    return [row(place) for place in picks], [row(place) for place in drops]


def _names(scores, rows: set[int]) -> dict[int, tuple[str, str]]:
    """Key and source of these rows."""
    found, start = {}, 0
    for batch in read_scores(scores, ["key", "source"], batch_size=1 << 16):
        for row in [row for row in rows if start <= row < start + batch.num_rows]:
            found[row] = batch["key"][row - start].as_py(), batch["source"][row - start].as_py() or ""
        start += batch.num_rows
    return found
