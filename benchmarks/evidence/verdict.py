"""What the numbers say, in sentences made by fixed rules.

A test decides: an arm is better or worse than another where the adjusted p is below 0.05, else no difference is shown.
A claim of two parts holds where both do, holds in part where one does, and does not hold where neither does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from benchmarks.evidence import analysis
from benchmarks.evidence.analysis import CHAIR, COLOUR, EXACT, Estimate, Lines, Tested
from benchmarks.evidence.design import NAMES, SHARES

WORDS = {1: "better", -1: "worse", 0: "no difference shown"}
NOT_RUN = "not run"
SHORT = {COLOUR: "right colour", EXACT: "whole answer", CHAIR: "CHAIR_i"}


def number(value: float, digits: int = 1) -> str:
    """With its sign, and never a negative zero."""
    text = f"{value:+.{digits}f}"
    return text if float(text) else f"{0:.{digits}f}"


def interval(found: Estimate, digits: int = 1) -> str:
    """A mean difference and half of its t interval: "+5.8 ± 3.2"."""
    if not found.n:
        return NOT_RUN
    half = (found.high - found.low) / 2
    return number(found.mean, digits) + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def probability(p: float) -> str:
    """ "p = 0.012", or that there is none."""
    return "no test" if math.isnan(p) else "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def percent_of(share: float) -> str:
    return f"{100 * share:.0f} %"


def primary(lines: Lines) -> str:
    found = analysis.primary(lines)
    claim = "the more answers ignore the image, the more VIG gains over all tokens"
    said = {1: f"holds: {claim}", -1: f"the reverse of this holds: {claim}", 0: f"is not shown: {claim}"}
    if math.isnan(found.adjusted_p):
        return f"Primary: not tested, {found.estimate.n} seeds of all four cells are there."
    return (
        f"Primary, right colour, {found.estimate.n} seeds: **{said[found.direction]}**. VIG minus all tokens at "
        f"{percent_of(SHARES[-1])} blind answers minus the same at {percent_of(SHARES[0])}: "
        f"{interval(found.estimate)} points ({probability(found.adjusted_p)}; over seeds and pictures "
        f"{number(found.estimate.picture_low)} to {number(found.estimate.picture_high)})."
    )


def helps_and_harms(lines: Lines) -> str:
    """The claim that selection helps where many answers are blind and harms where none are."""
    found = {one.comparison: one for one in analysis.tested(lines, "secondary")}
    most, none = (found[analysis.difference("vig", "all", share)] for share in (SHARES[-1], SHARES[0]))
    parts = (most.direction == 1, none.direction == -1)
    word = ("does not hold", "holds in part", "holds")[sum(parts)]
    return (
        f'"Helps where most answers ignore the image, harms on clean data" **{word}**: right colour '
        f"{interval(most.estimate)} points at {percent_of(SHARES[-1])} ({WORDS[most.direction]}), "
        f"{interval(none.estimate)} at none ({WORDS[none.direction]})."
    )


def by_share(tests: Iterable[Tested]) -> str:
    """ "+5.8 ± 3.2 at 75 % (better), ...", of one pair of arms and one measure."""
    return ", ".join(
        f"{interval(one.estimate)} at {percent_of(one.comparison.plus[0].share)}"
        + (f" ({WORDS[one.direction]})" if not math.isnan(one.adjusted_p) else "")
        for one in tests
    )


def pairs(tests: Sequence[Tested]) -> dict[tuple[str, str, str], list[Tested]]:
    """The tests by (arm, other arm, measure), in their order."""
    found: dict[tuple[str, str, str], list[Tested]] = {}
    for one in tests:
        plus, minus, measure = one.comparison
        arm, other = plus[0].arm, minus[0].arm
        found.setdefault((arm, other, measure), []).append(one)
    return found


def is_it_vig(lines: Lines) -> str:
    """At which shares VIG beats the random choice and the permuted scores, both."""
    tests = analysis.tested(lines, "controls")
    found = {one.comparison: one.direction for one in tests}
    beats = [
        share
        for share in SHARES
        if all(found[analysis.difference("vig", other, share)] == 1 for other in ("random", "permuted"))
    ]
    word = "holds" if len(beats) == len(SHARES) else "holds in part" if beats else "is not shown"
    where = "at " + ", ".join(map(percent_of, beats)) if beats else "at no share"
    minus = pairs(tests)
    return (
        f'"It is VIG that does it, not the number of tokens" **{word}**: VIG is better than both a random choice of as '
        f"many samples and tokens and its own values permuted within each sample {where} of blind answers. VIG "
        f"minus random, right colour: {by_share(minus[('vig', 'random', COLOUR)])}; minus permuted: "
        f"{by_share(minus[('vig', 'permuted', COLOUR)])}."
    )


def beyond_the_loss(lines: Lines, family: str = "secondary") -> str:
    """Whether VIG is more than a filter of samples by their loss."""
    tests = pairs(analysis.tested(lines, family))[("vig", "loss filter", COLOUR)]
    directions = [one.direction for one in tests]
    word = (
        "is not shown"
        if not any(directions)
        else "holds"
        if all(d == 1 for d in directions)
        else "holds in part"
    )
    if 1 not in directions and -1 in directions:
        word = "does not hold"
    base = "" if family == "secondary" else " on the base that answers by habit"
    return f'"More than a loss filter of equal size"{base} **{word}**: right colour {by_share(tests)}.'


def losses(lines: Lines) -> list[str]:
    """Every test in which VIG, or VIG with easy tokens, is worse."""
    return [told(one) for one in every_test(lines) if one.direction == -1]


def every_test(lines: Lines) -> list[Tested]:
    return [one for family in analysis.FAMILIES for one in analysis.tested(lines, family)]


def told(one: Tested) -> str:
    """A test of two arms at one share, with its interval and p."""
    (plus,), (minus,), measure = one.comparison
    return (
        f"{NAMES[plus.arm]} against {NAMES[minus.arm]}, {base_of(one)}{SHORT[measure]} at "
        f"{percent_of(plus.share)}: {interval(one.estimate)} ({probability(one.adjusted_p)})"
    )


def base_of(one: Tested) -> str:
    return "habit base, " if one.comparison.plus[0].base == "habit" else ""


def rates(lines: Lines) -> str:
    """Which learning rate suits each arm best, on the validation questions."""
    checks = analysis.rate_checks(lines)
    if not checks:
        return "Learning rate: not run."
    said = ", ".join(f"{NAMES[check.arm]} at {percent_of(check.share)}: x{check.best:g}" for check in checks)
    alike = all(check.best == 1 for check in checks)
    word = "is the best for both arms" if alike else "is not the best for every arm"
    return (
        f"The learning rate of the runs {word} among half, once and twice it (best on validation: {said}). With the "
        f"best rate of each arm VIG minus all tokens, right colour: {at_best_rates(lines)} (not tested)."
    )


def at_best_rates(lines: Lines) -> str:
    """VIG minus all tokens on validation at the rate of the runs, and with each arm's best; empty if not run."""
    checks, differences = analysis.rate_checks(lines), []
    for share in dict.fromkeys(check.share for check in checks):
        means = {check.arm: check.means for check in checks if check.share == share}
        if {"all", "vig"} <= means.keys():
            best = number(max(means["vig"].values()) - max(means["all"].values()))
            differences.append(
                f"{number(means['vig'][1.0] - means['all'][1.0])} becomes {best} at {percent_of(share)}"
            )
    return "; ".join(differences)


