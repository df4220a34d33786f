"""The report's figures as files for papers: PNG and SVG through matplotlib, in one style."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vig.data.files import StoreError, explain_write_errors
from vig.reporting.facts import WORD_ROWS, Facts, gather
from vig.reporting.figures import box_figures
from vig.reporting.report import open_selection, rules_of
from vig.reporting.scale import rounded, shade
from vig.reporting.viewer import Viewer
from vig.reporting.views import Boxes, Histogram, KeepCurve, WordFigures
from vig.reporting.words import find_tagger, word_figures
from vig.selection.select import Selection
from vig.store.scores import open_scores, score_metadata

FORMATS = ("png", "svg")
NO_DATE = {".svg": "Date", ".pdf": "CreationDate"}
WIDTH = 3.4  # inches: a column of a two-column paper
# The page's scale in its light form (page.css).
COLOURS = {
    "z": "#ffffff", "p1": "#e2eefb", "p2": "#c3ddf8", "p3": "#9cc8f3", "p4": "#6fb0ee", "p5": "#4a9ae6",
    "n1": "#fdeadb", "n2": "#fbd3b3", "n3": "#f7b682", "n4": "#f0954f", "n5": "#e67a2a",
}  # fmt: skip
EDGE, INK, SOFT = "#8f8b80", "#1d2025", "#5a6069"
STYLE = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "legend.fontsize": 7, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": SOFT, "xtick.color": SOFT, "ytick.color": SOFT, "text.color": INK, "axes.labelcolor": INK,
    "axes.linewidth": 0.6, "lines.linewidth": 1.2, "savefig.dpi": 300, "savefig.bbox": "tight",
    "svg.hashsalt": "vig", "figure.constrained_layout.use": True,
}  # fmt: skip
LINES = [("#4a9ae6", "-"), ("#e67a2a", "-"), (INK, "-"), ("#4a9ae6", "--"), ("#e67a2a", "--"), (SOFT, ":")]


def plot(
    scores,  # folder, file, list of them, what `Scorer.score` returned, or a pyarrow Table of scores
    out: str | Path = "figures",
    *,
    selection: str | Path | Selection | None = None,
    sweep: bool = False,
    formats: Sequence[str] = FORMATS,
    processor: Any = None,
    seed: int = 0,
) -> list[Path]:
    """Write the report's figures to the folder ``out``, each in every format, and return the files.

    Histograms of sample and token VIG, box plots by source, kind of word, part of speech, place and length, words of
    the highest and lowest VIG. selection: its tau is drawn. sweep: also what each p keeps: tau, samples and tokens,
    by source. processor: for words, if the scores' own has moved. formats: any of png, svg, pdf.

    Raises ImportError with the cure where matplotlib is missing, StoreError where the scores cannot be read, ValueError
    for a format that is not known.
    """
    check_formats(formats)
    _require_matplotlib()
    scores, out = open_scores(scores), Path(out)
    metadata = score_metadata(scores)
    chosen, _ = open_selection(selection, metadata)
    facts = gather(scores, 0, seed, rules_of(chosen, metadata))
    if not facts.multimodal:
        raise StoreError("no scored sample has an image: there is no VIG to draw")
    viewer = Viewer(metadata, processor=processor)
    words = word_figures(facts.words, viewer.tokenizer, facts.multimodal > WORD_ROWS, find_tagger())
    files = []
    with explain_write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        for name, figure in _figures(facts, words, sweep):
            for kind in formats:
                files.append(out / f"{name}.{kind}")
                _save(figure, files[-1])
    return files


def check_formats(formats: Sequence[str]) -> None:
    """Raises ValueError for a format of no use here."""
    for kind in formats:
        if kind not in (*FORMATS, "pdf"):
            raise ValueError(f"format {kind!r} is not one of png, svg, pdf")


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'vig-kernels[plot]'") from error


@contextmanager
def _axes(height: float, rows: int = 1) -> Iterator[Any]:
    """A figure in the one style, without a window, and its axes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height))
        FigureCanvasAgg(figure)
        yield figure, figure.subplots(rows, 1, squeeze=False)[:, 0]


