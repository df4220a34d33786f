"""Tests of paired differences: is one system better than another on the same questions?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vig.evaluation.pairs import check_pairs


class Difference(NamedTuple):
    """mean(left) - mean(right), its 95 % interval, and the two-sided p-value of no difference."""

    difference: float
    low: float
    high: float
    p_value: float


def paired_bootstrap(
    left: Sequence[float],
    right: Sequence[float],  # the same questions, in the same order
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Is the mean of left above that of right, over questions drawn again with replacement?

    The interval is the percentile interval of d* = mean(left* - right*); p = 2 min(P(d* <= 0), P(d* >= 0)),
    with one added to both counts, at most 1. Source: Efron and Tibshirani, "An Introduction to the Bootstrap",
    1993, chapters 13 and 16; Koehn, "Statistical Significance Tests for Machine Translation Evaluation", 2004.
    """
    check_pairs(len(left), len(right))
    gain = np.asarray(left, np.float64) - np.asarray(right, np.float64)
    rng = np.random.default_rng(seed)
    means = np.concatenate(
        [
            gain[rng.integers(0, len(gain), (min(500, resamples - start), len(gain)))].mean(axis=1)
            for start in range(0, resamples, 500)
        ]
    )
    low, high = np.percentile(means, [2.5, 97.5])
    tail = min((means <= 0).sum(), (means >= 0).sum())
    return Difference(
        float(gain.mean()), float(low), float(high), float(min(1, 2 * (tail + 1) / (resamples + 1)))
    )


def mcnemar(left: Sequence[bool], right: Sequence[bool]) -> float:
    """Exact two-sided p-value that two systems are right equally often, on the same questions.

    With b questions that only the left answers right and c only the right:
        p = min(1, 2 sum_{k <= min(b, c)} C(b + c, k) / 2^(b + c))
    Source: McNemar 1947, the exact binomial form.
    """
    check_pairs(len(left), len(right))
    b = sum(bool(x) and not y for x, y in zip(left, right, strict=True))
    c = sum(bool(y) and not x for x, y in zip(left, right, strict=True))
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1))
    return min(1.0, 2 * tail / 2 ** (b + c))
