"""What a page shows, as plain values: boxes, histograms, words, samples. No files, no models, no markup."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

FEW = 5  # values; fewer have no quartiles to speak of: only their mean is drawn


@dataclass
class Box:
    """Quantiles of VIG at 5, 25, 50, 75 and 95 %, and its mean, nats."""

    low: float
    first: float
    median: float
    third: float
    high: float
    mean: float
    count: int

    @property
    def is_few(self) -> bool:
        return self.count < FEW


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
class Boxes:
    """One figure of box plots: what its rows are, what is counted, and a box a row."""

    heading: str
    remark: str
    unit: str  # "samples", "tokens" or "words"
    rows: list[tuple[str, Box]]


@dataclass
class Word:
    """A word of the answers: its text, mean VIG in nats (a word's is the sum over its tokens), and how often it stood
    there."""

    text: str
    vig: float
    count: int


@dataclass
class WordFigures:
    """Words of answers, from all rows or from a seeded sample of them. rows: how many were read."""

    highest: list[Word] = field(default_factory=list)
    lowest: list[Word] = field(default_factory=list)
    classes: list[tuple[str, Box]] = field(default_factory=list)
    parts_of_speech: list[tuple[str, Box]] = field(default_factory=list)
    rows: int = 0
    tagged_rows: int = 0
    sampled: bool = False


@dataclass(frozen=True)
class NullRow:
    """How the null image leaves one kind of word: means in nats, shares from 0 to 1 (`vig.reporting.null_check`)."""

    name: str
    words: int  # that the image makes likely
    nll_image: float
    nll_null: float
    chance: float
    likely: float  # share of them that the null leaves likely
    wrong: float  # share that the null makes far less likely than chance


@dataclass(frozen=True)
class NullCheck:
    """Whether the null image is blind, by the words that need sight. kinds: a row each; total: of all of them.

    remark: that the words are too few to tell, where they are.
    """

    total: NullRow
    kinds: list[NullRow]
    warnings: list[str]
    remark: str = ""


@dataclass
class KeepCurve:
    """What `vig select` keeps at each p, for one tau ("all") and for a tau a source ("source").

    taus: (S + 1, P) nats, of each source and last of all samples. samples, tokens: rule -> (S, P), multimodal samples
    and their tokens that are kept; totals: (S, 2) multimodal samples and their tokens.
    """

    p: np.ndarray  # (P,) per cent, ascending
    sources: list[str]
    taus: np.ndarray
    samples: dict[str, np.ndarray]
    tokens: dict[str, np.ndarray]
    totals: np.ndarray

    @property
    def shown(self) -> list[tuple[int, str]]:
        """(number, name) of the sources that have a sample with an image."""
        return [(code, name) for code, name in enumerate(self.sources) if self.totals[code, 0]]


@dataclass
class ErrorGroup:
    """Samples that could not be scored for one reason: how many, and keys and messages of the first few."""

    reason: str
    count: int
    examples: list[tuple[str, str]]


@dataclass
class Pass:
    """One scoring of a sample's answer. Lists run along the answer tokens; NLL in nats.

    nll_null is empty without an image. kept: which tokens are trained on, None without a selection. stats: what stands
    beside the likelihoods, nats, by label.
    """

    nll_image: list[float]
    nll_null: list[float]
    vig: float | None = None  # of the sample, nats
    kept: list[bool] | None = None
    stats: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class SampleView:
    """A sample ready to be drawn. tokens: the texts of its answer tokens, which joined are the answer.

    turns: (index of its first answer token, question) of the turns after the first. note: what is missing, and why.
    nulls stand beside images; None where there is none to be shown. passes: one scoring, or the two that are compared.
    """

    key: str
    id: str
    source: str = ""
    status: str = "ok"
    question: str = ""
    tokens: list[str] = field(default_factory=list)
    passes: list[Pass] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    nulls: list[list[Image.Image | None]] = field(default_factory=list)  # one list a pass
    cropped: list[int] = field(default_factory=list)  # numbers of the images that the model sees a part of
    turns: list[tuple[int, str]] = field(default_factory=list)
    note: str = ""
    row: int = 0  # in reading order
    picked: list[str] = field(default_factory=list)  # why it is on the page: names of strata
    move: float | None = None  # of two scorings: change of its percentile
    selected_vig: float | None = None  # what tau is compared with, where it is not the sample's VIG
    stop: list[int] = field(default_factory=list)  # places of end-of-turn tokens that go with their sample


@dataclass
class Page:
    """Everything on the report but its samples, which are encoded one by one."""

    title: str
    subtitle: str
    figures: list[tuple[str, str, str]]  # (label, value, remark)
    sample_histogram: Histogram | None = None
    token_histogram: Histogram | None = None
    boxes: list[Boxes] = field(default_factory=list)
    words: WordFigures = field(default_factory=WordFigures)
    null_check: NullCheck | None = None
    keep: KeepCurve | None = None
    tau: float | None = None
    measures: tuple[str, str] = (
        "",
        "",
    )  # how VIG of samples and tokens differs from the scores' in the histograms
    p: float = 70.0
    null_names: list[str] = field(default_factory=lambda: ["null image"])  # one a pass
    notes: list[str] = field(default_factory=list)
    errors: list[ErrorGroup] = field(default_factory=list)
    settings: list[tuple[str, str]] = field(default_factory=list)
    strata: list[tuple[str, str, str]] = field(default_factory=list)  # (name, label, remark)
    state: dict[str, Any] = field(default_factory=dict)  # for the page's script
    comparison: Any = None  # of two scorings: what the page is about
