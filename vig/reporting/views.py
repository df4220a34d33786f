"""What the page shows, as plain values: one sample, one histogram, one token of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from PIL import Image


@dataclass
class SampleView:
    """A sample ready to be drawn. All lists run along the answer tokens; VIG and NLL are in nats.

    vig and nll_null are empty for a text-only sample. kept is None without a selection. turns: (index of its
    first answer token, question) of the turns after the first. note: what is missing, and why.
    """

    key: str
    id: str
    question: str
    tokens: list[str]
    vig: list[float]
    nll_image: list[float]
    nll_null: list[float]
    image: Image.Image | None = None
    null_image: Image.Image | None = None
    kept: list[bool] | None = None
    turns: list[tuple[int, str]] = field(default_factory=list)
    note: str = ""

    @property
    def sample_vig(self) -> float | None:
        return float(np.mean(self.vig)) if len(self.vig) else None


@dataclass
class Histogram:
    """counts (n,) over bins of equal width from low to high, nats; values beyond stand in the end bins."""

    low: float
    high: float
    counts: np.ndarray

    @property
    def width(self) -> float:
        return (self.high - self.low) / len(self.counts)


@dataclass
class Word:
    """A token of the vocabulary: its text, mean VIG in nats, and how often it stood in answers."""

    text: str
    vig: float
    count: int


@dataclass
class Page:
    """Everything on the page."""

    title: str
    subtitle: str
    figures: list[tuple[str, str, str]]  # (label, value, remark)
    groups: list[tuple[str, str, list[SampleView]]]  # (heading, remark, samples)
    sample_histogram: Histogram | None = None
    token_histogram: Histogram | None = None
    highest: list[Word] = field(default_factory=list)
    lowest: list[Word] = field(default_factory=list)
    tau: float | None = None
    null_name: str = "null image"
    notes: list[str] = field(default_factory=list)
    settings: list[tuple[str, str]] = field(default_factory=list)
