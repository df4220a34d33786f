"""What a probe found of each sample, and its means with bootstrap intervals, alone or beside a baseline.

    figure = sum_i w_i S_i / sum_i w_i N_i,   w ~ Multinomial(I, 1 / I)

over I images: S_i is the sum of a measure over the samples of image i, N_i how many of them have it. An image is drawn
with all its samples, since questions about one image are not independent. The interval is the percentile interval of
the drawn figures; before and after tuning are compared on the same draws. Source: Efron and Tibshirani, "An
Introduction to the Bootstrap", 1993, chapters 8 and 13.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from vig.evaluation.bootstrap import draws, interval

Values = dict[str, dict[str, float]]  # group -> measure -> value; what is not defined is left out


class Unit(NamedTuple):
    """What was found of one sample, or of one pair."""

    key: str
    image: str  # what the bootstrap draws: units of one image are drawn together
    values: Values
    about: dict[str, Any] = {}  # noqa: RUF012 - for a reader of the file; never written to


@dataclass
class Findings:
    """errors: (key, id, message) of samples that could not be probed. notes: what a reader of the figures must know."""

    units: list[Unit]
    errors: list[tuple[str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Figure(NamedTuple):
    """One mean and its 95 % interval; None where fewer than two images leave nothing to draw."""

    group: str
    measure: str
    n: int
    value: float
    low: float | None
    high: float | None


class Change(NamedTuple):
    """One mean here and in the baseline, over the units that both have; the interval is of the difference."""

    group: str
    measure: str
    n: int
    baseline: float
    value: float
    difference: float
    low: float | None
    high: float | None


Column = tuple[str, str]  # group, measure


def estimate(units: Sequence[Unit], resamples: int, seed: int = 0) -> list[Figure]:
    """Every figure with its interval, in the order of their first appearance."""
    columns = _columns(units)
    sums, counts = _by_image(units, [unit.image for unit in units], columns)
    drawn = [_ratio(w @ sums, w @ counts) for w in draws(len(sums), resamples, seed)]
    values = _ratio(sums.sum(axis=0), counts.sum(axis=0))
    n = counts.sum(axis=0)
    return [
        Figure(*column, int(n[place]), float(values[place]), *interval([one[:, place] for one in drawn]))
        for place, column in enumerate(columns)
    ]


def compare(units: Sequence[Unit], baseline: Sequence[Unit], resamples: int, seed: int = 0) -> list[Change]:
    """Figures of the units that both sides have, their differences, and the interval of each, drawn together."""
    others = {unit.key: unit for unit in baseline}
    here = [unit for unit in units if unit.key in others]
    there = [others[unit.key] for unit in here]
    both = set(_columns(there))
    columns = [column for column in _columns(here) if column in both]
    images = [unit.image for unit in here]
    sides = [_by_image(side, images, columns) for side in (here, there)]
    drawn = []
    for w in draws(len(sides[0][0]), resamples, seed):
        after, before = (_ratio(w @ sums, w @ counts) for sums, counts in sides)
        drawn.append(after - before)
    (after, n), (before, _) = (
        (_ratio(sums.sum(axis=0), counts.sum(axis=0)), counts.sum(axis=0)) for sums, counts in sides
    )
    return [
        Change(
            *column, int(n[place]), float(before[place]), float(after[place]), float(after[place] - before[place]),
            *interval([one[:, place] for one in drawn]),
        )
        for place, column in enumerate(columns)
    ]  # fmt: skip


def _columns(units: Sequence[Unit]) -> list[Column]:
    found = {
        (group, measure): None
        for unit in units
        for group, values in unit.values.items()
        for measure in values
    }
    return list(found)


def _by_image(
    units: Sequence[Unit], images: Sequence[str], columns: Sequence[Column]
) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts of each measure, (images, columns) each."""
    place_of = {column: place for place, column in enumerate(columns)}
    image_of = {image: place for place, image in enumerate(dict.fromkeys(images))}
    sums = np.zeros((len(image_of), len(columns)))
    counts = np.zeros_like(sums)
    for unit, image in zip(units, images, strict=True):
        for group, values in unit.values.items():
            for measure, value in values.items():
                place = place_of.get((group, measure))
                if place is not None:
                    sums[image_of[image], place] += value
                    counts[image_of[image], place] += 1
    return sums, counts


def _ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """NaN where nothing was counted."""
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
