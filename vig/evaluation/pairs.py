"""What every measure begins with: two lists of the same length, and shares of what may be nothing."""

from __future__ import annotations

from typing import Any

import numpy as np


def check_pairs(left: int, right: int) -> None:
    if left != right or left == 0:
        raise ValueError(f"expected two lists of the same length, at least 1; got {left} and {right}")


def ratio(part: Any, whole: Any) -> Any:
    """part / whole, of numbers or of arrays; 0 where nothing stands below the line."""
    if isinstance(whole, np.ndarray):
        return np.divide(part, whole, out=np.zeros(np.shape(whole)), where=whole != 0)
    return part / whole if whole else 0.0
