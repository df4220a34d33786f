"""The experiment's analysis on synthetic lines of known effect."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.evidence import analysis, design
from benchmarks.evidence.analysis import Cell, Lines
from benchmarks.evidence.design import EXAMS, SEEDS, SHARES, Run
from benchmarks.evidence.exams import digits, packed, percent

QUESTIONS, CAPTIONS = EXAMS["test"][1], EXAMS["captions"][1]


def made_line(run: Run, right: float, rng: np.random.Generator, wrong_objects: float = 0.1) -> dict:
    """A line whose questions are right with probability `right`, each by itself."""
    bits = rng.random(QUESTIONS) < right
    named, absent = np.full(CAPTIONS, 3), rng.binomial(3, wrong_objects, CAPTIONS)
    return run._asdict() | {
        "test_colour": percent(bits),
        "test_colour_bits": packed(bits),
        "test_exact": percent(bits),
        "test_exact_bits": packed(bits),
        "chair_i": float(100 * absent.sum() / named.sum()),
        "captions_named": digits(named),
        "captions_absent": digits(absent),
        "trained_tokens": 1000,
        "trained_text_tokens": 250,
        "seconds": {"training": 8.0},
    }


def made(effect, seeds=SEEDS, spread=0.01, seed=0) -> Lines:
    """All tokens 70 % right everywhere; an arm `effect(arm, share)` more; seeds scatter by `spread`, arms alike."""
    rng = np.random.default_rng(seed)
    lines = {}
    for number in seeds:
        luck = rng.normal(0, spread)
        for share in SHARES:
            for arm in ("all", "vig", "loss filter", "random", "permuted", "easy"):
                run = Run("shipped", share, number, arm)
                lines[run] = made_line(run, 0.7 + luck + effect(arm, share), rng)
    return Lines(lines)


def test_paired_t_by_hand():
    # differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t(2) at 97.5 % = 4.30265
    found = analysis.paired(np.array([1.0, 2.0, 3.0]))
    half = 4.302652729911275 / math.sqrt(3)
    assert found[:4] == pytest.approx((3, 2, 2 - half, 2 + half))
    t = 2 * math.sqrt(3)
    assert found.p == pytest.approx(
        1 - t / math.sqrt(2 + t * t)
    )  # the t distribution with two degrees of freedom


@pytest.mark.parametrize(
    ("values", "n", "p"),
    [([], 0, None), ([3.0], 1, None), ([0.0, 0.0], 2, 1.0), ([2.0, 2.0], 2, 0.0)],
)
def test_paired_with_too_little(values, n, p):
    found = analysis.paired(np.array(values))
    assert found.n == n
    assert (math.isnan(found.p) and math.isnan(found.low)) if p is None else found.p == p


def test_holm_by_hand():
    # ordered .01, .02, .03, .04 times 4, 3, 2, 1, and never below the one before
    assert analysis.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert analysis.holm([0.5, math.nan, 0.6])[::2] == pytest.approx([1.0, 1.0])
    assert math.isnan(analysis.holm([0.5, math.nan])[1])


def test_the_interaction_finds_its_effect():
    lines = made(lambda arm, share: {0.0: -0.05, 0.75: 0.06}.get(share, 0.0) if arm == "vig" else 0.0)
    found = analysis.primary(lines)
    assert found.estimate.n == len(SEEDS)
    assert found.estimate.mean == pytest.approx(11, abs=2)
    assert found.estimate.low < 11 < found.estimate.high
    assert found.estimate.picture_low < 11 < found.estimate.picture_high
    assert found.direction == 1
    by_hand = [
        lines.cells[Cell("shipped", share, arm)][seed]["test_colour"] * sign
        for share, arm, sign in ((0.75, "vig", 1), (0.75, "all", -1), (0.0, "vig", -1), (0.0, "all", 1))
        for seed in SEEDS
    ]
    assert found.estimate.mean == pytest.approx(sum(by_hand) / len(SEEDS))


def test_no_effect_is_not_found():
    lines = made(lambda arm, share: 0.0, seed=3)
    assert analysis.primary(lines).direction == 0
    assert [
        one.direction
        for family in ("secondary", "controls", "easy")
        for one in analysis.tested(lines, family)
    ] == [0] * 40


def test_false_alarms_are_as_rare_as_promised():
    rng = np.random.default_rng(0)
    p = np.array([analysis.paired(rng.normal(0, 2, 10)).p for _ in range(2000)])
    assert np.mean(p < 0.05) == pytest.approx(0.05, abs=0.015)


def test_a_family_is_tested_in_the_measures_own_direction():
    lines = made(lambda arm, share: 0.05 * (arm == "vig"))
    for run_lines in (lines.cells[Cell("shipped", share, "vig")] for share in SHARES):
        for line in run_lines.values():  # every second hallucination less, and a little less or more of that
            absent = np.array(list(line["captions_absent"]), int) // 2
            line |= {"captions_absent": digits(absent), "chair_i": float(100 * absent.sum() / (3 * CAPTIONS))}
    found = {one.comparison.measure: [] for one in analysis.tested(lines, "secondary")}
    for one in analysis.tested(lines, "secondary"):
        found[one.comparison.measure].append((one.direction, np.sign(one.estimate.mean)))
        assert one.adjusted_p >= one.estimate.p
    assert found["chair_i"] == [(1, -1)] * 8  # fewer is better
    assert found["test_colour"] == found["test_exact"] == [(1, 1)] * 8


def test_the_bootstrap_counts_seeds_and_pictures():
    """Seeds that agree leave the pictures' own error: a share p of n questions has sqrt(p (1 - p) / n)."""
    rng = np.random.default_rng(1)
    better = rng.random(QUESTIONS) < 0.2  # questions that arm a has right and arm b has not
    lines = {}
    for seed in SEEDS:
        for arm, bits in (("vig", better), ("all", np.zeros(QUESTIONS, bool))):
            run = Run("shipped", 0.5, seed, arm)
            lines[run] = run._asdict() | {"test_colour": percent(bits), "test_colour_bits": packed(bits)}
    found = analysis.estimate(Lines(lines), analysis.difference("vig", "all", 0.5))
    error = 100 * math.sqrt(better.mean() * (1 - better.mean()) / QUESTIONS)
    assert found.low == pytest.approx(found.mean) and found.high == pytest.approx(found.mean)
    assert found.picture_high - found.picture_low == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_the_bootstrap_of_seeds_alone():
    """Pictures that are all alike leave the seeds' scatter."""
    lines = {}
    for seed in SEEDS:
        for arm, right in (("vig", seed % 2 == 0), ("all", False)):
            run = Run("shipped", 0.5, seed, arm)
            bits = np.full(QUESTIONS, right)
            lines[run] = run._asdict() | {"test_colour": percent(bits), "test_colour_bits": packed(bits)}
    found = analysis.estimate(Lines(lines), analysis.difference("vig", "all", 0.5))
    error = 100 * math.sqrt(0.25 / len(SEEDS))
    assert found.mean == 50
    assert found.picture_high - found.picture_low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_the_bootstrap_of_captions_weighs_by_objects_named():
    """One picture in two has nine objects named, none absent, the others one, absent: 10 %, whatever the seed."""
    named = np.where(np.arange(CAPTIONS) % 2, 9, 1)
    lines = {}
    for seed in SEEDS:
        for arm, absent in (("vig", named % 9), ("all", 0 * named)):
            run = Run("shipped", 0.5, seed, arm)
            counts = {"captions_named": digits(named), "captions_absent": digits(absent)}
            lines[run] = run._asdict() | counts | {"chair_i": 100 * absent.sum() / named.sum()}
    found = analysis.estimate(Lines(lines), analysis.difference("vig", "all", 0.5, "chair_i"))
    assert found.mean == pytest.approx(10)
    # of a share p of the first kind it is (1 - p) / (1 + 8 p), whose slope at one half is 9 / 25
    error = 100 * 0.36 * math.sqrt(0.25 / CAPTIONS)
    assert found.picture_high - found.picture_low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_only_seeds_that_both_arms_have_are_compared():
    lines = made(lambda arm, share: 0.0)
    del lines.cells[Cell("shipped", 0.5, "vig")][SEEDS[0]]
    assert analysis.estimate(lines, analysis.difference("vig", "all", 0.5)).n == len(SEEDS) - 1
    assert analysis.estimate(lines, analysis.difference("words", "all", 0.5)).n == 0


