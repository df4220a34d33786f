"""The page of a comparison: what differs, how far two scorings agree, and what moved most, with its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vig.data.files import explain_write_errors, write_atomically
from vig.data.sample import writable
from vig.reporting.page import render
from vig.reporting.report import MEGABYTE, check_budget, null_caption, subtitle, with_pictures
from vig.reporting.scale import rounded
from vig.reporting.viewer import Viewer
from vig.reporting.views import Page, Pass, SampleView
from vig.selection.compare import Comparison, Moved
from vig.store.scores import open_scores, read_scores, score_metadata

PASSES = ("A", "B")


def comparison_page(
    comparison: Comparison,
    a,  # the scores that were compared
    b,
    out: str | Path,
    *,
    data: str | Path | None = None,
    image_root: str | Path | None = None,
    title: str | None = None,
    budget: float = 15.0,
) -> Path:
    """Write a comparison as one self-contained HTML file, as `report` does, and return its path.

    data, image_root: default to those that the scores name. Raises StoreError where ``out`` cannot be written.
    """
    check_budget(budget)
    out, scores = Path(out), [open_scores(one) for one in (a, b)]
    about = [score_metadata(one) for one in scores]
    moved = [*comparison.rose, *comparison.fell]
    viewers = [_viewer(one, moved, side, data, image_root) for side, one in enumerate(about)]
    rows = [_rows(one, moved) for one in scores]
    views = [
        _view(
            row,
            viewers,
            [found[row.key] for found in rows],
            "rose" if place < len(comparison.rose) else "fell",
        )
        for place, row in enumerate(moved)
    ]
    sources = sorted({row.source for row in moved})
    encoded, pictures = with_pictures(views, _Both(viewers), sources, int(budget * MEGABYTE))
    notes = dict.fromkeys(note for viewer in viewers for note in viewer.notes)
    page = Page(
        title=title or Path(str(about[0].get("data") or "Two scorings")).name,
        subtitle="\n".join(f"{name}: {subtitle(one)}" for name, one in zip(PASSES, about, strict=True)),
        figures=_figures(comparison),
        null_names=[null_caption(one) for one in about],
        notes=[
            *(
                ["The two scorings are identical: every token has the same VIG."]
                if comparison.identical
                else []
            ),
            *notes,
        ],
        settings=[(name, str(value)) for name, value in zip(PASSES, comparison.names, strict=True)],
        strata=[("rose", "rose", ""), ("fell", "fell", "")],
        comparison=comparison,
    )
    page.state = {
        "passes": PASSES, "sources": sources, "order": "rose", "selected": False, "level": "both",
        "file": "comparison", "data": str(about[0].get("data") or ""), "scores": " ".join(comparison.names),
        "fingerprint": about[0].get("data_fingerprint"),
        "embedded": len(views),
    }  # fmt: skip
    with explain_write_errors(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, writable(render(page, encoded, pictures.images, "compare.html.j2")).encode())
    return out


class _Both:
    """Two viewers as one: images as A's processor makes them, and the nulls of both."""

    def __init__(self, viewers: list[Viewer]):
        self.viewers = viewers

    def n_images(self, key: str) -> int:
        return 2 * self.viewers[0].n_images(key)

    def add_pictures(self, view: SampleView) -> None:
        other = SampleView(view.key, view.id)
        self.viewers[0].add_pictures(view)
        self.viewers[1].add_pictures(other)
        view.nulls = [*view.nulls, *other.nulls]
        view.note = "; ".join(dict.fromkeys(note for note in (view.note, other.note) if note))


def _viewer(about: dict, moved: list[Moved], side: int, data: Any, image_root: Any) -> Viewer:
    viewer = Viewer(about, data=data or about.get("data"), image_root=image_root)
    viewer.find({row.key: row.row_b if side else row.row_a for row in moved})
    return viewer


def _rows(scores: Any, moved: list[Moved]) -> dict[str, dict]:
    """By key: since the comparison rows may have come between."""
    keys = pa.array({row.key for row in moved}, pa.string())
    batches = (batch.filter(pc.is_in(batch["key"], keys)) for batch in read_scores(scores))
    return {row["key"]: row for batch in batches for row in batch.to_pylist()}


def _view(moved: Moved, viewers: list[Viewer], rows: list[dict], way: str) -> SampleView:
    """The sample with both scorings of its answer; without B's tokens where they are others than A's."""
    view = viewers[0].view(rows[0])
    same = rows[0]["token_ids"] == rows[1]["token_ids"]
    other = rows[1] if same else {"vig": rows[1]["vig"], "token_nll_image": [], "token_nll_null": []}
    view.passes.append(Pass(other["token_nll_image"], other["token_nll_null"], other["vig"]))
    view.row, view.picked = moved.row_a, [way]
    view.move = moved.percentile_b - moved.percentile_a
    return view


def _figures(c: Comparison) -> list[tuple[str, str, str]]:
    correlation = "none" if c.rank_correlation is None else f"{c.rank_correlation:.3f}"
    figures = [
        ("samples", f"{c.samples:,}", f"with VIG in both; {c.only_a:,} in A alone, {c.only_b:,} in B"),
        ("rank correlation", correlation, "Spearman, sample VIG"),
        (
            "kept by both",
            f"{100 * c.sample_overlap[c.p]:.1f} %",
            f"of the samples kept by either at p = {c.p:g}",
        ),
    ]
    if c.token_overlap is not None:
        figures.append(("tokens kept by both", f"{100 * c.token_overlap:.1f} %", c.settings))
    figures += [
        (f"mean VIG, {name}", rounded(value), f"nats; τ = {rounded(tau)}")
        for name, value, tau in zip(PASSES, c.mean_vig, c.taus, strict=True)
    ]
    return figures
