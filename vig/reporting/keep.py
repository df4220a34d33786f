"""What is kept at each p, exactly as `vig select` keeps it: for the report's slider and for `vig plot --sweep`.

A token is kept at tau if its sample's VIG >= tau and its own VIG >= tau: if min(the two) >= tau. An end-of-turn token
that goes with its sample counts with the sample's VIG, and an easy one that is kept in any case (`keep_easy`) never
leaves, nor does its sample. So one number a token says at which tau it leaves, and counting
these between the taus of 200 values of p, of all sources, gives every count in one pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from vig.reporting.scale import rounded
from vig.reporting.views import KeepCurve
from vig.selection.rule import easy_tokens, token_and_sample_vig
from vig.selection.sources import Sources
from vig.selection.stop_tokens import NO_STOPS, Stops

STEP = 0.5  # per cent between two places of the slider
DEFAULT_P = 70.0


@dataclass(frozen=True)
class Rules:
    """How a selection chooses beside p: fields of the same names of `vig.select`. stops: its end-of-turn tokens."""

    p: float = DEFAULT_P
    level: str = "both"
    by: str | None = None
    tau_floor: float | None = None
    clip: float | None = None
    stops: Stops = NO_STOPS
    keep_easy: float | None = None
    tau: float | None = None  # the selection's own, where there is one

    @property
    def own_mean(self) -> bool:
        """Whether tau is compared with another mean than the scores' `vig`: clipped, or without end-of-turn tokens."""
        return self.clip is not None or not self.stops.in_mean

    @property
    def measures(self) -> tuple[str, str]:
        """What is particular to the VIG of samples and of tokens that tau is compared with; "" for nothing."""
        clipped = [] if self.clip is None else [f"log-probabilities under {rounded(self.clip)} taken as that"]
        mean = [] if self.stops.in_mean else ["end-of-turn tokens left out"]
        return ", ".join(clipped + mean), ", ".join(clipped)

    @property
    def options(self) -> str:
        """Of the `vig select` that chooses so, p and sources aside."""
        options = "" if self.level == "both" else f" --level {self.level}"
        options += "" if self.clip is None else f" --clip {math.exp(self.clip):.6g}"
        options += "" if self.tau_floor is None else f" --tau-floor {self.tau_floor:g}"
        options += " --stop-tokens select" if self.stops.ids and not self.stops.keep else ""
        options += "" if self.keep_easy is None else f" --keep-easy {self.keep_easy:g}"
        return options + ("" if self.stops.in_mean else " --mean content")


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

    def add(
        self, rows: pa.RecordBatch, lengths: np.ndarray, codes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """rows: multimodal ones alone, with their tokens. Returns the VIG of tokens, and of samples, as tau is compared
        with it."""
        every, rules = np.ones(rows.num_rows, bool), self.rules
        token_vig, vig = token_and_sample_vig(rows, every, lengths, rules.clip, rules.stops)
        leaves, with_sample = leaves_at(rules.level, token_vig, vig, lengths), vig
        if rules.level == "token" and len(lengths):  # whose samples stay as long as one of their tokens
            with_sample = np.maximum.reduceat(token_vig, np.cumsum(lengths) - lengths)
        if rules.stops.keep and len(lengths):
            leaves = np.where(rules.stops.mask(rows, every), np.repeat(with_sample, lengths), leaves)
        if rules.keep_easy is not None and len(lengths):
            easy = easy_tokens(rows, every, rules.keep_easy)
            leaves = np.where(easy, np.inf, leaves)
            with_sample = np.where(
                np.logical_or.reduceat(easy, np.cumsum(lengths) - lengths), np.inf, with_sample
            )
        self.samples += self._reached(with_sample, codes)
        self.tokens += self._reached(leaves, np.repeat(codes, lengths))
        return token_vig, vig

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


def leaves_at(level: str, token_vig: np.ndarray, vig: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The highest tau at which each token is still kept, by VIG alone: (n,) nats. vig, lengths: of the samples."""
    owners = np.repeat(vig, lengths)
    if level == "sample":
        return owners
    return token_vig if level == "token" else np.minimum(token_vig, owners)
