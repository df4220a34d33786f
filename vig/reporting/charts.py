"""Charts as SVG whose text keeps its size at any width: lengths along the page are percentages, heights are pixels."""

from __future__ import annotations

import math

import numpy as np
from markupsafe import Markup

from vig.reporting.scale import (
    height_ticks,
    places,
    readable,
    rounded,
    shade,
    short,
    signed,
    tick_label,
    ticks,
)
from vig.reporting.views import Box, Histogram, KeepCurve

TALL, TOP, AXIS = 128, 24, 22  # pixels: the bars of a histogram, above them, below them
ROW = 22  # pixels a row of a box plot
LINES = 6  # kinds of lines in a figure of curves; further sources repeat them


def histogram(data: Histogram, tau: float | None, unit: str, *, logarithmic: bool = False) -> Markup:
    """Bars coloured by the tokens' scale, and a line at tau."""
    span, floor = data.high - data.low, TOP + TALL
    most = max(int(data.counts.max(initial=0)), 1)
    heights = np.log1p(data.counts) / np.log1p(most) if logarithmic else data.counts / most
    digits, step = places(data.width), 100 / len(data.counts)
    parts = []
    for count in height_ticks(most, logarithmic):
        y = floor - TALL * (math.log1p(count) / math.log1p(most) if logarithmic else count / most)
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="-6" y="{y + 4:.1f}" text-anchor="end">{short(count)}</text>')
    for index, (count, share) in enumerate(zip(data.counts.tolist(), heights.tolist(), strict=True)):
        if not count:
            continue
        start, rise = data.low + index * data.width, max(TALL * share, 1.0)
        label = f"{signed(start, digits)} to {signed(start + data.width, digits)} nats: {count:,} {unit}"
        parts.append(
            f'<rect class="{shade(start + data.width / 2)}" x="{index * step:.3f}%" y="{floor - rise:.1f}" '
            f'width="{step * 0.94:.3f}%" height="{rise:.1f}"><title>{label}</title></rect>'
        )
    parts.append(_axis(data.low, data.high, floor))
    if tau is not None:
        place = min(max((tau - data.low) / span, 0), 1) * 100
        anchor, shift = ("end", -5) if place > 75 else ("start", 5)
        parts.append(
            f'<g class="tau"><line x1="{place:.3f}%" x2="{place:.3f}%" y1="6" y2="{floor}"/>'
            f'<text x="{place:.3f}%" dx="{shift}" y="16" text-anchor="{anchor}">τ = {rounded(tau)}</text></g>'
        )
    label = f"Histogram of VIG in nats, {int(data.counts.sum()):,} {unit}"
    return Markup(
        f'<svg class="plot" height="{floor + AXIS}" role="img" aria-label="{label}" data-low="{data.low!r}" '
        f'data-high="{data.high!r}">{"".join(parts)}</svg>'
    )


def _axis(low: float, high: float, floor: float, about: int = 5) -> str:
    """A line with marked values; labels at the ends lean inwards, so that none is clipped."""
    parts = [f'<line class="axis" x1="0" x2="100%" y1="{floor}" y2="{floor}"/>']
    for value in ticks(low, high, about):
        place = (value - low) / (high - low) * 100
        anchor = "start" if place < 4 else "end" if place > 96 else "middle"
        parts.append(
            f'<line class="axis" x1="{place:.3f}%" x2="{place:.3f}%" y1="{floor}" y2="{floor + 4}"/>'
        )
        parts.append(
            f'<text x="{place:.3f}%" y="{floor + 17}" text-anchor="{anchor}">{tick_label(value)}</text>'
        )
    return "".join(parts)


