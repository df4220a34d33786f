"""From stored predictions to figures, and their comparison with a baseline's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import vig
from vig.data.files import StoreError
from vig.evaluation.figures import Tally, compare, estimate
from vig.evaluation.folder import Row, read_predictions
from vig.evaluation.questions import has_image
from vig.evaluation.settings import EvalSpec
from vig.evaluation.significance import mcnemar


def judged(rows: Sequence[Row], spec: EvalSpec) -> list[Row]:
    """The rows with what the rule reads of each answer; error rows as they are."""
    judge = spec.row.resolve("judge")
    data = spec.data_spec
    return [row if "error" in row else row | judge(row, spec.read_by, data) for row in rows]


def measure(rows: Sequence[Row], spec: EvalSpec, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What measures.json holds, for judged rows."""
    good = [row for row in rows if "error" not in row]
    tally = spec.row.resolve("tally")(good) if good else None
    figures = estimate(tally, resamples=spec.resamples, seed=spec.seed) if tally and tally.keys else []
    return {
        "task": spec.task,
        "by": spec.asked_by,
        "rule": spec.read_by,
        "figures": [figure._asdict() for figure in figures],
        "confidence": 0.95,
        "interval": "percentile bootstrap over images",
        "resamples": spec.resamples,
        "seed": spec.seed,
        "counts": _counts(rows, good, tally),
        "provenance": {**provenance, "library_version": vig.__version__},
    }


def _counts(rows: Sequence[Row], good: Sequence[Row], tally: Tally | None) -> dict[str, int]:
    """How many questions, images, questions without one, errors; answers that were cut, or cannot be read."""
    counts = {
        "questions": len(rows),
        "answered": len(good),
        "errors": len(rows) - len(good),
        "units": 0 if tally is None else len(tally.keys),
        "images": len({row["image"] for row in good if has_image(row)}),
        "text_only": len({row["image"] for row in good if not has_image(row)}),
        "cut": sum(bool(row.get("cut")) for row in good),
    }
    if any("abstained" in row for row in good):
        counts["abstained"] = sum(row["abstained"] for row in good)
        counts["abstained_read"] = sum(row["abstained"] and row["parsed"] is not None for row in good)
    return counts


class Baseline:
    """The predictions of another model on the same questions. Raises StoreError where they are of others."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.rows = {row["key"]: row for row in read_predictions(path)}

    def check(self, truths: Mapping[str, Mapping[str, Any]]) -> None:
        """truths: key -> what a row of this run will hold of its truth."""
        for key, truth in truths.items():
            other = self.rows.get(key)
            if other is None:
                raise self._differs(f"it has no answer to {key}")
            names = [] if "error" in other else [name for name in truth if other.get(name) != truth[name]]
            if names:
                values = "; ".join(
                    f"{name} {other.get(name)!r} there, {truth[name]!r} here" for name in names
                )
                raise self._differs(f"{key} differs: {values[:300]}")
        more = next((key for key in self.rows if key not in truths), None)
        if more is not None:
            raise self._differs(f"it answers {more}, which is not among the questions")

    def _differs(self, what: str) -> StoreError:
        cure = "Compare predictions on the same data, with the same --task and --limit"
        return StoreError(f"{self.path} is no baseline for this: {what}. {cure}")

    def comparison(self, rows: Sequence[Row], spec: EvalSpec) -> dict[str, Any]:
        """Every figure beside the baseline's, read by the same rule, on the questions that both answered."""
        both = [row for row in rows if "error" not in row and "error" not in self.rows[row["key"]]]
        if not both:
            raise StoreError(
                f"{self.path}: no question was answered by both. Run both again with --retry failed"
            )
        make = spec.row.resolve("tally")
        ours, theirs = make(both), make(judged([self.rows[row["key"]] for row in both], spec))
        changes = compare(ours, theirs, resamples=spec.resamples, seed=spec.seed)
        about = {
            "baseline": str(self.path.absolute()),
            "questions": len(both),
            "images": len(set(ours.images)),
        }
        test = None
        if ours.right is not None:
            b, c = int((ours.right & ~theirs.right).sum()), int((~ours.right & theirs.right).sum())
            test = {"p_value": mcnemar(ours.right, theirs.right), "only_here": b, "only_baseline": c}
        return about | {"changes": [change._asdict() for change in changes], "mcnemar": test}
