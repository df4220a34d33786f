"""POPE: yes/no questions about objects."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from vig.evaluation.pairs import check_pairs, ratio


class YesNo(NamedTuple):
    """POPE's figures, each a share from 0 to 1."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yesratio: float


def yes_no(answers: Iterable[str | bool], truths: Iterable[str | bool]) -> YesNo:
    """POPE: object probing with yes/no questions, "yes" being the positive class.

        precision = TP / (TP + FP), recall = TP / (TP + FN), F1 = 2 P R / (P + R), yesratio = (TP + FP) / n

    An answer is "yes" unless it says "no" or "not" in its first sentence, the benchmark's rule. A ratio with
    nothing below its line is 0. Raises ValueError for no answers or unequal lengths.
    Source: Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", EMNLP 2023.
    """
    said, true = [_is_yes(answer) for answer in answers], [_is_yes(truth) for truth in truths]
    check_pairs(len(said), len(true))
    tp = sum(s and t for s, t in zip(said, true, strict=True))
    right = sum(s == t for s, t in zip(said, true, strict=True))
    precision, recall = ratio(tp, sum(said)), ratio(tp, sum(true))
    f1 = ratio(2 * precision * recall, precision + recall)
    return YesNo(right / len(said), precision, recall, f1, sum(said) / len(said))


def _is_yes(answer: str | bool) -> bool:
    if not isinstance(answer, str):
        return bool(answer)
    words = re.findall(r"\w+", answer.partition(".")[0].lower().replace("n't", " not"))
    return not {"no", "not"} & set(words)