def test_the_oracle_without_blind_answers_is_all_tokens():
    comparison = analysis.difference("oracle", "all", 0.0)
    assert comparison.plus == comparison.minus == (Cell("shipped", 0.0, "all"),)
    assert analysis.difference("oracle", "all", 0.25).plus[0].arm == "oracle"


def test_figures_that_a_line_does_not_hold_itself():
    line = {"trained_tokens": 1000, "trained_text_tokens": 250, "seconds": {"training": 8.0}}
    assert (analysis.value_of(line, "text_share"), analysis.value_of(line, "seconds")) == (25.0, 8.0)
    assert math.isnan(analysis.value_of({"seconds": {}}, "seconds")) and math.isnan(
        analysis.value_of({}, "recall")
    )


def test_rate_checks_stand_apart_and_name_the_best():
    lines = {}
    for seed in design.RATE_SEEDS:
        for rate, right in zip(design.RATES, (70.0, 80.0, 75.0), strict=True):
            run = Run("shipped", 0.75, seed, "vig", rate)
            lines[run] = run._asdict() | {"validation_colour": right + seed - 2001}
    found = Lines(lines)
    assert not found.cells
    assert analysis.rate_checks(found) == [analysis.RateCheck(0.75, "vig", {0.5: 70.0, 1.0: 80.0, 2.0: 75.0})]
    assert analysis.rate_checks(found)[0].best == 1.0
