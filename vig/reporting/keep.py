"""What is kept at each p, exactly as `vig select` keeps it: for the report's slider and for `vig plot --sweep`.

A token is kept at tau if its sample's VIG >= tau and its own VIG >= tau: if min(the two) >= tau. An end-of-turn token
that stays with its sample counts with the sample's VIG. So one number a token says at which tau it leaves, and counting
these between the taus of 200 values of p gives every count in one pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from vig.reporting.views import KeepCurve
from vig.selection.rule import token_and_sample_vig
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
    tau: float | None = None  # the selection's own, where there is one


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
        kinds = ["all", "source"] if len(self.names) > 1 else ["all"]
        shape = (len(self.names), len(self.p))
        self.samples = {kind: np.zeros(shape, np.int64) for kind in kinds}
        self.tokens = {kind: np.zeros(shape, np.int64) for kind in kinds}
        self.totals = np.zeros((len(self.names), 2), np.int64)

    def _taus(self, values: np.ndarray) -> np.ndarray:
        if not len(values):
            return np.full(len(self.p), np.nan)
        taus = np.percentile(values, 100 - self.p)
        return taus if self.rules.tau_floor is None else np.maximum(taus, self.rules.tau_floor)

    def add(self, rows: pa.RecordBatch, lengths: np.ndarray, codes: np.ndarray) -> None:
        """rows: multimodal ones alone, with their tokens."""
        every = np.ones(rows.num_rows, bool)
        stops = self.rules.stops
        token_vig, vig = token_and_sample_vig(rows, every, lengths, self.rules.clip, stops)
        leaves = leaves_at(self.rules.level, token_vig, vig, lengths)
        if stops.keep and len(lengths):
            with_sample = vig
            if self.rules.level == "token":  # whose samples stay as long as one of their tokens
                with_sample = np.maximum.reduceat(token_vig, np.cumsum(lengths) - lengths)
            leaves = np.where(stops.mask(rows, every), np.repeat(with_sample, lengths), leaves)
        n = len(self.names)
        self.totals[:, 0] += np.bincount(codes, minlength=n)
        self.totals[:, 1] += np.bincount(codes, lengths, minlength=n).astype(np.int64)
        owners = np.repeat(codes, lengths)
        for kind in self.samples:
            self.samples[kind] += self._kept(kind, vig, codes)
            self.tokens[kind] += self._kept(kind, leaves, owners)

    def _kept(self, kind: str, leaves: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """(S, P): how many of each source are kept at each p."""
        n, size = len(self.names), len(self.p)
        # taus fall as p grows: searched in the order of rising tau, counted from the end
        if kind == "all":
            passed = np.searchsorted(self.taus[-1][::-1], leaves, side="right")
        else:
            passed = np.zeros(len(leaves), np.int64)
            for code in np.unique(codes).tolist():
                mine = codes == code
                passed[mine] = np.searchsorted(self.taus[code][::-1], leaves[mine], side="right")
        counts = np.bincount(codes * (size + 1) + passed, minlength=n * (size + 1)).reshape(n, size + 1)
        return counts[:, ::-1].cumsum(axis=1)[:, :size]

    def curve(self) -> KeepCurve | None:
        if not self.totals[:, 0].sum():
            return None
        return KeepCurve(self.p, self.names, self.taus, self.samples, self.tokens, self.totals)


def leaves_at(level: str, token_vig: np.ndarray, vig: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The highest tau at which each token is still kept, by VIG alone: (n,) nats. vig, lengths: of the samples."""
    owners = np.repeat(vig, lengths)
    if level == "sample":
        return owners
    return token_vig if level == "token" else np.minimum(token_vig, owners)
