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

    cases = result["cases"]
    columns = min(COLUMNS, len(cases))
    lines = -(-len(cases) // columns)
    bars = max(len(_bars(case)) for case in cases)
    figure, axes = pyplot.subplots(
        lines,
        columns,
        figsize=(4.9 * columns, lines * (0.27 * bars + 0.95) + 0.5),
        squeeze=False,
        layout="constrained",
    )
    for axis, case in zip(axes.flat, cases, strict=False):
        _panel(axis, case, bars)
    for line in range(lines):
        _share_names(axes[line], cases[line * columns : (line + 1) * columns])
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    figure.suptitle(f"{_title(result)}\n{machine.sentence(result)}, {machine.threads(result)}", fontsize=11)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{results.path_of(result, Path()).stem}.png"
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return path


def _title(result: dict) -> str:
    return {
        "score": "Per-token log-probabilities: time over torch's bare matrix product (1 = the product alone)",
        "train": "Loss and gradients: time over torch's three bare matrix products (1 = the products alone)",
        "memory": "Peak memory of one call beyond inputs, outputs and gradients, MiB",
        "blur": "Gaussian blur: milliseconds an image",
        "gpu": "On a GPU: time over the baseline of each panel",
    }[result["suite"]]


def _bars(case: dict) -> list[tuple[str, float, bool]]:
    """(name, length, ours) of what was measured, without the bare products themselves."""
    timed = [row for row in case["rows"] if row["status"] == "ok"]
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
    limit = LONGEST if is_ratio else 1.25 * max((length for _, length, _ in bars), default=1.0)
    limit = min(limit, 1.3 * max((length for _, length, _ in bars), default=1.0)) if is_ratio else limit
    limit = max(limit, 1.25) if is_ratio else limit
    for place, (_, length, is_ours) in enumerate(bars):
        colour = OURS if is_ours else THEIRS
        cut = length > 0.9 * limit
        shown = 0.86 * limit if cut else length
        axis.barh(place, shown, color=colour, height=0.72)
        text = f"{length:.2f}" if is_ratio else results.milliseconds(length)
        axis.text(
            shown + 0.012 * limit,
            place,
            f"→ {text}" if cut else text,
            va="center",
            fontsize=8,
            color=colour if is_ours else LINE,
            fontweight="bold" if is_ours else "normal",
        )
    axis.set_yticks(range(len(bars)), [name for name, _, _ in bars], fontsize=8)
    for label, (_, _, is_ours) in zip(axis.get_yticklabels(), bars, strict=True):
        label.set_fontweight("bold" if is_ours else "normal")
    axis.set_ylim(places - 0.4, -0.6)  # the same height a bar in every panel
    axis.set_xlim(0, limit)
    axis.tick_params(axis="x", labelsize=8)
    if is_ratio:
        axis.axvline(1.0, color=LINE, linewidth=0.9, linestyle=(0, (4, 3)))
    promised = next((row["promised"] for row in case["rows"] if row.get("promised")), None)
    if promised is not None and promised < limit:
        axis.axvline(promised, color=OURS, linewidth=0.9, linestyle=(0, (4, 3)))
        axis.text(promised, -0.75, "promised", fontsize=7, color=OURS, ha="center")
    axis.set_title(results.label(case).replace(" x ", " × "), fontsize=9)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
