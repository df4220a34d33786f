"""Which comparisons are made of the experiment's lines, and how. Fixed in the repository before the runs.

A comparison is a difference of two arms, paired by seed: data, order of training and exams are those of the other arm.

- Primary, one test: the interaction. VIG minus all tokens with three quarters of the answers blind, minus the same
  difference with none; right colour.
- Secondary, Holm within the family: VIG minus all, and VIG minus the loss filter, at each share of blind answers, in
  right colour, in whole answers and in CHAIR_i: 24 tests.
- Controls, Holm: VIG minus random, and minus permuted VIG, at each share; right colour: is it VIG that does it?
- Easy tokens, Holm: VIG with easy tokens minus all, at each share, in right colour and in whole answers.
- Habit base, Holm: VIG minus all, and minus the loss filter, at its shares; right colour.
- All else is described, with intervals, and not tested.

Intervals and p are of a paired t over seeds, two-sided, 95 %, not adjusted; Holm adjusts p alone. Beside it stands a
bootstrap over seeds and pictures, both drawn anew: the t interval is of these pictures, the bootstrap of any such.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from benchmarks.evidence.design import (
    EXAMS,
    HABIT_SHARES,
    RATES,
    SHARES,
    UNTUNED,
    Run,
)
from benchmarks.evidence.exams import undigits, unpacked

LEVEL = 0.05  # of the tests, and 1 - LEVEL of the intervals
DRAWS, DRAW_SEED = 10_000, 20_261_128  # of the bootstrap


class Measure(NamedTuple):
    """A figure of a line, and whether more of it is better (1), worse (-1), or neither (0)."""

    name: str
    field: str
    better: int


MEASURES = {
    measure.field: measure
    for measure in (
        Measure("right colour, %", "test_colour", 1),
        Measure("whole answer right, %", "test_exact", 1),
        Measure("answers from habit, %", "test_habit", -1),
        Measure("right colour where habit is right, %", "prior_colour", 1),
        Measure("CHAIR_i, %", "chair_i", -1),
        Measure("CHAIR_s, %", "chair_s", -1),
        Measure("objects named in captions, %", "recall", 1),
        Measure("loss on text-only answers, nats", "text_loss", -1),
        Measure("tokens trained on", "trained_tokens", 0),
        Measure("of them text-only, %", "text_share", 0),
        Measure("processor seconds of a training", "seconds", 0),
    )
}
COLOUR, EXACT, CHAIR = "test_colour", "test_exact", "chair_i"


class Cell(NamedTuple):
    """An arm at a share of blind answers, over its seeds."""

    base: str
    share: float
    arm: str


class Comparison(NamedTuple):
    """The cells that are added and those that are taken away, and the measure."""

    plus: tuple[Cell, ...]
    minus: tuple[Cell, ...]
    measure: str


class Estimate(NamedTuple):
    """A mean difference over n seeds. nan: what cannot be told of so few seeds, or of no pictures."""

    n: int
    mean: float
    low: float
    high: float
    p: float
    picture_low: float = math.nan  # of the bootstrap over seeds and pictures
    picture_high: float = math.nan


class Lines:
    """The lines of an experiment by cell and seed. Runs of the learning-rate check stand apart."""

    def __init__(self, lines: Mapping[Run, dict]):
        self.cells: dict[Cell, dict[int, dict]] = {}
        self.rates: dict[tuple[float, str, float], dict[int, dict]] = {}  # (share, arm, times the rate)
        for run, line in lines.items():
            if run.is_rate_check:
                self.rates.setdefault((run.share, run.arm, run.rate), {})[run.seed] = line
            else:
                self.cells.setdefault(Cell(run.base, run.share, run.arm), {})[run.seed] = line

    def seeds(self, cells: Iterable[Cell]) -> list[int]:
        """Those that all of these cells have."""
        found = [set(self.cells.get(cell, {})) for cell in cells]
        return sorted(set.intersection(*found)) if found else []

    def values(self, cell: Cell, field: str, seeds: Sequence[int]) -> np.ndarray:
        """(S,) float64."""
        return np.array([value_of(self.cells[cell][seed], field) for seed in seeds], float)

    def untuned(self, base: str) -> dict | None:
        """The line of the base before tuning."""
        return self.cells.get(Cell(base, 0.0, UNTUNED), {}).get(0)


def value_of(line: dict, field: str) -> float:
    """A figure of a line; nan where it has none."""
    if field == "text_share":
        return (
            100 * line["trained_text_tokens"] / line["trained_tokens"]
            if "trained_tokens" in line
            else math.nan
        )
    if field == "seconds":
        return line["seconds"].get("training", math.nan)
    return line.get(field, math.nan)


# ---- estimates


def paired(differences: np.ndarray) -> Estimate:
    """Mean, t interval and two-sided p of differences (S,), one a seed.

    Equal differences that are not 0 have p = 0; S differences of 0 have p = 1.
    """
    from scipy import stats

    n = len(differences)
    mean = float(np.mean(differences)) if n else math.nan
    if n < 2:
        return Estimate(n, mean, math.nan, math.nan, math.nan)
    error = float(np.std(differences, ddof=1) / math.sqrt(n))
    half = float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
    return Estimate(n, mean, mean - half, mean + half, p)


def estimate(lines: Lines, comparison: Comparison) -> Estimate:
    """Of the seeds that all cells of the comparison have."""
    cells = (*comparison.plus, *comparison.minus)
    seeds = lines.seeds(cells)
    signs = [1.0] * len(comparison.plus) + [-1.0] * len(comparison.minus)
    parts = (
        sign * lines.values(cell, comparison.measure, seeds) for sign, cell in zip(signs, cells, strict=True)
    )
    found = paired(sum(parts, np.zeros(len(seeds))))
    if len(seeds) < 2 or comparison.measure not in _OF_PICTURES:
        return found
    low, high = _bootstrap(lines, comparison.measure, list(zip(signs, cells, strict=True)), seeds)
    return found._replace(picture_low=low, picture_high=high)


def _bootstrap(
    lines: Lines, measure: str, signed: list[tuple[float, Cell]], seeds: Sequence[int]
) -> tuple[float, float]:
    """The interval of the middle 95 % of the mean difference over DRAWS draws of seeds and, apart, of pictures."""
    count = EXAMS["captions" if measure == CHAIR else "test"][1]
    pictures, of_seeds = _draws(count, 0), _draws(len(seeds), 1)
    total = np.zeros((len(seeds), DRAWS))
    for sign, cell in signed:
        total += sign * _OF_PICTURES[measure]([lines.cells[cell][seed] for seed in seeds], pictures)
    means = np.einsum("ds,sd->d", of_seeds, total) / len(seeds)
    low, high = np.percentile(means, [100 * LEVEL / 2, 100 * (1 - LEVEL / 2)])
    return float(low), float(high)


@lru_cache(maxsize=4)
def _draws(count: int, stream: int) -> np.ndarray:
    """(DRAWS, count) float32: how often each is drawn; a row's sum is count."""
    rng = np.random.default_rng([DRAW_SEED, stream])
    rows = [
        rng.multinomial(count, np.full(count, 1 / count), size=1000).astype(np.float32)
        for _ in range(DRAWS // 1000)
    ]
    return np.concatenate(rows)


def _share_right(field: str) -> Callable[[list[dict], np.ndarray], np.ndarray]:
    def per_seed(found: list[dict], pictures: np.ndarray) -> np.ndarray:
        bits = np.stack([unpacked(line[field], pictures.shape[1]) for line in found]).astype(np.float32)
        return 100 * (bits @ pictures.T) / pictures.shape[1]  # (S, DRAWS)

    return per_seed


def _chair(found: list[dict], pictures: np.ndarray) -> np.ndarray:
    absent, named = (
        np.stack([undigits(line[field]) for line in found]).astype(np.float32)
        for field in ("captions_absent", "captions_named")
    )
    return 100 * (absent @ pictures.T) / np.maximum(named @ pictures.T, 1)


_OF_PICTURES = {
    COLOUR: _share_right("test_colour_bits"),
    EXACT: _share_right("test_exact_bits"),
    CHAIR: _chair,
}


def holm(p: Sequence[float]) -> list[float]:
    """p adjusted for as many tests as there are values; nan stays nan and is no test.

    Source: S. Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    places = sorted(
        (place for place, value in enumerate(p) if not math.isnan(value)), key=lambda place: p[place]
    )
    adjusted, largest = [math.nan] * len(p), 0.0
    for rank, place in enumerate(places):
        largest = max(largest, min(1.0, (len(places) - rank) * p[place]))
        adjusted[place] = largest
    return adjusted


# ---- the fixed comparisons


def difference(a: str, b: str, share: float, measure: str = COLOUR, base: str = "shipped") -> Comparison:
    """Arm a minus arm b. Without blind answers the oracle is the arm of all tokens."""
    cells = (
        Cell(base, share, "all" if arm == "oracle" and not share and base == "shipped" else arm)
        for arm in (a, b)
    )
    plus, minus = cells
    return Comparison((plus,), (minus,), measure)


def interaction(measure: str = COLOUR, a: str = "vig", b: str = "all") -> Comparison:
    """a minus b at the highest share of blind answers, minus the same at none."""
    most, none = SHARES[-1], SHARES[0]
    return Comparison(
        (Cell("shipped", most, a), Cell("shipped", none, b)),
        (Cell("shipped", most, b), Cell("shipped", none, a)),
        measure,
    )


PRIMARY = interaction()
FAMILIES: dict[str, tuple[Comparison, ...]] = {
    "secondary": tuple(
        difference("vig", other, share, measure)
        for measure in (COLOUR, EXACT, CHAIR)
        for other in ("all", "loss filter")
        for share in SHARES
    ),
    "controls": tuple(
        difference("vig", other, share) for other in ("random", "permuted") for share in SHARES
    ),
    "easy": tuple(
        difference("easy", "all", share, measure) for measure in (COLOUR, EXACT) for share in SHARES
    ),
    "habit": tuple(
        difference("vig", other, share, base="habit")
        for other in ("all", "loss filter")
        for share in HABIT_SHARES
    ),
}


class Tested(NamedTuple):
    comparison: Comparison
    estimate: Estimate
    adjusted_p: float  # by Holm within the family; nan where there are fewer than two seeds

    @property
    def direction(self) -> int:
        """1 where the first arm is better, -1 where it is worse, 0 where neither is shown at LEVEL."""
        if not self.adjusted_p < LEVEL:
            return 0
        return int(math.copysign(1, self.estimate.mean)) * MEASURES[self.comparison.measure].better


def primary(lines: Lines) -> Tested:
    found = estimate(lines, PRIMARY)
    return Tested(PRIMARY, found, found.p)


def tested(lines: Lines, family: str) -> list[Tested]:
    """The tests of a family, in their order."""
    found = [estimate(lines, comparison) for comparison in FAMILIES[family]]
    adjusted = holm([one.p for one in found])
    return [Tested(*parts) for parts in zip(FAMILIES[family], found, adjusted, strict=True)]


class RateCheck(NamedTuple):
    """Validation colour of an arm at a share under each learning rate: means over seeds."""

    share: float
    arm: str
    means: dict[float, float]  # times the rate -> per cent

    @property
    def best(self) -> float:
        return max(self.means, key=self.means.__getitem__)


def rate_checks(lines: Lines) -> list[RateCheck]:
    """Of the shares and arms that have a run at each rate."""
    keys = dict.fromkeys((share, arm) for share, arm, _ in lines.rates)
    found = []
    for share, arm in keys:
        at = {rate: lines.rates.get((share, arm, rate), {}) for rate in RATES}
        seeds = set.intersection(*(set(lines_) for lines_ in at.values()))
        if seeds:
            means = {
                rate: float(np.mean([lines_[seed]["validation_colour"] for seed in seeds]))
                for rate, lines_ in at.items()
            }
            found.append(RateCheck(share, arm, means))
    return sorted(found, key=lambda check: (check.share, check.arm))
