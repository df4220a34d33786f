"""Distributions of values that stream by: counts on a grid that widens with them, in constant memory."""

from __future__ import annotations

import math

import numpy as np

from vig.reporting.views import Box, Histogram

BINS = 1 << 15  # a group; half of them below zero
REACH = 64.0  # nats; values beyond are counted in the end bins
SMALLEST = -40  # exponent of the finest bin: 2^-40 nats
BARS = 56  # about how many, of a histogram as drawn


class Counter:
    """Counts of values, by group, on bins of 2^e nats. e is the smallest for which all values fit the bins.

    The bins are doubled when a value does not fit: neighbours are joined, so that the counts depend on neither the
    order of the values nor the batches. At the reach of 64 nats a bin is 2^-8 nats.
    """

    def __init__(self, groups: int = 1):
        self.grid = np.zeros((groups, BINS), np.int64)
        self.sums = np.zeros(groups)
        self.exponent = SMALLEST

    @property
    def unit(self) -> float:
        """Width of a bin, nats."""
        return 2.0**self.exponent

    @property
    def counts(self) -> np.ndarray:
        """(groups,) int64"""
        return self.grid.sum(axis=1)

    @property
    def count(self) -> int:
        return int(self.grid.sum())

    @property
    def mean(self) -> float:
        return float(self.sums.sum()) / self.count if self.count else 0.0

    def add(self, values: np.ndarray, groups: np.ndarray | None = None) -> None:
        """values (n,), nats; groups (n,) int, 0 unless given."""
        if not len(values):
            return
        self._widen(min(float(np.abs(values).max()), REACH * (1 - 2.0**-20)))
        scaled = np.multiply(values, 2.0**-self.exponent)  # exact, as a power of two is
        np.clip(np.floor(scaled, out=scaled), -BINS // 2, BINS // 2 - 1, out=scaled)
        places, n = scaled.astype(np.int64), len(self.grid)
        places += BINS // 2 if groups is None else groups.astype(np.int64) * BINS + BINS // 2
        self.grid += np.bincount(places, minlength=n * BINS).reshape(n, BINS)
        self.sums += values.sum() if groups is None else np.bincount(groups, values, n)

    def grown(self, groups: int) -> Counter:
        """The same counts, with room for more groups."""
        other = Counter(groups)
        other.exponent = self.exponent
        other.grid[: len(self.grid)], other.sums[: len(self.sums)] = self.grid, self.sums
        return other

    def _widen(self, largest: float) -> None:
        while largest >= self.unit * (BINS // 2):
            if not self.grid.any():  # nothing to join yet
                self.exponent = max(SMALLEST, math.frexp(largest)[1] - (BINS // 2).bit_length() + 1)
                return
            joined = self.grid.reshape(len(self.grid), -1, 2).sum(axis=2)
            self.grid[:] = 0
            self.grid[:, BINS // 4 : BINS // 4 + BINS // 2] = joined
            self.exponent += 1

    def box(self, group: int = 0) -> Box | None:
        """Quantiles of a group, interpolated within a bin; None without values."""
        counts = self.grid[group]
        total = int(counts.sum())
        if not total:
            return None
        below = np.cumsum(counts)
        found = []
        for share in (0.05, 0.25, 0.5, 0.75, 0.95):
            rank = share * (total - 1) + 0.5
            place = int(np.searchsorted(below, rank))
            inside = (rank - (below[place] - counts[place])) / counts[place]
            found.append((place - BINS // 2 + inside) * self.unit)
        return Box(*found, mean=float(self.sums[group]) / total, count=total)

    def boxes(self, names: list[str]) -> list[tuple[str, Box]]:
        """(name, box) of the groups that have values."""
        pairs = ((name, self.box(group)) for group, name in enumerate(names))
        return [(name, box) for name, box in pairs if box is not None]

    def histogram(self, tau: float | None = None, outside: float = 0.002) -> Histogram | None:
        """Bars from the `outside` quantile to the 1 - `outside` one, zero and tau within; None without values."""
        grid, total = self.grid.sum(axis=0), self.count
        if not total:
            return None
        below = np.cumsum(grid)
        first = int(np.searchsorted(below, outside * total, side="right")) - BINS // 2
        last = int(np.searchsorted(below, (1 - outside) * total)) - BINS // 2
        inside = [0] if tau is None else [0, math.floor(tau / self.unit)]
        low, high = (
            min(first, *(place - 2 for place in inside)),
            max(last + 1, *(place + 3 for place in inside)),
        )
        per_bar = max(1, math.ceil((high - low) / BARS))
        first_bar = low // per_bar  # bars are cut at zero, so that each has one sign
        bars = -(-high // per_bar) - first_bar
        owners = ((np.arange(BINS) - BINS // 2) // per_bar - first_bar).clip(0, bars - 1)
        counts = np.bincount(owners, grid, minlength=bars).astype(np.int64)
        width = per_bar * self.unit
        return Histogram(first_bar * width, (first_bar + bars) * width, counts)
