"""Evaluation measures: POPE, CHAIR, ANLS, accuracy, AUROC, and tests for paired differences.

Small functions on plain lists; each docstring gives the formula and its source.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


class YesNo(NamedTuple):
    """POPE's figures, each a share from 0 to 1."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float


def yes_no(answers: Iterable[str | bool], truths: Iterable[str | bool]) -> YesNo:
    """POPE: object probing with yes/no questions, "yes" being the positive class.

        precision = TP / (TP + FP), recall = TP / (TP + FN), F1 = 2 P R / (P + R), yes_ratio = (TP + FP) / n

    An answer is "yes" unless it says "no" or "not" in its first sentence, the benchmark's rule. A ratio with
    nothing below its line is 0. Raises ValueError for no answers or unequal lengths.
    Source: Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", EMNLP 2023.
    """
    said, true = [_is_yes(answer) for answer in answers], [_is_yes(truth) for truth in truths]
    _check_pairs(len(said), len(true))
    tp = sum(s and t for s, t in zip(said, true, strict=True))
    right = sum(s == t for s, t in zip(said, true, strict=True))
    precision, recall = _ratio(tp, sum(said)), _ratio(tp, sum(true))
    f1 = _ratio(2 * precision * recall, precision + recall)
    return YesNo(right / len(said), precision, recall, f1, sum(said) / len(said))


def _is_yes(answer: str | bool) -> bool:
    if not isinstance(answer, str):
        return bool(answer)
    words = re.findall(r"\w+", answer.partition(".")[0].lower().replace("n't", " not"))
    return not {"no", "not"} & set(words)


class Chair(NamedTuple):
    """chair_s: share of captions with a hallucination. chair_i: share of mentioned objects that are not there."""

    chair_s: float
    chair_i: float


def chair(
    mentioned: Iterable[Sequence[str]],  # a caption's objects, each mention counted
    present: Iterable[Iterable[str]],  # the objects that its image holds, of the same vocabulary
) -> Chair:
    """Hallucinated objects in captions.

        CHAIR_i = |hallucinated mentions| / |mentions|,  CHAIR_s = |captions with one| / |captions|

    Source: Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018, section 3.
    """
    mentioned, present = list(mentioned), [set(objects) for objects in present]
    _check_pairs(len(mentioned), len(present))
    wrong = [
        sum(name not in truth for name in names) for names, truth in zip(mentioned, present, strict=True)
    ]
    mentions = sum(len(names) for names in mentioned)
    return Chair(sum(count > 0 for count in wrong) / len(wrong), _ratio(sum(wrong), mentions))


def anls(answers: Iterable[str], truths: Iterable[Sequence[str]], threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity, the measure of DocVQA.

        s = 1 - NL where NL < threshold, else 0;  NL = distance / max(len(answer), len(truth))

    The best of a question's accepted truths counts; case and outer white space do not.
    Source: Biten et al., "Scene Text Visual Question Answering", ICCV 2019, equation 1.
    """
    answers, truths = list(answers), list(truths)
    _check_pairs(len(answers), len(truths))

    def similarity(answer: str, truth: str) -> float:
        answer, truth = answer.strip().lower(), truth.strip().lower()
        distance = _ratio(levenshtein(answer, truth), max(len(answer), len(truth)))
        return 1 - distance if distance < threshold else 0.0

    best = [
        max((similarity(answer, truth) for truth in accepted), default=0.0)
        for answer, accepted in zip(answers, truths, strict=True)
    ]
    return sum(best) / len(best)


def levenshtein(left: str, right: str) -> int:
    """Fewest insertions, deletions and replacements that turn one string into the other."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def exact_accuracy(answers: Iterable[str], truths: Iterable[str]) -> float:
    """Share of answers equal to the truth; case, runs of white space and a final full stop do not count."""
    answers, truths = [_plain(answer) for answer in answers], [_plain(truth) for truth in truths]
    _check_pairs(len(answers), len(truths))
    return sum(answer == truth for answer, truth in zip(answers, truths, strict=True)) / len(answers)


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).removesuffix(".").rstrip()


def auroc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, a tie counting one half.

        AUROC = (sum of the positives' ranks - n_pos (n_pos + 1) / 2) / (n_pos n_neg)

    with the mean rank for ties (Mann and Whitney 1947; Hanley and McNeil 1982). Raises ValueError unless both
    classes are there, and for NaN.
    """
    _check_pairs(len(scores), len(positive))
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
    _check_pairs(len(left), len(right))
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
    _check_pairs(len(left), len(right))
    b = sum(bool(x) and not y for x, y in zip(left, right, strict=True))
    c = sum(bool(y) and not x for x, y in zip(left, right, strict=True))
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1))
    return min(1.0, 2 * tail / 2 ** (b + c))


def _check_pairs(left: int, right: int) -> None:
    if left != right or left == 0:
        raise ValueError(f"expected two lists of the same length, at least 1; got {left} and {right}")


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
