"""Short answers against their truths: ANLS and equality."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vig.evaluation.pairs import check_pairs, ratio


def anls(
    answers: Iterable[str], truths: Iterable[Sequence[str]], threshold: float = 0.5, rule: str = "paper"
) -> float:
    """Average normalised Levenshtein similarity, the measure of DocVQA.

        s = 1 - NL where NL < threshold, else 0;  NL = distance / max(len(answer), len(truth))

    The best of a question's accepted truths counts; case and outer white space do not. rule: `similarity`'s.
    Source: Biten et al., "Scene Text Visual Question Answering", ICCV 2019, equation 1.
    """
    answers, truths = list(answers), list(truths)
    check_pairs(len(answers), len(truths))
    pairs = zip(answers, truths, strict=True)
    return sum(similarity(answer, accepted, threshold, rule) for answer, accepted in pairs) / len(answers)


def similarity(answer: str, accepted: Sequence[str], threshold: float = 0.5, rule: str = "paper") -> float:
    """The largest s of an answer over its accepted truths; 0 where there are none.

    rule: "paper" is the equation, by which a distance of exactly the threshold gives 0. "lmms-eval" is what that
    harness computes: runs of white space count as one space in the distance but not in the length, and a similarity of
    exactly the threshold counts.
    """
    return max((SIMILARITIES[rule](answer, truth, threshold) for truth in accepted), default=0.0)


def _by_the_paper(answer: str, truth: str, threshold: float) -> float:
    answer, truth = answer.strip().lower(), truth.strip().lower()
    longest = max(len(answer), len(truth))
    if ratio(abs(len(answer) - len(truth)), longest) >= threshold:
        return 0.0  # the distance is no less; a long answer costs nothing
    distance = ratio(levenshtein(answer, truth), longest)
    return 1 - distance if distance < threshold else 0.0


def _by_lmms_eval(answer: str, truth: str, threshold: float) -> float:
    longest = max(len(answer), len(truth))
    answer, truth = " ".join(answer.lower().split()), " ".join(truth.lower().split())
    if 1 - ratio(abs(len(answer) - len(truth)), longest) < threshold:
        return 0.0
    found = 1 - ratio(levenshtein(answer, truth), longest)
    return found if found >= threshold else 0.0


SIMILARITIES = {"paper": _by_the_paper, "lmms-eval": _by_lmms_eval}


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
    answers, truths = [plain(answer) for answer in answers], [plain(truth) for truth in truths]
    check_pairs(len(answers), len(truths))
    return sum(answer == truth for answer, truth in zip(answers, truths, strict=True)) / len(answers)


def plain(text: str) -> str:
    """In lower case, white space as single spaces, without a final full stop."""
    return " ".join(text.lower().split()).removesuffix(".").rstrip()
