"""What every measure begins with: two lists of the same length, and shares of what may be nothing."""

from __future__ import annotations


def check_pairs(left: int, right: int) -> None:
    if left != right or left == 0:
        raise ValueError(f"expected two lists of the same length, at least 1; got {left} and {right}")


def ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
