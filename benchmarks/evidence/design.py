"""What is run: arms, shares of blind answers, seeds and their order. Fixed before the first run.

A seed changes everything that is drawn: the data, the order of training, and the random choices of an arm. The exams
are the same for all. No seed here was used by the demo or by the exploratory pilot.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from vig.demo.arms import CHECKPOINT

SHARES = (
    0.0,
    0.25,
    0.5,
    0.75,
)  # of colours and captions of the tuning data, answered from habit, without looking
SEEDS, VARIANT_SEEDS, RATE_SEEDS, HABIT_SEEDS = range(1100, 1110), 5, range(2000, 2003), range(3000, 3005)
VARIANT_SHARES, RATE_SHARES, HABIT_SHARES = (0.5, 0.75), (0.0, 0.75), (0.5, 0.75)
RATES = (0.5, 1.0, 2.0)  # times the learning rate of every other run

ARMS = {
    "all": "all tokens",
    "vig": "VIG, p = 70",
    "easy": "VIG and easy tokens",
    "random": "random, same count",
    "loss filter": "loss filter, same samples",
    "permuted": "VIG permuted in each sample",
    "oracle": "oracle: no blind answer",
}
VARIANTS = {
    "words": "content words by a list",
    "sample": "VIG, samples only",
    "token": "VIG, tokens only",
    "mean": "VIG, mean colour as null",
}
UNTUNED = "untuned"
NAMES = {UNTUNED: "base, untuned", **ARMS, **VARIANTS}

# Of every run: samples drawn, the selection's p, and training as in the demo.
SAMPLES, P, EASY_NATS = 1200, 70.0, 0.5
TRAINING = {"max_steps": 100, "batch_size": 32, "lr": 4e-4, "warmup": 0.1, "schedule": "linear"}
EXAMS = {
    "test": (5001, 1000),
    "validation": (5002, 600),
    "prior": (5003, 400),
    "captions": (5004, 200),
}  # seed, size

BASES = {"shipped": CHECKPOINT, "habit": Path(__file__).with_name("habit_base")}


class Run(NamedTuple):
    """One training and its exams."""

    base: str  # of BASES: which model is scored with and tuned
    share: float
    seed: int
    arm: str
    rate: float = 1.0  # times the learning rate

    @property
    def is_rate_check(self) -> bool:
        return self.seed in RATE_SEEDS

    def __str__(self) -> str:
        rate = f"/x{self.rate:g}" if self.is_rate_check else ""
        return f"{self.base}/{self.share:g}/{self.seed}/{self.arm}{rate}"

    @classmethod
    def of(cls, line: dict) -> Run:
        """The run that a stored line is of."""
        return cls(*(line[name] for name in cls._fields))


Group = tuple[Run, ...]  # runs on the same data, one behind the other


def plan(seeds: int = len(SEEDS)) -> list[Group]:
    """All runs, grouped by their data, in order: a stop leaves as many seeds of each share and arm as can be.

    seeds: of the core arms; the other parts have no more than that either. Fewer seeds, never fewer arms.
    """
    if not 1 <= seeds <= len(SEEDS):
        raise ValueError(f"seeds = {seeds}, expected 1 to {len(SEEDS)}")
    parts = (_untuned(), _core(seeds), _habit(seeds), _variants(seeds), _rates(seeds))
    return [group for part in parts for group in part]


def runs(groups: Iterable[Group]) -> list[Run]:
    return [run for group in groups for run in group]


def find(text: str) -> Run:
    """The run of a name, as `Run` writes it."""
    known = {str(run): run for run in runs(plan())}
    if text not in known:
        raise ValueError(f"no run is called {text!r}; one is {str(_core_arms(0.75, SEEDS[0])[1])!r}")
    return known[text]


def _untuned() -> Iterator[Group]:
    for base in BASES:
        yield (Run(base, 0.0, 0, UNTUNED),)


def _core(seeds: int) -> Iterator[Group]:
    for seed in SEEDS[:seeds]:
        for share in SHARES:
            yield _core_arms(share, seed)


def _core_arms(share: float, seed: int) -> Group:
    """Without blind answers the oracle trains on all tokens: it is the arm `all`."""
    return _arms("shipped", share, seed, [arm for arm in ARMS if share or arm != "oracle"])


def _habit(seeds: int) -> Iterator[Group]:
    for seed in HABIT_SEEDS[:seeds]:
        for share in HABIT_SHARES:
            yield _arms("habit", share, seed, ("all", "vig", "loss filter"))


def _variants(seeds: int) -> Iterator[Group]:
    for seed in SEEDS[: min(seeds, VARIANT_SEEDS)]:
        for share in VARIANT_SHARES:
            yield _arms("shipped", share, seed, tuple(VARIANTS))


def _rates(seeds: int) -> Iterator[Group]:
    for seed in RATE_SEEDS[:seeds]:
        for share in RATE_SHARES:
            yield tuple(Run("shipped", share, seed, arm, rate) for rate in RATES for arm in ("all", "vig"))


def _arms(base: str, share: float, seed: int, arms: Sequence[str]) -> Group:
    return tuple(Run(base, share, seed, arm) for arm in arms)
