"""Visual Information Gain: score, select, train, look. Source: arXiv 2602.17186 (ICML 2026).

    from vig import Scorer, read_samples, select
    rows = Scorer("llava-hf/llava-1.5-7b-hf").score(read_samples("data.json"))

Names are loaded when they are first used, so that `import vig` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vig.engine import score_dataset
    from vig.inspect import inspect
    from vig.report import report
    from vig.samples import Sample, read_samples
    from vig.score import Scorer
    from vig.select import select
    from vig.train import train
    from vig.trainer import FusedLossMixin, SelectiveCollator, SelectiveTrainer

_HOMES = {
    "FusedLossMixin": "vig.trainer",
    "Sample": "vig.samples",
    "Scorer": "vig.score",
    "SelectiveCollator": "vig.trainer",
    "SelectiveTrainer": "vig.trainer",
    "inspect": "vig.inspect",
    "read_samples": "vig.samples",
    "report": "vig.report",
    "score_dataset": "vig.engine",
    "select": "vig.select",
    "train": "vig.train",
}

__all__ = [
    "FusedLossMixin",
    "Sample",
    "Scorer",
    "SelectiveCollator",
    "SelectiveTrainer",
    "inspect",
    "read_samples",
    "report",
    "score_dataset",
    "select",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vig' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
