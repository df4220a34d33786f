"""One picture a result: bars from zero, labelled with their values, the library's in colour."""

from __future__ import annotations

from pathlib import Path

from benchmarks import machine, results

OURS, THEIRS, LINE = "#c2410c", "#9ca3af", "#374151"
LONGEST = 2.6  # of the reference: longer bars are cut, drawn with an arrow, and labelled with their value
COLUMNS = 3


def draw(result: dict, folder: Path) -> Path | None:
    """Draws a result; None for suites that have no picture."""
    if result["suite"] == "peak":
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = _lines(result["cases"])
    columns, bars = max(map(len, lines)), max(len(_bars(case)) for case in result["cases"])
    size = (max(9.8, 4.9 * columns), len(lines) * (0.27 * bars + 0.95) + 0.5)
    figure, axes = pyplot.subplots(len(lines), columns, figsize=size, squeeze=False, layout="constrained")
    for row, cases in zip(axes, lines, strict=True):
        for axis, case in zip(row, cases, strict=False):
            _panel(axis, case, bars)
        for axis in row[len(cases) :]:
            axis.set_visible(False)
        _share_names(row, cases)
    figure.suptitle(f"{_title(result)}\n{machine.sentence(result)}, {machine.threads(result)}", fontsize=11)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{results.path_of(result, Path()).stem}.png"
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return path


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
        "gpu": "On a GPU: time over the bare products of the same run; blur in milliseconds",
    }[result["suite"]]


def _timed(case: dict) -> list[dict]:
    return [row for row in case["rows"] if row["status"] == "ok"]


def _bars(case: dict) -> list[tuple[str, float, bool]]:
    """(name, length, ours) of what was measured, without the bare products themselves."""
    timed = _timed(case)
    if "unit" in case:
        return [(row["name"], row["value"], row["ours"]) for row in timed]
    if "sigma" in case:
        return [(row["name"], row["p50_ms"], row["ours"]) for row in timed]
    single = [row for row in timed if not row["baseline"]]
    return [(row["name"], row["ratio"], row["ours"]) for row in single if row["ratio"] is not None]


def _share_names(axes, cases: list[dict]) -> None:
    """Contenders are named once a line where all its panels have the same."""
    names = [[name for name, _, _ in _bars(case)] for case in cases]
    for axis, own in zip(axes[1:], names[1:], strict=False):
        if own == names[0]:
            axis.set_yticklabels([])


def _panel(axis, case: dict, places: int) -> None:
    bars = _bars(case)
    is_ratio = "unit" not in case and "sigma" not in case
    promises = {place: row["promised"] for place, row in enumerate(_timed(case)) if row.get("promised")}
    longest = max([length for _, length, _ in bars] + list(promises.values()), default=1.0)
    limit = max(1.3, min(LONGEST, 1.3 * longest)) if is_ratio else 1.25 * max(longest, 1e-3)
    for place, (_, length, is_ours) in enumerate(bars):
        _bar(axis, place, length, OURS if is_ours else THEIRS, limit, is_ratio)
    for place, promised in promises.items():
        axis.plot([promised, promised], [place - 0.45, place + 0.45], color=LINE, linewidth=1.6)
    axis.set_yticks(range(len(bars)), [name for name, _, _ in bars], fontsize=8)
    for label, (_, _, is_ours) in zip(axis.get_yticklabels(), bars, strict=True):
        label.set_fontweight("bold" if is_ours else "normal")
    axis.set_ylim(places - 0.4, -0.6)  # the same height a bar in every panel
    axis.set_xlim(0, limit)
    axis.tick_params(axis="x", labelsize=8)
    if is_ratio:
        axis.axvline(1.0, color=LINE, linewidth=0.9, linestyle=(0, (4, 3)))
    axis.set_title(results.label(case).replace(" x ", " × "), fontsize=9)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _bar(axis, place: int, length: float, colour: str, limit: float, is_ratio: bool) -> None:
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
    text = f"{length:.2f}" if is_ratio else results.milliseconds(length)
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
