"""What a practitioner may conclude, and what was only described: sentences made from the numbers by fixed rules.

"Better" and "worse" are those of the tests. What is described has intervals that are not adjusted, and says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from benchmarks.evidence import analysis
from benchmarks.evidence.analysis import CHAIR, COLOUR, MEASURES, Cell, Estimate, Lines, Tested
from benchmarks.evidence.design import HABIT_SHARES, NAMES, SHARES
from benchmarks.evidence.verdict import (
    at_best_rates,
    every_test,
    interval,
    pairs,
    percent_of,
    told,
)

DESCRIBED = ("prior_colour", "text_loss", "chair_s", "recall")  # shown with intervals and not tested
YOURS = (
    "The share of blind answers decides, and nothing here estimates that of your data: read some of its answers, drawn "
    "at random, beside their pictures ([how](concepts.md#how-many-answers-are-blind))."
)


def conclusions(lines: Lines) -> list[str]:
    """Of the parts that were tested at every share."""
    tests = pairs(analysis.tested(lines, "secondary"))
    found = [
        (_where, tests[("vig", "all", COLOUR)]),
        (_against_filter, tests[("vig", "loss filter", COLOUR)]),
    ]
    said = [rule(of) for rule, of in found if _complete(of)]
    objects = tests[("vig", "all", CHAIR)], tests[("vig", "loss filter", CHAIR)]
    if all(map(_complete, objects)):
        said.append(_objects(*objects))
    swing = swings(lines)
    rates = at_best_rates(lines)
    if rates:
        said.append(
            "Part of a gain may be the learning rate, which was the same for every arm: VIG minus all tokens on the "
            f"validation questions, right colour, {rates} with the best of three rates for each arm (not tested)."
        )
    return [*said, *([swing] if swing else []), YOURS]


def _complete(tests: Iterable[Tested]) -> bool:
    return not any(math.isnan(one.adjusted_p) for one in tests)


def _where(tests: Sequence[Tested]) -> str:
    better, worse = _at(tests, 1), _at(tests, -1)
    if better:
        said = f"Where many answers were written without looking, select: VIG beats all tokens in right colour {better}"
    else:
        said = "At no share of blind answers is VIG shown to beat all tokens in right colour"
    said += f". It is worse {worse}." if worse else "."
    clean = tests[0]
    if clean.direction == -1:
        return f"{said} On clean data train on all tokens: VIG gives {interval(clean.estimate)} points there."
    if clean.estimate.high < 0:
        return (
            f"{said} On clean data train on all tokens as well: {interval(clean.estimate)} points is an interval below "
            "0, though the adjusted test does not confirm it."
        )
    return f"{said} On clean data nothing is shown either way ({interval(clean.estimate)} points)."


def _against_filter(tests: Sequence[Tested]) -> str:
    said = (
        "Compare with a filter of samples by their loss, which needs one pass and no null image (`vig select --by loss "
        "--level sample`). In right colour "
    )
    parts = [
        f"{what} {where}"
        for what, where in (
            ("VIG is better", _at(tests, 1)),
            ("VIG is worse", _at(tests, -1)),
            ("no difference is shown", _at(tests, 0)),
        )
        if where
    ]
    return f"{said}{'; '.join(parts)}."


def _objects(against_all: Sequence[Tested], against_filter: Sequence[Tested]) -> str:
    fewer, fewer_than_filter = _at(against_all, 1), _at(against_filter, 1)
    if not fewer:
        return "VIG is not shown to name fewer absent objects in captions than all tokens at any share."
    other = (
        f"It names fewer than a loss filter of equal size {fewer_than_filter}"
        if fewer_than_filter
        else "A loss filter of equal size is not shown to name more than VIG"
    )
    return f"Against invented objects in captions selection helps: VIG names fewer than all tokens {fewer}. {other}."


def _at(tests: Iterable[Tested], direction: int) -> str:
    """ "at 50 and 75 % blind answers", or "" where there are none."""
    shares = [f"{100 * one.comparison.plus[0].share:.0f}" for one in tests if one.direction == direction]
    return f"at {listed(shares)} % blind answers" if shares else ""


def listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


# ---- described, not tested


def swings(lines: Lines) -> str:
    """How far whole answers lie apart over seeds and shares, with and without easy tokens; "" where nothing was run."""
    ranges = {}
    for arm in ("vig", "easy", "all"):
        found = [
            line["test_exact"]
            for share in SHARES
            for line in lines.cells.get(Cell("shipped", share, arm), {}).values()
        ]
        if not found:
            return ""
        ranges[arm] = f"{min(found):.0f} to {max(found):.0f} %"
    return (
        "VIG alone can lose the form of an answer (described, not tested): over all seeds and shares whole answers are "
        f"right in {ranges['vig']} of cases with VIG, {ranges['easy']} with VIG and easy tokens, {ranges['all']} with "
        "all tokens. Where answers must keep their form, look at `--keep-easy`."
    )


def described_losses(lines: Lines) -> list[str]:
    """Measures that were not tested, and whose interval against all tokens lies wholly on the worse side."""
    said = []
    for base, arms, shares in (
        ("shipped", ("vig", "easy"), SHARES),
        ("habit", ("vig",), HABIT_SHARES),
    ):
        for arm in arms:
            for field in DESCRIBED:
                found = [
                    (share, analysis.estimate(lines, analysis.difference(arm, "all", share, field, base)))
                    for share in shares
                ]
                told = [
                    f"{interval(one, 3 if field == 'text_loss' else 1)} at {percent_of(share)}"
                    for share, one in found
                    if _is_worse(one, MEASURES[field].better)
                ]
                if told:
                    where = "habit base, " if base == "habit" else ""
                    name = MEASURES[field].name.removesuffix(", %")
                    said.append(f"{NAMES[arm]} against {NAMES['all']}, {where}{name}: {', '.join(told)}")
    return said


def near_losses(lines: Lines) -> list[str]:
    """Tests that show no difference, though the interval before adjustment lies wholly on the worse side."""
    return [
        told(one)
        for one in every_test(lines)
        if one.direction == 0 and _is_worse(one.estimate, MEASURES[one.comparison.measure].better)
    ]


def wrong_kept(lines: Lines) -> str:
    """Whether the choice of tokens within samples avoids wrong ones: VIG beside its permuted values; "" if not run."""
    told = []
    more = fewer = 0
    for share in SHARES[1:]:
        cells = [Cell("shipped", share, arm) for arm in ("vig", "permuted")]
        seeds = lines.seeds(cells)
        if seeds:
            vig, permuted = (lines.values(cell, "wrong_kept", seeds).mean() for cell in cells)
            more, fewer = more + (vig > permuted), fewer + (vig < permuted)
            told.append(f"{vig:.0f} and {permuted:.0f} at {percent_of(share)}")
    if not told:
        return ""
    said = (
        f"Wrong tokens kept with VIG and with its values permuted in each sample, means: {', '.join(told)}."
    )
    if more and not fewer:
        return (
            f"{said} So it is the choice of samples that avoids wrong tokens, not the choice of tokens in them: "
            "wrong words are content words, and VIG keeps content words."
        )
    return said


def _is_worse(found: Estimate, better: int) -> bool:
    return found.high < 0 if better == 1 else found.low > 0


def habit_is_right(lines: Lines) -> str:
    """What becomes of right habits on the habit base; "" where it was not run."""
    base = lines.untuned("habit")
    told = []
    for share in HABIT_SHARES:
        cells = [Cell("habit", share, arm) for arm in ("vig", "all")]
        seeds = lines.seeds(cells)
        if seeds:
            vig, all_ = (lines.values(cell, "prior_colour", seeds).mean() for cell in cells)
            told.append(f"{vig:.1f} % with VIG and {all_:.1f} % with all tokens at {percent_of(share)}")
    if base is None or not told:
        return ""
    return f"right colour where habit is right is {base['prior_colour']:.1f} % before tuning, {listed(told)}"
