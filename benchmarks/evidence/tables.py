"""The tables of docs/evidence.md, in Markdown, from the lines alone. A cell without runs is a dash."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from benchmarks.evidence import analysis
from benchmarks.evidence.analysis import CHAIR, COLOUR, EXACT, MEASURES, Cell, Lines, Tested
from benchmarks.evidence.design import (
    ARMS,
    HABIT_SHARES,
    NAMES,
    RATES,
    SHARES,
    UNTUNED,
    VARIANT_SHARES,
    VARIANTS,
    Run,
)
from benchmarks.evidence.verdict import SHORT, interval, number, pairs, percent_of
from vig.evaluation.probes.table import PROBES

SHOWN = (
    COLOUR,
    EXACT,
    "prior_colour",
    CHAIR,
    "chair_s",
    "recall",
    "text_loss",
    "trained_tokens",
    "text_share",
    "seconds",
)
HEADS = ("right colour", "whole answer", "colour where habit is right", "CHAIR_i", "CHAIR_s", "objects named",
         "text-only loss, nats", "tokens trained on", "of them text-only", "seconds")  # fmt: skip
DIGITS = {"text_loss": 3, "trained_tokens": 0}
DASH = "–"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    marks = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, marks, *rows))


def mean(lines: Lines, cell: Cell, field: str) -> str:
    """A mean over the seeds of a cell, and half of its t interval."""
    seeds = lines.seeds([cell])
    values = lines.values(cell, field, seeds)
    digits = DIGITS.get(field, 1)
    if not len(values) or np.isnan(values).all():
        return DASH
    found = analysis.paired(values)
    half = (found.high - found.low) / 2
    text = f"{found.mean:,.{digits}f}"
    return (
        text
        if math.isnan(half) or field in ("seconds", "trained_tokens", "text_share")
        else f"{text} ± {half:.{digits}f}"
    )


def of_share(lines: Lines, share: float, base: str = "shipped", arms: Iterable[str] = ARMS) -> str:
    """All figures of the arms at a share of blind answers, the untuned base first."""
    rows = [[NAMES["untuned"], *(mean(lines, Cell(base, 0.0, "untuned"), field) for field in SHOWN)]]
    for arm in arms:
        cell = Cell(base, share, "all" if arm == "oracle" and not share else arm)
        if cell in lines.cells:
            seeds = len(lines.seeds([cell]))
            name = NAMES[arm] + (" (that is: all tokens)" if cell.arm != arm else "")
            rows.append([f"{name}, n = {seeds}", *(mean(lines, cell, field) for field in SHOWN)])
    return markdown(["", *HEADS], rows)


def of_family(lines: Lines, family: str, shares: Sequence[float] = SHARES) -> str:
    """Differences by share with their adjusted p: a row a pair of arms and a measure; bold where p < 0.05."""
    rows = []
    for (arm, other, measure), tests in pairs(analysis.tested(lines, family)).items():
        rows.append([f"{NAMES[arm]} − {NAMES[other]}, {SHORT[measure]}", *map(_tested, tests)])
    return markdown(["", *(f"{percent_of(share)} blind" for share in shares)], rows)


def _tested(one: Tested) -> str:
    if not one.estimate.n:
        return DASH
    text = interval(one.estimate)
    text = f"**{text}**" if one.direction else text
    if not math.isnan(one.estimate.picture_low):
        text += f" [{number(one.estimate.picture_low)}, {number(one.estimate.picture_high)}]"
    p = one.adjusted_p
    return text if math.isnan(p) else f"{text}, p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}"


def described(lines: Lines) -> str:
    """VIG minus all, and VIG with easy tokens minus all, in what is shown and not tested."""
    rows = [
        [f"{NAMES[arm]} − {NAMES['all']}, {MEASURES[field].name}",
         *(interval(analysis.estimate(lines, analysis.difference(arm, "all", share, field)), DIGITS.get(field, 1))
           for share in SHARES)]
        for arm in ("vig", "easy", "oracle")
        for field in (COLOUR, "prior_colour", "text_loss", "chair_s", "recall")
        if not (arm != "oracle" and field == COLOUR)
    ]  # fmt: skip
    return markdown(["not tested", *(f"{percent_of(share)} blind" for share in SHARES)], rows)


def easy(lines: Lines) -> str:
    """VIG with easy tokens minus VIG, and the lowest and highest seed of whole answers."""
    rows = [
        [f"{NAMES['easy']} − {NAMES['vig']}, {SHORT[measure]}",
         *(interval(analysis.estimate(lines, analysis.difference("easy", "vig", share, measure)))
           for share in SHARES)]
        for measure in (COLOUR, EXACT, CHAIR)
    ]  # fmt: skip
    rows += [
        [f"whole answer, lowest to highest seed: {NAMES[arm]}",
         *(_range(list(lines.cells.get(Cell("shipped", share, arm), {}).values()), EXACT) for share in SHARES)]
        for arm in ("vig", "easy", "all")
    ]  # fmt: skip
    return markdown(["not tested", *(f"{percent_of(share)} blind" for share in SHARES)], rows)


def _range(found: Sequence[dict], field: str) -> str:
    values = [line[field] for line in found]
    return f"{min(values):.1f} to {max(values):.1f}" if values else DASH


def variants(lines: Lines) -> str:
    """The other ways to choose minus VIG, on the seeds that have both."""
    rows = [
        [f"{NAMES[arm]} − {NAMES['vig']}, {SHORT[measure]}",
         *(interval(analysis.estimate(lines, analysis.difference(arm, "vig", share, measure)))
           for share in VARIANT_SHARES)]
        for arm in VARIANTS
        for measure in (COLOUR, EXACT, CHAIR)
    ]  # fmt: skip
    return markdown(["not tested", *(f"{percent_of(share)} blind" for share in VARIANT_SHARES)], rows)


def kept(lines: Lines) -> str:
    """What each arm keeps of the samples with a picture, and how many wrong tokens are among it: means over seeds."""
    rows = []
    for arm in (*ARMS, *VARIANTS):
        cells = []
        for share in SHARES:
            found = list(lines.cells.get(Cell("shipped", share, arm), {}).values())
            cells.append(_kept(found) if found else DASH)
        rows.append([NAMES[arm], *cells])
    return markdown(
        ["kept: samples, tokens, wrong tokens, %", *(f"{percent_of(share)} blind" for share in SHARES)], rows
    )


def _kept(found: list[dict]) -> str:
    parts = []
    for name in ("samples", "tokens", "wrong"):
        total = sum(line[f"{name}_total"] for line in found)
        parts.append(f"{100 * sum(line[f'{name}_kept'] for line in found) / total:.0f}" if total else DASH)
    return ", ".join(parts)


def habit(lines: Lines) -> str:
    return "\n".join(
        f"{percent_of(share)} blind answers\n\n{of_share(lines, share, 'habit', ('all', 'vig', 'loss filter'))}"
        for share in HABIT_SHARES
    )


def rates(lines: Lines) -> str:
    rows = [
        [
            f"{NAMES[check.arm]}, {percent_of(check.share)} blind",
            *(f"{check.means[rate]:.1f}" for rate in RATES),
        ]
        for check in analysis.rate_checks(lines)
    ]
    return markdown(["right colour on validation, %", *(f"rate × {rate:g}" for rate in RATES)], rows)


UNSHOWN = {"lost", "image tokens", "near zero", "gain"}  # measures of the probes that their tables leave out
Key = tuple[str, str]  # group and measure of a probe


def probes(found: Mapping[Run, dict]) -> Iterator[tuple[str, str]]:
    """Each probe's name and table: the base and its interval over pictures, arms as mean, lowest and highest seed."""
    by_arm: dict[str, list[dict[str, dict[Key, list]]]] = {}
    for run, line in found.items():
        figures: dict[str, dict[Key, list]] = {}
        for probe, group, measure, *rest in line["figures"]:
            figures.setdefault(probe, {})[group, measure] = rest
        by_arm.setdefault(run.arm, []).append(figures)
    base, *_ = by_arm.pop(UNTUNED)
    for probe, figures in base.items():
        units = {measure.name: measure.unit for measure in PROBES[probe].measures}
        rows = [
            [f"{group}: {measure}" + (", nats" if units[measure] == "nats" else ", %"),
             _over_pictures(figures[group, measure], units[measure]),
             *(_over_seeds([one[probe][group, measure][1] for one in arm], units[measure]) for arm in by_arm.values())]
            for group, measure in figures
            if measure not in UNSHOWN and group != "all" and " - " not in group
        ]  # fmt: skip
        heads = [f"{NAMES[arm]}, n = {len(lines_)}" for arm, lines_ in by_arm.items()]
        yield probe, markdown([probe, NAMES[UNTUNED], *heads], rows)


def _over_pictures(figure: list, unit: str) -> str:
    _, value, low, high = figure
    text = _probed(value, unit)
    return text if low is None else f"{text} [{_probed(low, unit)}, {_probed(high, unit)}]"


def _over_seeds(values: Sequence[float], unit: str) -> str:
    least, most = (_probed(end(values), unit) for end in (min, max))
    return f"{_probed(float(np.mean(values)), unit)} ({least} to {most})"


def _probed(value: float, unit: str) -> str:
    return number(value, 2) if unit == "nats" else f"{100 * value:.1f}"
