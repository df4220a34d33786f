"""What the scores say as a whole, read in two streaming passes, and which samples to show."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from vig.reporting.views import Histogram
from vig.selection.rule import row_kinds, sample_draws, token_and_sample_vig
from vig.store.scores import read_scores
from vig.store.selections import hash_keys

FINE = 0.01  # nats a bin of the counting grid
REACH = 40.0  # nats; the grid's ends
BARS = 56  # of a histogram as drawn


class Counter:
    """Counts on a fine fixed grid, from which a histogram of any range is drawn afterwards."""

    def __init__(self):
        self.grid = np.zeros(round(2 * REACH / FINE), np.int64)
        self.total, self.count = 0.0, 0

    def add(self, values: np.ndarray) -> None:
        places = ((values + REACH) / FINE).clip(0, len(self.grid) - 1).astype(np.int64)
        self.grid += np.bincount(places, minlength=len(self.grid))
        self.total, self.count = self.total + float(values.sum()), self.count + len(values)

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    def histogram(self, tau: float | None = None, outside: float = 0.002) -> Histogram | None:
        """Bars from the `outside` quantile to the 1 - `outside` one, zero and tau within; None without values."""
        if not self.count:
            return None
        below = np.cumsum(self.grid)
        first = int(np.searchsorted(below, outside * self.count, side="right"))
        last = int(np.searchsorted(below, (1 - outside) * self.count))
        inside = [0.0] if tau is None else [0.0, tau]
        low = min(first * FINE - REACH, *(value - 2 * FINE for value in inside))
        high = max((last + 1) * FINE - REACH, *(value + 2 * FINE for value in inside))
        per_bar = max(1, int(np.ceil((high - low) / FINE / BARS)))
        origin = round(REACH / FINE)  # bars are cut at zero, so that each has one sign
        first_bar = int(np.floor(low / FINE / per_bar + 1e-9))
        bars = int(np.ceil(high / FINE / per_bar - 1e-9)) - first_bar
        owners = ((np.arange(len(self.grid)) - origin) // per_bar - first_bar).clip(0, bars - 1)
        counts = np.bincount(owners, self.grid, minlength=bars).astype(np.int64)
        width = per_bar * FINE
        return Histogram(first_bar * width, (first_bar + bars) * width, counts)


@dataclass
class Facts:
    """Counts and sums of a whole folder of scores, and the rows picked to be shown."""

    samples: Counter = field(default_factory=Counter)
    tokens: Counter = field(default_factory=Counter)
    text_only: int = 0
    errors: list[str] = field(default_factory=list)  # the first few messages
    n_errors: int = 0
    groups: dict[str, list[dict]] = field(default_factory=dict)  # "highest", "lowest", "random" -> score rows
    word_sum: np.ndarray = field(default_factory=lambda: np.zeros(0))  # by token id
    word_count: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def multimodal(self) -> int:
        return self.samples.count


def gather(scores, n_samples: int, seed: int = 0) -> Facts:
    """Read the scores: which samples are extreme first, then all tokens."""
    facts = Facts()
    picks = _pick(scores, n_samples, seed, facts)
    wanted = {row: name for name, rows in picks.items() for row in rows}
    found: dict[int, dict] = {}
    start = 0
    for batch in read_scores(scores):
        ok, _, lengths = row_kinds(batch)
        token_vig, _ = token_and_sample_vig(batch, ok, lengths[ok], None)
        facts.tokens.add(token_vig)
        _add_words(facts, batch, ok, token_vig)
        for row in wanted.keys() & range(start, start + batch.num_rows):
            found[row] = batch.slice(row - start, 1).to_pylist()[0]
        start += batch.num_rows
    facts.groups = {name: [found[row] for row in rows] for name, rows in picks.items()}
    return facts


def _pick(scores, n_samples: int, seed: int, facts: Facts) -> dict[str, list[int]]:
    """Row numbers of the highest, the lowest, and of a random third; none twice."""
    values, draws = [np.empty(0)], [np.empty(0, np.uint64)]
    for batch in read_scores(scores, ["key", "status", "n_tokens", "vig"], batch_size=1 << 16):
        ok, text_only, _ = row_kinds(batch)
        vig = np.where(ok, batch["vig"].to_numpy(zero_copy_only=False), np.nan)
        facts.samples.add(vig[ok])
        facts.text_only += int(text_only.sum())
        lost = ~ok & ~text_only
        facts.n_errors += int(lost.sum())
        if lost.any() and len(facts.errors) < 5:
            rows = batch.filter(pa.array(lost)).slice(0, 5 - len(facts.errors))
            facts.errors += [
                f"{key}: {status.removeprefix('error: ')}"
                for key, status in zip(rows["key"].to_pylist(), rows["status"].to_pylist(), strict=True)
            ]
        draw = sample_draws(hash_keys(batch["key"]), seed)
        values.append(vig)
        draws.append(np.where(lost, np.uint64(2**64 - 1), draw))
    vig, draw = np.concatenate(values), np.concatenate(draws)
    return _thirds(vig, draw, n_samples, facts.multimodal, facts.multimodal + facts.text_only)


def _thirds(vig: np.ndarray, draw: np.ndarray, n: int, multimodal: int, scored: int) -> dict[str, list[int]]:
    third = min(-(-n // 3), -(-multimodal // 3))
    order = np.argsort(-vig, kind="stable")[:multimodal]  # NaN, which has no VIG, comes last
    highest = order[:third].tolist()
    lowest = order[max(third, multimodal - third) :][::-1].tolist()
    taken = {*highest, *lowest}
    shuffled = np.argsort(draw, kind="stable")[:scored]
    others = [row for row in shuffled[: n + len(taken)].tolist() if row not in taken]
    return {"highest": highest, "lowest": lowest, "random": others[: max(0, n - len(taken))]}


def _add_words(facts: Facts, batch: pa.RecordBatch, ok: np.ndarray, token_vig: np.ndarray) -> None:
    ids = batch.filter(pa.array(ok))["token_ids"].flatten().to_numpy()
    if not len(ids):
        return
    size = max(len(facts.word_count), int(ids.max()) + 1)
    sums, counts = np.bincount(ids, token_vig, size), np.bincount(ids, minlength=size)
    sums[: len(facts.word_sum)] += facts.word_sum
    counts[: len(facts.word_count)] += facts.word_count
    facts.word_sum, facts.word_count = sums, counts
