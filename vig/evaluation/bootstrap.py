"""The bootstrap over images of every figure of this package: how often each image is drawn, and percentile intervals.

An image is drawn with all its questions, since questions about one image are not independent. Source: Efron and
Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 8 and 13.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

RESAMPLES = 2000
DRAWN_AT_ONCE = 4_000_000  # weights
LEVELS = (2.5, 97.5)


def draws(images: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each image is drawn, (R, images) float64, w ~ Multinomial(images, 1 / images), some at a time.

    None for fewer than two images, which leave nothing to draw.
    """
    if images < 2:
        return
    rng = np.random.default_rng(seed)
    step = max(1, DRAWN_AT_ONCE // images)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        yield rng.multinomial(images, np.full(images, 1 / images), size=size).astype(np.float64)


def defined(drawn: Sequence[np.ndarray]) -> np.ndarray:
    """The values of all draws in which the figure is defined."""
    values = np.concatenate(drawn) if drawn else np.empty(0)
    return values[np.isfinite(values)]


def interval(drawn: Sequence[np.ndarray]) -> tuple[float | None, float | None]:
    """The middle 95 % of what was drawn; (None, None) where nothing was."""
    values = defined(drawn)
    if not len(values):
        return None, None
    low, high = np.percentile(values, LEVELS)
    return float(low), float(high)