def readme(lines: Lines) -> list[str]:
    """Three lines: the primary finding, the two ends, and what VIG is compared with."""
    first = analysis.primary(lines)
    tests = {one.comparison: one for one in analysis.tested(lines, "secondary")}

    def said(other: str, share: float, measure: str = COLOUR) -> str:
        one = tests[analysis.difference("vig", other, share, measure)]
        return f"{interval(one.estimate)} ({WORDS[one.direction]})"

    most, none = SHARES[-1], SHARES[0]
    word = {1: "holds", -1: "reversed", 0: "not shown"}[first.direction]
    rates_say = at_best_rates(lines)
    tuned = f" With each arm's best learning rate {rates_say} (validation, not tested)." if rates_say else ""
    return [
        f"- The more answers ignore the image, the more VIG gains over training on all tokens: **{word}**, "
        f"{interval(first.estimate)} points of right colour from {percent_of(none)} to {percent_of(most)} blind "
        f"answers (paired t, 95 %, {first.estimate.n} seeds).",
        f"- VIG minus all tokens: right colour {said('all', none)} with no blind answers, {said('all', most)} with "
        f"{percent_of(most)}; hallucinated objects (CHAIR_i) {said('all', most, CHAIR)}; whole answer "
        f"{said('all', none, EXACT)} and {said('all', most, EXACT)}.{tuned}",
        f"- VIG minus a loss filter of equal size: right colour {said('loss filter', none)} and "
        f"{said('loss filter', most)}. The words in brackets follow p adjusted (Holm) for 24 tests. A miniature of "
        "drawn scenes, not the paper's models: [docs/evidence.md](docs/evidence.md).",
    ]
