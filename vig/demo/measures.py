"""What the scores of the miniature show, where the truth is known: words that need sight, and Table 1 of the paper.

Words are told apart by the committed lists of `vig.demo.scenes` alone: not by their position, not by their count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vig.demo.scenes import COLOUR_WORDS, FUNCTION_WORDS, OBJECT_WORDS
from vig.evaluation.ranking import auroc
from vig.store.scores import read_scores

CLASSES = {"colour": COLOUR_WORDS, "object": OBJECT_WORDS, "function": FUNCTION_WORDS}


class WordVIG(NamedTuple):
    """Token VIG of each class of words, nats, (n,) float64 each, and how well sight tells them apart."""

    values: Mapping[str, np.ndarray]

    @property
    def auroc(self) -> float:
        """Of colour and object words against function words."""
        seen = np.concatenate([self.values["colour"], self.values["object"]])
        return chance_above(seen, self.values["function"])

    def against_function(self, name: str) -> float:
        return chance_above(self.values[name], self.values["function"])


def word_vig(scores: str | Path, words: list[str], ids: Iterable[str] | None = None) -> WordVIG:
    """Sorts the answer tokens of multimodal samples into the three classes.

    words: the word that each token id stands for. ids: the samples to look at, all unless given.
    """
    wanted = None if ids is None else set(ids)
    found: dict[str, list[np.ndarray]] = {name: [np.empty(0)] for name in CLASSES}
    members = {name: np.isin(words, sorted(members)) for name, members in CLASSES.items()}  # (V,) each
    for row in _multimodal(scores):
        if wanted is None or row["id"] in wanted:
            tokens = np.asarray(row["token_ids"])
            vig = np.asarray(row["token_nll_null"], float) - np.asarray(row["token_nll_image"], float)
            for name, member in members.items():
                found[name].append(vig[member[tokens]])
    return WordVIG({name: np.concatenate(parts) for name, parts in found.items()})


def chance_above(positive: np.ndarray, negative: np.ndarray) -> float:
    """AUROC of the positive values against the negative ones; nan where a side is empty."""
    if not len(positive) or not len(negative):
        return float("nan")
    return auroc([*positive, *negative], [True] * len(positive) + [False] * len(negative))


def vig_by(field: str, scores: str | Path, truth: Mapping[str, dict]) -> dict[str, np.ndarray]:
    """Sample VIG, nats, grouped by a field of the ground truth ("kind", "match", "blind")."""
    groups: dict[str, list[float]] = {}
    for row in _multimodal(scores):
        groups.setdefault(truth[row["id"]][field], []).append(row["vig"])
    return {name: np.array(values) for name, values in groups.items()}


# 97.5th percentiles of the t distribution, 1 to 10 degrees of freedom
_T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


class MeanInterval(NamedTuple):
    """A mean over n seeds and its 95 % t interval, mean +- half; half is nan of one seed."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:.1f}{self._half}"

    @property
    def signed(self) -> str:
        """With the sign of the mean, as differences are written."""
        return f"{self.mean:+.1f}{self._half}"

    @property
    def _half(self) -> str:
        return "" if math.isnan(self.half) else f" ± {self.half:.1f}"

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half


def mean_interval(values: np.ndarray) -> MeanInterval:
    """Of (n,) values, one a seed. Raises ValueError for none."""
    n = len(values)
    if not n:
        raise ValueError("no values: a mean needs at least one seed")
    if n == 1:
        return MeanInterval(float(values[0]), math.nan)
    return MeanInterval(float(np.mean(values)), float(_t_975(n - 1) * np.std(values, ddof=1) / math.sqrt(n)))


def _t_975(freedom: int) -> float:
    """From the table, beyond it by R. A. Fisher's expansion about the normal percentile, to 0.0001."""
    if freedom <= len(_T_975):
        return _T_975[freedom - 1]
    z = 1.959964
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def words_of(tokenizer) -> list[str]:
    """The bare word of each token id."""
    return [token.strip("▁") for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]


def _multimodal(scores: str | Path) -> Iterator[dict]:
    columns = ["id", "status", "vig", "token_ids", "token_nll_image", "token_nll_null"]
    for batch in read_scores(scores, columns):
        yield from (row for row in batch.to_pylist() if row["status"] == "ok")
