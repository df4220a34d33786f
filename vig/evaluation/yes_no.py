"""POPE: yes/no questions about objects."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from vig.evaluation.pairs import check_pairs, ratio

WORD = re.compile(r"[^\W_]+(?:['’]t)?")


def _by_the_benchmark(answer: str) -> str | None:
    """As POPE's evaluate.py: words of the first sentence, parted by single spaces, commas taken out."""
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def _by_lmms_eval(answer: str) -> str | None:
    whole = answer.lower().strip()
    return whole if whole in ("yes", "no") else None


def _by_first_word(answer: str) -> str | None:
    first = WORD.search(answer.lower())
    return first[0] if first and first[0] in ("yes", "no") else None


RULES: dict[str, Callable[[str], str | None]] = {
    "pope": _by_the_benchmark,
    "lmms-eval": _by_lmms_eval,
    "strict": _by_first_word,
}


def said(answer: str, rule: str = "pope") -> str | None:
    """What a rule reads of an answer: yes, no, or None where it says neither (never so by "pope")."""
    return RULES[rule](answer)


def names_one(answer: str) -> bool:
    """Whether it says yes or no at all: the word yes, no, not, or one that ends in n't."""
    words = WORD.findall(answer.lower().replace("’", "'"))
    return any(word in ("yes", "no", "not", "cannot") or word.endswith("n't") for word in words)


class YesNo(NamedTuple):
    """POPE's figures, each a share from 0 to 1."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float


def shares(n: Any, right: Any, hit: Any, yes: Any, positive: Any) -> YesNo:
    """Of counts, numbers or arrays alike: questions, right ones, TP, answers yes, truths yes."""
    precision, recall = ratio(hit, yes), ratio(hit, positive)
    f1 = ratio(2 * precision * recall, precision + recall)
    return YesNo(ratio(right, n), precision, recall, f1, ratio(yes, n))


def yes_no(answers: Iterable[str | bool | None], truths: Iterable[str | bool], rule: str = "pope") -> YesNo:
    """POPE: object probing with yes/no questions, "yes" being the positive class.

        precision = TP / (TP + FP), recall = TP / positives, F1 = 2 P R / (P + R), yes_ratio = (TP + FP) / n

    rule: how an answer is read, of `RULES`; "pope" is the benchmark's own, by which all is yes that does not say No,
    no or not in its first sentence. An answer that is neither is wrong, not yes, and no false negative is forgiven for
    it: recall divides by all positives. A ratio with nothing below its line is 0. Raises ValueError for no answers or
    unequal lengths.
    Source: Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", EMNLP 2023; evaluate.py of
    its repository.
    """
    answers, truths = list(answers), list(truths)
    check_pairs(len(answers), len(truths))
    yes = [said(answer, rule) if isinstance(answer, str) else _word(answer) for answer in answers]
    true = [said(truth, rule) if isinstance(truth, str) else _word(truth) for truth in truths]
    hit = sum(a == "yes" == t for a, t in zip(yes, true, strict=True))
    right = sum(a == t for a, t in zip(yes, true, strict=True))
    return shares(len(yes), right, hit, yes.count("yes"), true.count("yes"))


def _word(answer: bool | None) -> str | None:
    return None if answer is None else "yes" if answer else "no"
