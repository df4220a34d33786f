"""What the scores of the miniature show, where the truth is known: words that need sight, and Table 1 of the paper.

Words are told apart by the committed lists of `vig.demo.scenes` alone: not by their position, not by their count.
"""

from __future__ import annotations

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


def words_of(tokenizer) -> list[str]:
    """The bare word of each token id."""
    return [token.strip("▁") for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]


def _multimodal(scores: str | Path) -> Iterator[dict]:
    columns = ["id", "status", "vig", "token_ids", "token_nll_image", "token_nll_null"]
    for batch in read_scores(scores, columns):
        yield from (row for row in batch.to_pylist() if row["status"] == "ok")
