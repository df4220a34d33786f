"""One run: data, masks, training, exams -> one line of figures, a function of the run alone but for its seconds."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator
from functools import cached_property

import torch

from benchmarks.evidence import design
from benchmarks.evidence.data import NULLS, Drawn, Tuning
from benchmarks.evidence.design import Run
from benchmarks.evidence.exams import Exams
from benchmarks.evidence.fit import fit
from benchmarks.evidence.masks import counts, masks_of
from benchmarks.evidence.model import load
from vig.training.settings import TrainSettings

SECONDS = "seconds"  # the one field of a line that another try does not repeat
ASKED = ("test", "prior", "captions", "text")


class MissingBase(RuntimeError):
    """A base model is not there."""


class Laboratory:
    """Runs on one base model, in one thread. Data are kept as long as the next run is of the same."""

    def __init__(self, base: str):
        from transformers import AutoProcessor

        path = design.BASES[base]
        if not (path / "config.json").is_file():
            raise MissingBase(f"{path} holds no checkpoint: its runs are left out")
        torch.set_num_threads(1)
        self.model = load(path)
        self.drawn = Drawn(path, self.model, AutoProcessor.from_pretrained(path))
        self._data: tuple[tuple, Tuning] | None = None

    @cached_property
    def exams(self) -> Exams:
        return Exams(self.drawn)

    def lines(self, group: Iterable[Run]) -> Iterator[dict]:
        for run in group:
            yield self.line(run)

    def line(self, run: Run) -> dict:
        """The run's line, of JSON's own types."""
        clock = Clock()
        model, trained = self._tuned(run, clock)
        line = run._asdict() | trained
        line |= self.exams.sit(model, ("validation",) if run.is_rate_check else ASKED)
        clock.lap("exams")
        return line | {SECONDS: clock.laps}

    def tuned(self, run: Run):
        """A copy of the base as the run leaves it, in evaluation mode."""
        return self._tuned(run, Clock())[0]

    def _tuned(self, run: Run, clock: Clock) -> tuple:
        """The tuned model, and what of it goes into the run's line: nothing of the base before tuning."""
        model = copy.deepcopy(self.model)
        if run.arm == design.UNTUNED:
            return model, {}
        tuning = self._tuning(run)
        clock.lap("data")
        masks = masks_of(run.arm, tuning, run.seed)
        kept = counts(tuning, masks)
        clock.lap("masks")
        settings = TrainSettings(seed=run.seed, **design.TRAINING | {"lr": run.rate * design.TRAINING["lr"]})
        fitted = fit(model, tuning.items, masks, settings)._asdict()
        clock.lap("training")
        return model, kept | {f"trained_{name}": value for name, value in fitted.items()}

    def _tuning(self, run: Run) -> Tuning:
        nulls = NULLS if run.arm in design.VARIANTS else NULLS[:1]
        key = (run.share, run.seed, nulls)
        if self._data is None or self._data[0] != key:
            self._data = key, self.drawn.tuning(run.share, run.seed, nulls)
        return self._data[1]


class Clock:
    """Processor seconds of this process between laps."""

    def __init__(self):
        self.laps: dict[str, float] = {}
        self.last = time.process_time()

    def lap(self, name: str) -> None:
        now = time.process_time()
        self.laps[name] = round(now - self.last, 2)
        self.last = now


def repeated(line: dict) -> dict:
    """What another try of a run repeats."""
    return {name: value for name, value in line.items() if name != SECONDS}
