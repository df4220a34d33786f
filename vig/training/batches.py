"""Which samples a step of the lean loop takes, and the batches made of them; unreadable samples are left out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch.utils.data import Dataset

from vig.data.sample import SampleError
from vig.data.workers import prefetch
from vig.scoring.loader import process_died
from vig.training.collator import Record, SelectiveCollator, names_of
from vig.training.settings import TrainSettings


def plan_batches(n: int, settings: TrainSettings, world: int = 1, rank: int = 0) -> list[list[int]]:
    """Which of the n samples each micro-batch of this process holds, in order: a pure function of the seed.

    The samples run in a new random order each epoch, without a break between epochs; every step takes the same
    number. Steps are the same samples for any split of a step into accumulate x batch_size x world.
    """
    per_step = settings.batch_size * settings.accumulate * world
    steps = settings.max_steps or max(1, math.ceil(settings.epochs * n / per_step))
    order: list[int] = []
    epoch = 0
    while len(order) < steps * per_step:
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
        order += torch.randperm(n, generator=generator).tolist()
        epoch += 1
    mine = order[: steps * per_step][rank::world]
    return [mine[at : at + settings.batch_size] for at in range(0, len(mine), settings.batch_size)]


class MicroBatches(Dataset):
    """The micro-batches of a plan, without the samples that cannot be encoded, whose errors are a batch's ``left_out``.

    A sample that does not fit the selection is another matter: its SampleError is raised.
    """

    def __init__(self, samples: Sequence[Record], plan: Sequence[Sequence[int]], collator: SelectiveCollator):
        self.samples, self.plan, self.collator = samples, plan, collator

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self._collated(self._records(number))

    def made(self, workers: int) -> Iterator[dict[str, Any]]:
        """All of them in order, made by so many processes, or by this one."""
        if workers:
            return prefetch(self, workers, self._without_the_crashing)
        return (self[number] for number in range(len(self)))

    def _records(self, number: int) -> list[Record]:
        return [self.samples[place] for place in self.plan[number]]

    def _collated(self, records: Sequence[Record]) -> dict[str, Any]:
        batch, errors = self.collator.readable(records)
        return batch | {"left_out": errors}

    def _without_the_crashing(self, number: int) -> dict[str, Any]:
        """The micro-batch whose processes died, without the samples at which they do."""
        records = self._records(number)
        trials = _Trials(records, self.collator)
        errors = list(prefetch(trials, 1, trials.crashed))
        batch = self._collated(
            [record for record, error in zip(records, errors, strict=True) if error is None]
        )
        batch["left_out"] += [error for error in errors if error is not None]
        return batch


class _Trials(Dataset):
    """Encodes one sample at a time, to see which one its process does not survive: the error of that one, or None."""

    def __init__(self, records: Sequence[Record], collator: SelectiveCollator):
        self.records, self.collator = records, collator

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> None:
        with suppress(SampleError):  # met again where the batch is made
            self.collator.encode(self.records[number])

    def crashed(self, number: int) -> SampleError:
        return process_died(*names_of(self.records[number]))
