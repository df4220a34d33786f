"""Which samples a page shows: the extremes, both sides of tau, what is dropped, each source, and some at random.

Rows stream by once; each stratum keeps its best few, so memory does not grow with the scores. The same scores and seed
give the same samples. A page with room for all rows shows them all and draws nothing: it has no strata.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from vig.selection.sources import Sources

# name -> (label, what follows the number of samples, share of the page)
STRATA: dict[str, tuple[str, str, float]] = {
    "highest": ("highest VIG", "with the highest VIG of all", 0.2),
    "lowest": ("lowest VIG", "with the lowest", 0.2),
    "above": ("just above τ", "nearest above τ", 0.1),
    "below": ("just below τ", "nearest below it", 0.1),
    "dropped": ("random, below τ", "at random below it", 0.1),
    "errors": ("not scored", "at random from those that could not be scored", 0.05),
    "source": ("of its source", "at random within each source", 0.15),
    "random": ("at random", "at random from the rest", 1.0),  # what is left
}


class Pool:
    """The `size` rows with the smallest rank, of all that were offered; a tie goes to the earlier row."""

    def __init__(self, size: int):
        self.size = size
        self.ranks, self.rows = np.empty(0), np.empty(0, np.int64)

    def offer(self, ranks: np.ndarray, rows: np.ndarray) -> None:
        if not len(ranks) or not self.size:
            return
        if len(self.ranks) >= self.size:
            better = ranks < self.ranks[-1]
            ranks, rows = ranks[better], rows[better]
        ranks, rows = np.concatenate([self.ranks, ranks]), np.concatenate([self.rows, rows])
        order = np.lexsort((rows, ranks))[: self.size]
        self.ranks, self.rows = ranks[order], rows[order]


@dataclass
class Light:
    """A batch of rows without their tokens. VIG is NaN where there is none."""

    rows: np.ndarray  # (R,) int64, numbers in reading order
    vig: np.ndarray  # (R,) float64
    sources: np.ndarray  # (R,) codes
    text_only: np.ndarray  # (R,) bool
    lost: np.ndarray  # (R,) bool
    draws: np.ndarray  # (R,) uint64


class Picker:
    """Offers every row to the strata it belongs to; `picks` deals them out."""

    def __init__(self, samples: int, tau: float | None, sources: Sources):
        self.samples, self.tau, self.rows = samples, tau, 0
        self.pools = {name: Pool(samples) for name in STRATA if name != "source"}
        self.by_source = [Pool(samples) for _ in sources.names] if len(sources.names) > 1 else []

    def offer(self, batch: Light) -> None:
        self.rows += len(batch.rows)
        ok = ~np.isnan(batch.vig)
        tau = np.inf if self.tau is None else self.tau
        low, draws = ok & (batch.vig < tau), batch.draws.astype(np.float64)
        with np.errstate(invalid="ignore"):
            distance = np.abs(batch.vig - tau)
        offers = {
            "highest": (-batch.vig, ok),
            "lowest": (batch.vig, ok),
            "above": (distance, ok & ~low),
            "below": (distance, low),
            "dropped": (draws, low),
            "errors": (draws, batch.lost),
            "random": (draws, ok | batch.text_only),
        }
        for name, (ranks, mask) in offers.items():
            self.pools[name].offer(ranks[mask], batch.rows[mask])
        for code, pool in enumerate(self.by_source):
            mask = (batch.sources == code) & ~batch.lost
            pool.offer(draws[mask], batch.rows[mask])

    def picks(self) -> tuple[dict[int, list[str]], dict[str, int]]:
        """Row -> why it is shown; and the number of rows of each stratum.

        Each stratum has its share of the page; what it cannot fill, the random one does. A sample may be of several.
        Where all rows are shown, the highest of five would say little: none has a reason.
        """
        if self.rows <= self.samples:
            every = np.concatenate([self.pools["random"].rows, self.pools["errors"].rows])
            return {row: [] for row in np.sort(every).tolist()}, {}
        chosen: dict[int, list[str]] = {}
        members: dict[str, int] = {}
        for name, (_, _, share) in STRATA.items():
            left = self.samples - len(chosen)
            quota = left if name == "random" else min(left, math.ceil(share * self.samples - 1e-9))
            pools = self.by_source if name == "source" else [self.pools[name]]
            members[name] = 0
            for place, pool in enumerate(pools):
                part = (quota - members[name]) // (len(pools) - place) if name == "source" else quota
                members[name] += _deal(
                    chosen, name, pool.rows[:part] if name != "random" else pool.rows, left
                )
                left = self.samples - len(chosen)
        return chosen, members


def _deal(chosen: dict[int, list[str]], name: str, rows: np.ndarray, room: int) -> int:
    """Adds rows to the chosen while there is room for new ones; how many now have this name."""
    dealt = 0
    for row in rows.tolist():
        if row not in chosen:
            if not room:
                continue
            chosen[row] = []
            room -= 1
        elif name == "random":
            continue  # it is here already
        chosen[row].append(name)
        dealt += 1
    return dealt
