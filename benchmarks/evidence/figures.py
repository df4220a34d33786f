"""The two figures of docs/evidence.md: differences by the share of blind answers, and the arms themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.evidence import analysis
from benchmarks.evidence.analysis import CHAIR, COLOUR, EXACT, Cell, Lines
from benchmarks.evidence.design import ARMS, NAMES, SHARES

COLOURS = {  # told apart with impaired colour vision too: the palette of Okabe and Ito, 2008, and a grey
    "all": "#000000",
    "vig": "#d55e00",
    "easy": "#009e73",
    "random": "#999999",
    "loss filter": "#0072b2",
    "permuted": "#cc79a7",
    "oracle": "#e69f00",
}
MARKS = dict(zip(COLOURS, "oD^sPvX", strict=True))
DIFFERENCES = (
    ("vig", "all", "vig"),
    ("vig", "loss filter", "loss filter"),
    ("easy", "all", "easy"),
)  # last: its look
PANELS = {
    COLOUR: "right colour, %",
    EXACT: "whole answer right, %",
    CHAIR: "CHAIR_i, % (less is better)",
}
WIDTH = (
    13.0  # points of the share over which arms stand side by side, so that intervals do not hide each other
)


def draw(lines: Lines, folder: Path) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    return [
        _differences(lines, folder / "evidence-differences.png"),
        _arms(lines, folder / "evidence-arms.png"),
    ]


def _differences(lines: Lines, path: Path) -> Path:
    """Mean difference and 95 % t interval of each pair of arms, a panel a measure."""
    figure, axes = _panels(
        "Difference of two arms trained on the same data: mean and 95 % interval over seeds"
    )
    for axis, measure in zip(axes, PANELS, strict=True):
        axis.axhline(0, color="#9ca3af", linewidth=0.8)
        for place, (arm, other, look) in enumerate(DIFFERENCES):
            found = [
                analysis.estimate(lines, analysis.difference(arm, other, share, measure)) for share in SHARES
            ]
            label = f"{NAMES[arm]} − {NAMES[other]}"
            shift = _shift(place, len(DIFFERENCES))
            _series(axis, shift, [(one.mean, one.low, one.high) for one in found], label, look)
        axis.set_ylabel("points")
    return _save(figure, axes, path)


def _arms(lines: Lines, path: Path) -> Path:
    """Mean and 95 % t interval of each arm, and the base as a line."""
    figure, axes = _panels("Every arm: mean and 95 % interval over seeds; dotted: the base before tuning")
    base = lines.untuned("shipped")
    for axis, measure in zip(axes, PANELS, strict=True):
        if base is not None:
            axis.axhline(base[measure], color="#374151", linewidth=1, linestyle=":")
        for place, arm in enumerate(ARMS):
            points = []
            for share in SHARES:
                cell = Cell("shipped", share, "all" if arm == "oracle" and not share else arm)
                found = analysis.paired(lines.values(cell, measure, lines.seeds([cell])))
                points.append((found.mean, found.low, found.high))
            _series(axis, _shift(place, len(ARMS)), points, NAMES[arm], arm)
        axis.set_ylabel("per cent")
    return _save(figure, axes, path)


def _panels(title: str):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(14, 5), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for axis, name in zip(axes, PANELS.values(), strict=True):
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("answers from habit in the tuning data, %")
        axis.set_xticks([100 * share for share in SHARES])
        axis.grid(axis="y", color="#e5e7eb", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _shift(place: int, count: int) -> float:
    """Of the series at this place of so many, in points of the share."""
    return WIDTH * (place - (count - 1) / 2) / count


def _series(axis, shift: float, points: Sequence[tuple], label: str, look: str) -> None:
    """look: the arm whose colour and mark it takes. The line is fainter than marks and intervals."""
    mean, low, high = np.array(points, float).T
    there = ~np.isnan(mean)
    if not there.any():
        return
    x = 100 * np.array(SHARES) + shift
    whiskers = np.nan_to_num(np.stack([mean - low, high - mean]))[:, there]
    axis.plot(x[there], mean[there], color=COLOURS[look], linewidth=1, alpha=0.35)
    axis.errorbar(
        x[there],
        mean[there],
        whiskers,
        label=label,
        color=COLOURS[look],
        marker=MARKS[look],
        markersize=5,
        capsize=2.5,
        linestyle="none",
        elinewidth=1.3,
    )


def _save(figure, axes, path: Path) -> Path:
    from matplotlib import pyplot

    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return path
