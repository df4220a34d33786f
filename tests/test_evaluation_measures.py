"""Measures against values worked out by hand, and against scipy where it has them."""

import numpy as np
import pytest
from scipy import stats

from vig.evaluation.hallucination import chair
from vig.evaluation.ranking import auroc
from vig.evaluation.significance import mcnemar, paired_bootstrap
from vig.evaluation.similarity import anls, exact_accuracy, levenshtein
from vig.evaluation.yes_no import RULES, names_one, said, yes_no

ANSWERS = [
    "Yes, there is a dog.",
    "No.",
    "yes",
    "There isn't. Yes",
    "Yes. There is no cat",
    "Nobody is there",
]
TRUTHS = ["yes", "yes", "no", "no", "yes", "no"]


def test_pope_by_hand():
    figures = yes_no(
        ANSWERS, TRUTHS
    )  # TP 2, FN 1, FP 3: neither "isn't" nor "nobody" is a word that it knows
    assert figures == pytest.approx((2 / 6, 2 / 5, 2 / 3, 4 / 8, 5 / 6))
    strict = yes_no(ANSWERS, TRUTHS, "strict")  # two say neither: wrong, and not yes
    assert strict == pytest.approx((2 / 6, 2 / 3, 2 / 3, 2 / 3, 3 / 6))
    whole = yes_no(ANSWERS, TRUTHS, "lmms-eval")  # "yes" alone is an answer, and it is wrong
    assert whole == pytest.approx((0, 0, 0, 0, 1 / 6))
    assert yes_no([False, False], [True, False]) == (0.5, 0, 0, 0, 0)
    assert yes_no([True], ["yes"]) == (1, 1, 1, 1, 1)
    assert yes_no([None, True], ["yes", "yes"]) == pytest.approx((1 / 2, 1, 1 / 2, 2 / 3, 1 / 2))


@pytest.mark.parametrize(
    ("answer", "pope", "lmms_eval", "strict", "names"),
    [
        ("Yes", "yes", "yes", "yes", True),
        ("no", "no", "no", "no", True),
        ("NO", "yes", "no", "no", True),  # the benchmark knows No and no
        ("No,there is none", "yes", None, "no", True),  # and parts words at single spaces
        ("No, there is none", "no", None, "no", True),
        ("I do not see one", "no", None, None, True),
        ("It isn’t there", "yes", None, None, True),
        ("A dog. There is no cat", "yes", None, None, True),
        ("yes.", "yes", None, "yes", True),
        ("", "yes", None, None, False),
        ("Nobody", "yes", None, None, False),
        ("a red cup", "yes", None, None, False),
    ],
)
def test_rules_read_an_answer(answer, pope, lmms_eval, strict, names):
    assert [said(answer, rule) for rule in RULES] == [pope, lmms_eval, strict]
    assert names_one(answer) == names


def test_chair_by_hand():
    mentioned = [["dog", "ball", "dog"], ["cat"], []]
    present = [["dog"], ["cat", "sofa"], ["tree"]]
    assert chair(mentioned, present) == pytest.approx((1 / 3, 1 / 4))
    assert chair([["dog", "dog"]], [[]]) == (1, 1)
    assert chair([[]], [["dog"]]) == (0, 0)


def test_anls_by_hand():
    assert (
        levenshtein("kitten", "sitting") == 3 and levenshtein("", "abc") == 3 and levenshtein("ab", "ba") == 2
    )
    assert anls(["Kitten "], [["sitting"]]) == pytest.approx(1 - 3 / 7)
    assert anls(["ab"], [["ac"]]) == 0  # half is not below one half
    assert anls(["abc", "x"], [["zzz", "ABD"], ["y"]]) == pytest.approx((2 / 3 + 0) / 2)
    assert anls(["", "a"], [[""], []]) == 0.5


def test_exact_accuracy():
    assert exact_accuracy(["A  Red cup.", "two"], ["a red cup", "three"]) == 0.5


def test_auroc_by_hand_and_by_scipy():
    assert auroc([0.9, 0.8, 0.3, 0.1], [True, False, True, False]) == 0.75
    assert auroc([1, 1, 1], [True, False, True]) == 0.5
    assert auroc([0, 1, 1, 2], [False, True, False, True]) == pytest.approx(3.5 / 4)
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 8, 300), rng.random(300) < 0.3
    u = stats.mannwhitneyu(scores[positive], scores[~positive]).statistic
    assert auroc(scores, positive) == pytest.approx(u / (positive.sum() * (~positive).sum()))
    with pytest.raises(ValueError, match="got 2 positives and 0 negatives"):
        auroc([1, 2], [True, True])
    with pytest.raises(ValueError, match=r"scores\[1\] is NaN"):
        auroc([1, np.nan], [True, False])


def test_mcnemar_against_the_binomial_test():
    left, right = [True] * 9 + [False] * 2 + [True] * 30, [False] * 9 + [True] * 2 + [True] * 30
    assert mcnemar(left, right) == pytest.approx(stats.binomtest(2, 11).pvalue)
    assert mcnemar([True], [True]) == 1.0
    assert mcnemar([True] * 6, [False] * 6) == 2 / 64


def test_paired_bootstrap():
    rng = np.random.default_rng(1)
    right = rng.random(200)
    better = paired_bootstrap(right + 0.1 + 0.2 * rng.normal(size=200), right, resamples=2000)
    assert better.low < better.difference < better.high and better.low > 0 and better.p_value < 0.01
    spread = 0.2 / np.sqrt(200)
    assert better.high - better.low == pytest.approx(2 * 1.96 * spread, rel=0.2)
    same = paired_bootstrap(right + 0.2 * rng.normal(size=200), right, resamples=2000)
    assert same.low < 0 < same.high and same.p_value > 0.05
    assert paired_bootstrap([1, 0], [1, 0], resamples=100) == (0, 0, 0, 1)
    assert paired_bootstrap(right, right[::-1], resamples=700) == paired_bootstrap(
        right, right[::-1], resamples=700
    )


def test_paired_bootstrap_by_hand():
    """120 resamples, fewer than are drawn at a time: the interval and the p-value are of these alone."""
    left, right = np.array([1.0, 1, 0, 1, 0, 1, 1, 0]), np.array([0.0, 1, 1, 0, 0, 0, 1, 0])
    means = (left - right)[np.random.default_rng(3).integers(0, 8, (120, 8))].mean(axis=1)
    expected = (0.25, *np.percentile(means, [2.5, 97.5]), 2 * ((means <= 0).sum() + 1) / 121)
    assert (means == 0).any() and expected[3] < 1
    assert paired_bootstrap(left, right, resamples=120, seed=3) == pytest.approx(expected)


def test_unequal_or_empty_lists_are_refused():
    for measure in (yes_no, chair, anls, exact_accuracy, auroc, mcnemar, paired_bootstrap):
        with pytest.raises(ValueError, match="got 1 and 2"):
            measure(["a"], ["a", "b"])
        with pytest.raises(ValueError, match="got 0 and 0"):
            measure([], [])
