"""Figures with intervals, and their paired differences: everything is a function of sums over questions.

The bootstrap draws images, with all of their questions, since questions about one image are not independent:

    S*_k = sum_i w_i S_ik,   w ~ Multinomial(images, 1 / images),   figure* = f(S*)

and the interval is the percentile interval of figure*. Two systems are compared on the same draws:
d* = f(S*_left) - f(S*_right). Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 8, 13
and 16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vig.evaluation import bootstrap
from vig.evaluation.bootstrap import RESAMPLES, interval

Figures = dict[str, np.ndarray]  # name -> (R,) values, one a resample


@dataclass(frozen=True)
class Tally:
    """What the figures of a task are computed of. A unit is a question, or several that count as one.

    sums: name -> (units,) float64. figures: f({name: (R,) sums, "n": units}) -> {figure: (R,)}. right: of each unit,
    for McNemar's test; None where answers are not right or wrong. groups: those that each unit belongs to; the figures
    of the ones in `order` are shown apart. combine: f({group: figures}) -> {name: figures} made of the groups'.
    overall: show those of all units.
    """

    keys: list[str]
    images: list[str]
    sums: Mapping[str, np.ndarray]
    figures: Callable[[Mapping[str, np.ndarray]], Figures]
    right: np.ndarray | None = None
    groups: Sequence[Sequence[str]] | None = None
    order: Sequence[str] = ()
    combine: Callable[[Mapping[str, Figures]], dict[str, Figures]] | None = None
    overall: bool = True

    def columns(self) -> tuple[list[tuple[str, str]], np.ndarray]:
        """((group, name), ...) and their values a unit, (units, columns); the group "" holds every unit."""
        base = {"n": np.ones(len(self.keys))} | {
            name: np.asarray(values, float) for name, values in self.sums.items()
        }
        names, found = [], []
        for group in ("", *self.order):
            mask = 1.0 if group == "" else np.array([group in one for one in self.groups], float)
            for name, values in base.items():
                names.append((group, name))
                found.append(values * mask)
        return names, np.stack(found, axis=1)

    def evaluate(
        self, names: Sequence[tuple[str, str]], sums: np.ndarray
    ) -> dict[tuple[str, str], np.ndarray]:
        """(group, figure) -> (R,) for sums (R, columns). NaN where a resample holds nothing of a group."""
        of_group: dict[str, dict[str, np.ndarray]] = {}
        for place, (group, name) in enumerate(names):
            of_group.setdefault(group, {})[name] = sums[:, place]
        found = {}
        for group, columns in of_group.items():
            with np.errstate(divide="ignore", invalid="ignore"):
                values = self.figures(columns)
            found[group] = {name: np.where(columns["n"] > 0, value, np.nan) for name, value in values.items()}
        everything = found.pop("")
        combined = self.combine(found) if self.combine and found else {}
        shown = {"": everything} if self.overall or not found else {}
        return {
            (group, name): value
            for group, values in (shown | combined | found).items()
            for name, value in values.items()
        }


class Figure(NamedTuple):
    """One figure and its 95 % interval; None where fewer than two images leave nothing to draw."""

    group: str
    name: str
    value: float
    low: float | None
    high: float | None


class Change(NamedTuple):
    """One figure beside a baseline's on the same questions; the interval and p-value are of the difference."""

    group: str
    name: str
    value: float
    baseline: float
    difference: float
    low: float | None
    high: float | None
    p_value: float | None


def estimate(tally: Tally, *, resamples: int = RESAMPLES, seed: int = 0) -> list[Figure]:
    """Every figure of a tally with its interval."""
    names, images, (units,) = _by_image([tally])
    point = tally.evaluate(names, units.sum(axis=0, keepdims=True))
    draws = [tally.evaluate(names, sums) for (sums,) in _resampled([units], images, resamples, seed)]
    return [
        Figure(*key, float(value[0]), *interval([draw[key] for draw in draws]))
        for key, value in point.items()
    ]


def compare(left: Tally, right: Tally, *, resamples: int = RESAMPLES, seed: int = 0) -> list[Change]:
    """The figures of two systems on the same questions, whose units stand in the same order. Raises ValueError.

    p = 2 min(P(d* <= 0), P(d* >= 0)), with one added to both counts, at most 1.
    """
    if left.keys != right.keys:
        raise ValueError("the two sides hold other questions, or in another order")
    names, images, units = _by_image([left, right])
    totals = [one.sum(axis=0, keepdims=True) for one in units]
    ours, theirs = left.evaluate(names, totals[0]), right.evaluate(names, totals[1])
    draws = []
    for a, b in _resampled(units, images, resamples, seed):
        here, there = left.evaluate(names, a), right.evaluate(names, b)
        draws.append({key: here[key] - there[key] for key in ours})
    found = []
    for key, value in ours.items():
        drawn = [draw[key] for draw in draws]
        a, b = float(value[0]), float(theirs[key][0])
        found.append(Change(*key, a, b, a - b, *interval(drawn), _p_value(drawn)))
    return found


def _by_image(tallies: Sequence[Tally]) -> tuple[list[tuple[str, str]], int, list[np.ndarray]]:
    """Column names, the number of images, and (images, columns) sums of each tally."""
    images, inverse = np.unique(np.array(tallies[0].images, object).astype(str), return_inverse=True)
    names, found = [], []
    for tally in tallies:
        names, values = tally.columns()
        sums = np.zeros((len(images), values.shape[1]))
        np.add.at(sums, inverse, values)
        found.append(sums)
    return names, len(images), found


def _resampled(
    units: Sequence[np.ndarray], images: int, resamples: int, seed: int
) -> Iterator[list[np.ndarray]]:
    """Sums (R, columns) of each side, of the same draws."""
    for weights in bootstrap.draws(images, resamples, seed):
        yield [weights @ one for one in units]


def _p_value(drawn: Sequence[np.ndarray]) -> float | None:
    values = bootstrap.defined(drawn)
    if not len(values):
        return None
    tail = min((values <= 0).sum(), (values >= 0).sum())
    return float(min(1.0, 2 * (tail + 1) / (len(values) + 1)))


# --- figures that several tasks have ---


def accuracy(sums: Mapping[str, np.ndarray]) -> Figures:
    """right / n."""
    return {"accuracy": sums["right"] / sums["n"]}


def mean_of_groups(groups: Mapping[str, Figures]) -> dict[str, Figures]:
    """The unweighted mean over groups, under the name "mean"."""
    names = next(iter(groups.values()))
    return {"mean": {name: np.mean([one[name] for one in groups.values()], axis=0) for name in names}}
