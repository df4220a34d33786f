"""AUROC."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vig.evaluation.pairs import check_pairs


def auroc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, a tie counting one half.

        AUROC = (sum of the positives' ranks - n_pos (n_pos + 1) / 2) / (n_pos n_neg)

    with the mean rank for ties (Mann and Whitney 1947; Hanley and McNeil 1982). Raises ValueError unless both
    classes are there, and for NaN.
    """
    check_pairs(len(scores), len(positive))
    scores, positive = np.asarray(scores, np.float64), np.asarray(positive, bool)
    if np.isnan(scores).any():
        raise ValueError(f"scores[{int(np.argmax(np.isnan(scores)))}] is NaN")
    n_pos = int(positive.sum())
    n_neg = len(positive) - n_pos
    if not n_pos or not n_neg:
        raise ValueError(f"AUROC needs both classes, got {n_pos} positives and {n_neg} negatives")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts - 1) / 2
    return float((mean_rank[inverse][positive].sum() - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))
