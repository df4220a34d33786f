"""Visual Information Gain: score, select, train, look. Source: arXiv 2602.17186 (ICML 2026).

    from vig import Scorer, read_samples, select
    rows = Scorer("llava-hf/llava-1.5-7b-hf").score(read_samples("data.json"))

Names are loaded when they are first used, so that `import vig` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vig.data.sample import Sample
    from vig.data.samples import read_samples
    from vig.reporting.plots import plot
    from vig.reporting.report import report
    from vig.scoring.inspect import inspect
    from vig.scoring.run import score_dataset
    from vig.scoring.scorer import Scorer
    from vig.selection.compare import compare
    from vig.selection.export import export_records
    from vig.selection.select import select
    from vig.store.selections import read_selection
    from vig.training.collator import SelectiveCollator, keep_samples
    from vig.training.labels import SelectiveLabels, kept_rows, mask_labels, mask_row
    from vig.training.loss import selective_loss
    from vig.training.train import train
    from vig.training.trainer import FusedLossMixin, SelectiveTrainer

_HOMES = {
    "FusedLossMixin": "vig.training.trainer",
    "Sample": "vig.data.sample",
    "Scorer": "vig.scoring.scorer",
    "SelectiveCollator": "vig.training.collator",
    "SelectiveLabels": "vig.training.labels",
    "SelectiveTrainer": "vig.training.trainer",
    "compare": "vig.selection.compare",
    "export_records": "vig.selection.export",
    "inspect": "vig.scoring.inspect",
    "keep_samples": "vig.training.collator",
    "kept_rows": "vig.training.labels",
    "mask_labels": "vig.training.labels",
    "mask_row": "vig.training.labels",
    "plot": "vig.reporting.plots",
    "read_samples": "vig.data.samples",
    "read_selection": "vig.store.selections",
    "report": "vig.reporting.report",
    "score_dataset": "vig.scoring.run",
    "select": "vig.selection.select",
    "selective_loss": "vig.training.loss",
    "train": "vig.training.train",
}

__all__ = [
    "FusedLossMixin",
    "Sample",
    "Scorer",
    "SelectiveCollator",
    "SelectiveLabels",
    "SelectiveTrainer",
    "compare",
    "export_records",
    "inspect",
    "keep_samples",
    "kept_rows",
    "mask_labels",
    "mask_row",
    "plot",
    "read_samples",
    "read_selection",
    "report",
    "score_dataset",
    "select",
    "selective_loss",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("vig_kernels").__version__
    if name not in _HOMES:
        raise AttributeError(f"module 'vig' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
