"""One picture a result: bars from zero, labelled with their values, the library's in colour."""

from __future__ import annotations

from operator import itemgetter
from pathlib import Path

from benchmarks import machine, results

OURS, THEIRS, LINE = "#c2410c", "#9ca3af", "#374151"
LONGEST = 2.6  # of the reference: longer bars are cut, drawn with an arrow, and labelled with their value
COLUMNS = 3
DIGEST = "Digest of the result"  # a text of the PNG file


def draw(result: dict, folder: Path, summary: bool = False) -> Path | None:
    """Draws a result, or what the README shows of it; None for suites that have no such picture."""
    cases = cases_of(result, summary)
    if not cases:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = _lines(cases)
    columns, bars = max(map(len, lines)), [max(len(_bars(case)) for case in line) for line in lines]
    heights = [0.27 * places + 0.95 for places in bars]  # the same height a bar in every panel
    figure, axes = pyplot.subplots(
        len(lines),
        columns,
        figsize=(max(9.8, 4.9 * columns), sum(heights) + 0.5),
        squeeze=False,
        layout="constrained",
        gridspec_kw={"height_ratios": heights},
    )
    ratios = [length for case in cases if _is_ratio(case) for _, length, _ in _bars(case)]
    limit = max(1.3, min(LONGEST, 1.3 * max(ratios, default=1.0)))  # one scale for all ratios
    for row, shown, places in zip(axes, lines, bars, strict=True):
        for axis, case in zip(row, shown, strict=False):
            _panel(axis, case, places, limit)
        for axis in row[len(shown) :]:
            axis.set_visible(False)
        _share_names(row, shown)
    single = any(row.get("samples") == 1 for case in cases for row in results.timed(case))
    figure.suptitle(heading(result) + ("\n* one call, without a warm-up" if single else ""), fontsize=11)
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(result, folder, summary)
    figure.savefig(path, dpi=110, metadata={"Software": None, DIGEST: results.digest(result)})
    pyplot.close(figure)
    return path


def cases_of(result: dict, summary: bool = False) -> list[dict]:
    """The cases that a picture shows; [] of suites that have none.

    summary: the README's picture, which scoring has alone: its last line of panels."""
    if summary:
        return _lines(result["cases"])[-1] if result["suite"] == "score" else []
    if result["suite"] == "peak":
        return []
    if result["suite"] != "gpu":
        return result["cases"]
    from benchmarks.gpu import tables

    return tables.drawn(result)


def path_of(result: dict, folder: Path, summary: bool = False) -> Path:
    """Where the plot of a result lies."""
    return folder / f"{'readme-' if summary else ''}{results.path_of(result, Path()).stem}.png"


def digest_of(path: Path) -> str | None:
    """Of the result that a plot was drawn from, as the plot's file says."""
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get(DIGEST)


def heading(result: dict) -> str:
    """What a picture shows, and of which machine."""
    return f"{_title(result)}\n{machine.place(result)}"


def _lines(cases: list[dict]) -> list[list[dict]]:
    """Panels, line by line: what differs in kind or precision begins a new line."""
    groups: dict[tuple, list[dict]] = {}
    for case in cases:
        groups.setdefault((case.get("suite"), case.get("dtype")), []).append(case)
    return [g[start : start + COLUMNS] for g in groups.values() for start in range(0, len(g), COLUMNS)]


def _title(result: dict) -> str:
    return {
        "score": "Per-token log-probabilities: time over torch's bare matrix product (1 = the product alone)\n"
        "linear_vig has twice the rows and is divided by two products",
        "train": "Loss and gradients: time over torch's three bare matrix products (1 = the products alone)",
        "memory": "Peak memory of one call beyond inputs, outputs and gradients, MiB (stroke: what is promised)",
        "blur": "Gaussian blur: milliseconds an image",
        "gpu": "On a GPU: device time over the bare products of the same run; blur in milliseconds",
    }[result["suite"]]


def _is_ratio(case: dict) -> bool:
    return "unit" not in case and "sigma" not in case


def _shown(case: dict) -> list[dict]:
    """What was measured, without the bare products themselves."""
    return [
        row
        for row in results.timed(case)
        if not _is_ratio(case) or (not row["baseline"] and row["ratio"] is not None)
    ]


def _bars(case: dict) -> list[tuple[str, float, bool]]:
    """(name, length, ours)."""
    key = "value" if "unit" in case else "ratio" if _is_ratio(case) else "p50_ms"
    named = results.named if key != "value" else itemgetter("name")  # notes are of times
    return [(named(row), row[key], row["ours"]) for row in _shown(case)]


def _share_names(axes, cases: list[dict]) -> None:
    """Contenders are named once a line where all its panels have the same."""
    names = [[name for name, _, _ in _bars(case)] for case in cases]
    for axis, own in zip(axes[1:], names[1:], strict=False):
        if own == names[0]:
            axis.set_yticklabels([])


def _panel(axis, case: dict, places: int, limit: float) -> None:
    """`limit`: the end of the scale of ratios; other figures have one of their own."""
    rows, bars, is_ratio = _shown(case), _bars(case), _is_ratio(case)
    promises = {place: row["promised"] for place, row in enumerate(rows) if row.get("promised")}
    if not is_ratio:
        limit = 1.25 * max([1e-3, *(length for _, length, _ in bars), *promises.values()])
    for place, (row, (_, length, is_ours)) in enumerate(zip(rows, bars, strict=True)):
        text = f"{length:.2f}" if is_ratio else results.milliseconds(length)
        text += "*" if row.get("samples") == 1 else ""
        _bar(axis, place, length, text, OURS if is_ours else THEIRS, limit)
    for place, promised in promises.items():
        axis.plot([promised, promised], [place - 0.45, place + 0.45], color=LINE, linewidth=1.6)
    axis.set_yticks(range(len(bars)), [name for name, _, _ in bars], fontsize=8)
    for label, (_, _, is_ours) in zip(axis.get_yticklabels(), bars, strict=True):
        label.set_fontweight("bold" if is_ours else "normal")
    axis.set_ylim(places - 0.4, -0.6)
    axis.set_xlim(0, limit)
    axis.tick_params(axis="x", labelsize=8)
    if is_ratio:
        axis.axvline(1.0, color=LINE, linewidth=0.9, linestyle=(0, (4, 3)))
    axis.set_title(results.label(case).replace(" x ", " × "), fontsize=9)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _bar(axis, place: int, length: float, text: str, colour: str, limit: float) -> None:
    """One bar and its value. A bar that is too long for the panel is broken, visibly."""
    longest = 0.84 * limit  # leaves room for the value
    cut = length > longest
    shown = longest if cut else length
    axis.barh(place, shown, color=colour, height=0.72)
    if cut:
        for x in (0.72 * limit, 0.74 * limit):
            axis.plot(
                [x - 0.008 * limit, x + 0.008 * limit], [place + 0.5, place - 0.5], color="white", linewidth=2
            )
    axis.text(
        shown + 0.012 * limit,
        place,
        f"→ {text}" if cut else text,
        va="center",
        fontsize=8,
        color=LINE if colour == THEIRS else colour,
        fontweight="normal" if colour == THEIRS else "bold",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        zorder=3,
    )
