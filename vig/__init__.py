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
    from vig.reporting.report import report
    from vig.scoring.inspect import inspect
    from vig.scoring.run import score_dataset
    from vig.scoring.scorer import Scorer
    from vig.selection.export import export_records
    from vig.selection.select import select
    from vig.store.selections import read_selection
    from vig.training.collator import SelectiveCollator, keep_samples
    from vig.training.train import train
    from vig.training.trainer import FusedLossMixin, SelectiveTrainer

_HOMES = {
    "FusedLossMixin": "vig.training.trainer",
    "Sample": "vig.data.sample",
    "Scorer": "vig.scoring.scorer",
    "SelectiveCollator": "vig.training.collator",
    "SelectiveTrainer": "vig.training.trainer",
    "export_records": "vig.selection.export",
    "inspect": "vig.scoring.inspect",
    "keep_samples": "vig.training.collator",
    "read_samples": "vig.data.samples",
    "read_selection": "vig.store.selections",
    "report": "vig.reporting.report",
    "score_dataset": "vig.scoring.run",
    "select": "vig.selection.select",
    "train": "vig.training.train",
}

__all__ = [
    "FusedLossMixin",
    "Sample",
    "Scorer",
    "SelectiveCollator",
    "SelectiveTrainer",
    "export_records",
    "inspect",
    "keep_samples",
    "read_samples",
    "read_selection",
    "report",
    "score_dataset",
    "select",
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
