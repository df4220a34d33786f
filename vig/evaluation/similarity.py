"""Short answers against their truths: ANLS and equality."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vig.evaluation.pairs import check_pairs, ratio


def anls(answers: Iterable[str], truths: Iterable[Sequence[str]], threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity, the measure of DocVQA.

        s = 1 - NL where NL < threshold, else 0;  NL = distance / max(len(answer), len(truth))

    The best of a question's accepted truths counts; case and outer white space do not.
    Source: Biten et al., "Scene Text Visual Question Answering", ICCV 2019, equation 1.
    """
    answers, truths = list(answers), list(truths)
    check_pairs(len(answers), len(truths))

    def similarity(answer: str, truth: str) -> float:
        answer, truth = answer.strip().lower(), truth.strip().lower()
        distance = ratio(levenshtein(answer, truth), max(len(answer), len(truth)))
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
    check_pairs(len(answers), len(truths))
    return sum(answer == truth for answer, truth in zip(answers, truths, strict=True)) / len(answers)


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).removesuffix(".").rstrip()