def box_range(rows: list[tuple[str, Box]]) -> tuple[float, float]:
    """The ends of a figure's axis: all whiskers and means, and zero."""
    low = min(0.0, *(min(box.low, box.mean) for _, box in rows))
    high = max(0.0, *(max(box.high, box.mean) for _, box in rows))
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def box_row(box: Box, low: float, high: float) -> Markup:
    """Whiskers from 5 to 95 %, a box from 25 to 75 % in the median's colour, a line there, a dot at the mean.

    Of a few values the dot alone.
    """
    span, middle = high - low, ROW / 2

    def at(value: float) -> str:
        return f"{min(max((value - low) / span, 0), 1) * 100:.3f}%"

    digits = places(span / 50)
    quantiles = (
        f"{name} {signed(value, digits)}"
        for name, value in (
            ("median", box.median), ("25 %", box.first), ("75 %", box.third), ("5 %", box.low),
            ("95 %", box.high), ("mean", box.mean),
        )
    )  # fmt: skip
    label = f"mean {signed(box.mean, digits)} of {box.count} alone" if box.is_few else ", ".join(quantiles)
    width = max((box.third - box.first) / span * 100, 0.4)
    parts = [
        f'<line class="whisker" x1="{at(box.low)}" x2="{at(box.high)}" y1="{middle}" y2="{middle}"/>',
        f'<rect class="{shade(box.median)}" x="{at(box.first)}" y="4" width="{width:.3f}%" height="{ROW - 8}"/>',
        f'<line class="median" x1="{at(box.median)}" x2="{at(box.median)}" y1="3" y2="{ROW - 3}"/>',
    ]
    zero = f'<line class="zero" x1="{at(0)}" x2="{at(0)}" y1="0" y2="{ROW}"/>'
    dot = f'<circle class="mean" cx="{at(box.mean)}" cy="{middle}" r="2.2"/>'
    parts = [zero, *(() if box.is_few else parts), dot]
    return Markup(
        f'<svg class="plot" height="{ROW}" role="img" aria-label="{label}"><title>{label}</title>{"".join(parts)}</svg>'
    )


def box_axis(low: float, high: float) -> Markup:
    return Markup(f'<svg class="plot" height="22" aria-hidden="true">{_axis(low, high, 1)}</svg>')


def scatter(points: np.ndarray) -> Markup:
    """Sample VIG (n, 2) of A across and of B upwards, and the line on which they agree."""
    tall = 280
    low, high = (float(value) for value in (min(0.0, points.min()), max(0.0, points.max())))
    if high <= low:
        low, high = low - 0.5, high + 0.5
    places = (points - low) / (high - low)
    parts = [_axis(low, high, tall)]
    for value in ticks(low, high, 5):
        y = tall * (1 - (value - low) / (high - low))
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="-6" y="{y + 4:.1f}" text-anchor="end">{tick_label(value)}</text>')
    parts.append(f'<line class="zero" x1="0" x2="100%" y1="{tall}" y2="0"/>')
    parts += [
        f'<circle class="point" cx="{x * 100:.2f}%" cy="{tall * (1 - y):.1f}" r="2.2"/>'
        for x, y in places.tolist()
    ]
    label = f"Sample VIG of {len(points):,} samples in A and in B, nats"
    return Markup(
        f'<svg class="plot" height="{tall + AXIS}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    )


def curves(keep: KeepCurve, counts: np.ndarray, column: int, p: float, what: str) -> Markup:
    """Share kept against p: a line a source, of `counts` (S, P) over the totals' column."""
    parts = []
    for share in (0, 25, 50, 75, 100):
        y = TOP + TALL * (1 - share / 100)
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="-6" y="{y + 4:.1f}" text-anchor="end">{share} %</text>')
    lines = []
    for code, (name, total) in enumerate(zip(keep.sources, keep.totals[:, column].tolist(), strict=True)):
        if not total:
            continue
        points = " ".join(
            f"{at:.2f},{100 - 100 * count / total:.2f}"
            for at, count in zip(keep.p.tolist(), counts[code].tolist(), strict=True)
        )
        title = Markup("<title>{}</title>").format(readable(name))
        lines.append(f'<polyline class="c{code % LINES}" points="0,100 {points}">{title}</polyline>')
    parts.append(
        f'<svg y="{TOP}" width="100%" height="{TALL}" viewBox="0 0 100 100" preserveAspectRatio="none">'
        f"{''.join(lines)}</svg>"
    )
    parts.append(_axis(0, 100, TOP + TALL))
    parts.append(
        f'<g class="tau"><line x1="{p:g}%" x2="{p:g}%" y1="6" y2="{TOP + TALL}"/>'
        f'<text x="{p:g}%" dx="{-5 if p > 75 else 5}" y="16" text-anchor="{"end" if p > 75 else "start"}">'
        f"p = {p:g}</text></g>"
    )
    return Markup(
        f'<svg class="plot curves" height="{TOP + TALL + AXIS}" role="img" data-low="0" data-high="100" '
        f'aria-label="Share of {what} kept against p, by source">{"".join(parts)}</svg>'
    )
