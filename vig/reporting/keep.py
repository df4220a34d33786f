"""What is kept at each p, exactly as `vig select` keeps it: for the report's slider and for `vig plot --sweep`.

A token is kept at tau if its sample's VIG >= tau and its own VIG >= tau: if min(the two) >= tau. An end-of-turn token
that goes with its sample counts with the sample's VIG. So one number a token says at which tau it leaves, and counting
these between the taus of 200 values of p, of all sources, gives every count in one pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from vig.reporting.views import KeepCurve
from vig.selection.rule import token_and_sample_vig
from vig.selection.sources import Sources
from vig.store.rows import segment_means

STEP = 0.5  # per cent between two places of the slider
DEFAULT_P = 70.0


@dataclass(frozen=True)
class Rules:
    """How a selection chooses beside p: fields of the same names of `vig.select`.

    stop_ids: ids that at the end of a turn are end-of-turn tokens. keep_stops: these go with their sample.
    content: they do not count in its mean. tau: the selection's own, where there is one.
    """

    p: float = DEFAULT_P
    level: str = "both"
    by: str | None = None
    tau_floor: float | None = None
    clip: float | None = None
    stop_ids: frozenset[int] = frozenset()
    keep_stops: bool = True
    content: bool = False
    tau: float | None = None

    @property
    def needs_tokens(self) -> bool:
        """Whether sample VIG is another than the stored one."""
        return self.clip is not None or self.content


def ends_of_turns(ids: np.ndarray, positions: np.ndarray, stop_ids: frozenset[int]) -> np.ndarray:
    """(n,) bool: the last token of a turn, where it is one that ends turns. The next turn begins at position 0."""
    last = np.ones(len(ids), bool)
    last[:-1] = positions[1:] == 0
    return last & np.isin(ids, np.fromiter(stop_ids, np.int64, len(stop_ids)))


def values_of(
    rows: pa.RecordBatch, lengths: np.ndarray, rules: Rules
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """VIG of the tokens of multimodal rows, the sample VIG that is selected by, and which tokens end turns."""
    token_vig, vig = token_and_sample_vig(rows, np.ones(rows.num_rows, bool), lengths, rules.clip)
    if not rules.stop_ids:
        return token_vig, vig, np.zeros(len(token_vig), bool)
    ids, positions = (rows[name].flatten().to_numpy() for name in ("token_ids", "positions"))
    stops = ends_of_turns(ids, positions, rules.stop_ids)
    if rules.content:
        share = segment_means((~stops).astype(np.float64), lengths)
        means = segment_means(np.where(stops, 0.0, token_vig), lengths)
        vig = np.where(share > 0, means / np.where(share > 0, share, 1.0), segment_means(token_vig, lengths))
    return token_vig, vig, stops


class Keeper:
    """Counts what each p of the slider keeps, by source, for one tau and for a tau a source."""

    def __init__(self, rules: Rules, vig: tuple[np.ndarray, np.ndarray], sources: Sources):
        values, codes = vig
        self.rules, self.names = rules, list(sources.names)
        self.p = np.unique(np.append(np.arange(STEP, 100 + STEP / 2, STEP), rules.p))
        self.tau = rules.tau
        groups = [values[codes == code] for code in range(len(self.names))]
        self.taus = np.stack([self._taus(group) for group in [*groups, values]])
        if self.tau is None and len(values):
            self.tau = float(self.taus[-1][np.searchsorted(self.p, rules.p)])
        self.edges = np.unique(self.taus[~np.isnan(self.taus)])  # (E,) every tau of every source
        self.samples = np.zeros((len(self.names), len(self.edges) + 1), np.int64)  # by taus that they reach
        self.tokens = np.zeros_like(self.samples)

    def _taus(self, values: np.ndarray) -> np.ndarray:
        if not len(values):
            return np.full(len(self.p), np.nan)
        taus = np.percentile(values, 100 - self.p)
        return taus if self.rules.tau_floor is None else np.maximum(taus, self.rules.tau_floor)

    def add(self, rows: pa.RecordBatch, lengths: np.ndarray, codes: np.ndarray) -> None:
        """rows: multimodal ones alone, with their tokens."""
        token_vig, vig, stops = values_of(rows, lengths, self.rules)
        stops &= self.rules.keep_stops
        leaves = leaves_at(token_vig, np.repeat(vig, lengths), stops, self.rules.level)
        self.samples += self._reached(vig, codes)
        self.tokens += self._reached(leaves, np.repeat(codes, lengths))

    def _reached(self, leaves: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """(S, E + 1): of each source, how many reach 0, 1, ... of the taus."""
        size = len(self.edges) + 1
        reached = np.searchsorted(self.edges, leaves, side="right")
        counts = np.bincount(codes * size + reached, minlength=len(self.names) * size)
        return counts.reshape(len(self.names), size)

    def _kept(self, counts: np.ndarray, taus: np.ndarray) -> np.ndarray:
        """(S, P): how many of each source reach its taus (S, P); 0 where it has none."""
        above = np.cumsum(counts[:, ::-1], axis=1)[:, ::-1]  # reach at least so many taus
        places = np.searchsorted(self.edges, np.nan_to_num(taus, nan=-np.inf)) + 1
        return np.take_along_axis(above, np.minimum(places, counts.shape[1] - 1), axis=1)

    def curve(self) -> KeepCurve | None:
        if not self.samples.sum():
            return None
        shape = (len(self.names), len(self.p))
        rules = {"all": np.broadcast_to(self.taus[-1], shape)}
        if len(self.names) > 1:
            rules["source"] = self.taus[:-1]
        samples, tokens = (
            {rule: self._kept(counts, taus) for rule, taus in rules.items()}
            for counts in (self.samples, self.tokens)
        )
        totals = np.stack([self.samples.sum(axis=1), self.tokens.sum(axis=1)], axis=1)
        return KeepCurve(self.p, self.names, self.taus, samples, tokens, totals)


def leaves_at(token_vig: np.ndarray, owner_vig: np.ndarray, stops: np.ndarray, level: str) -> np.ndarray:
    """The highest tau at which each token is still kept: (n,) nats."""
    if level == "sample":
        return owner_vig
    if level == "token":
        return token_vig
    return np.where(stops, owner_vig, np.minimum(token_vig, owner_vig))