def _save(figure: Any, path: Path) -> None:
    """The same figure gives the same file."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure.savefig(path, metadata={} if path.suffix == ".png" else {NO_DATE[path.suffix]: None})


def _figures(facts: Facts, words: WordFigures, sweep: bool) -> Iterator[tuple[str, Any]]:
    """(file name, figure)"""
    yield "samples", _histogram(facts.compared[0].histogram(facts.tau), facts.tau, "samples", False)
    yield "tokens", _histogram(facts.compared[1].histogram(facts.tau), facts.tau, "answer tokens", True)
    for boxes in box_figures(facts, words):
        yield boxes.heading.lower().replace(" ", "-"), _boxes(boxes)
    if words.highest:
        yield "words", _words(words)
    if sweep and facts.keep is not None:
        yield "sweep-of-p", _sweep(facts.keep)


def _histogram(data: Histogram, tau: float | None, what: str, logarithmic: bool) -> Any:
    with _axes(1.8) as (figure, (axes,)):
        starts = data.low + data.width * np.arange(len(data.counts))
        colours = [COLOURS[shade(start + data.width / 2)] for start in starts]
        axes.bar(
            starts, data.counts, data.width, align="edge", color=colours, edgecolor=EDGE, linewidth=0.3,
            log=logarithmic,
        )  # fmt: skip
        if tau is not None:
            axes.axvline(tau, color=INK, linestyle="--", linewidth=0.9)
            axes.annotate(
                f" τ = {rounded(tau)}", (tau, 1), xycoords=("data", "axes fraction"), va="bottom", fontsize=7
            )
        axes.set(xlabel="VIG, nats", ylabel=what, xlim=(data.low, data.high))
        return figure


def _boxes(boxes: Boxes) -> Any:
    with _axes(0.55 + 0.19 * len(boxes.rows)) as (figure, (axes,)):
        names = ("whislo", "q1", "med", "q3", "whishi")
        shown = [
            dict.fromkeys(names, box.mean)
            if box.is_few
            else dict(zip(names, vars(box).values(), strict=False))
            for _, box in boxes.rows
        ]
        for row, (name, box) in zip(shown, boxes.rows, strict=True):
            row |= {"mean": box.mean, "label": f"{name} ({box.count:,})", "fliers": []}
        drawn = axes.bxp(
            shown, orientation="horizontal", showmeans=True, patch_artist=True, widths=0.6, showfliers=False,
            medianprops={"color": INK}, whiskerprops={"color": SOFT}, capprops={"color": SOFT},
            meanprops={"marker": "o", "markersize": 2.2, "markerfacecolor": INK, "markeredgecolor": INK},
        )  # fmt: skip
        for patch, (_, box) in zip(drawn["boxes"], boxes.rows, strict=True):
            patch.set(facecolor=COLOURS[shade(box.median)], edgecolor=EDGE)
        axes.axvline(0, color=SOFT, linewidth=0.4, zorder=0)
        axes.invert_yaxis()
        axes.set(xlabel=f"VIG of {boxes.unit}, nats")
        return figure


def _words(words: WordFigures) -> Any:
    rows = [*words.highest, *[word for word in words.lowest[::-1] if word not in words.highest]]
    with _axes(0.5 + 0.13 * len(rows)) as (figure, (axes,)):
        axes.barh(
            range(len(rows)), [word.vig for word in rows], color=[COLOURS[shade(word.vig)] for word in rows],
            edgecolor=EDGE, linewidth=0.4,
        )  # fmt: skip
        axes.set_yticks(range(len(rows)), [word.text.replace("$", r"\$") for word in rows])
        axes.invert_yaxis()
        axes.axvline(0, color=SOFT, linewidth=0.4)
        axes.set(xlabel="mean VIG of the word, nats")
        return figure


def _sweep(keep: KeepCurve) -> Any:
    """tau, and the shares of samples and tokens kept, against p."""
    with _axes(4.4, rows=3) as (figure, (top, middle, bottom)):
        top.plot(keep.p, keep.taus[-1], color=INK)
        top.axhline(0, color=SOFT, linewidth=0.4)
        top.set(ylabel="τ, nats")
        shown = [code for code in np.argsort(-keep.totals[:, 0]).tolist() if keep.totals[code, 0]][
            : len(LINES)
        ]
        for axes, counts, column, what in (
            (middle, keep.samples["all"], 0, "samples"),
            (bottom, keep.tokens["all"], 1, "tokens"),
        ):
            for (colour, dash), code in zip(LINES, shown, strict=False):
                share = 100 * counts[code] / keep.totals[code, column]
                axes.plot(
                    keep.p, share, color=colour, linestyle=dash, label=keep.sources[code].replace("$", r"\$")
                )
            axes.set(ylabel=f"{what} kept, %", ylim=(0, 100))
        bottom.set(xlabel="p, % of the samples with an image")
        if len(shown) > 1:
            middle.legend()
        for axes in (top, middle, bottom):
            axes.set_xlim(0, 100)
        return figure
