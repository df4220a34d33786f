"""Which samples a step of the lean loop takes, and the batches made of them; unreadable samples are left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from vig.samples import SampleError
from vig.train_settings import TrainSettings
from vig.trainer import Record, SelectiveCollator


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


class ReadableCollator:
    """A `SelectiveCollator` without the samples that cannot be encoded, whose errors are the batch's ``left_out``.

    A sample that does not fit the selection is another matter: its SampleError is returned, not raised, since torch
    would make it anew from one string where it comes out of a worker.
    """

    def __init__(self, collator: SelectiveCollator):
        self.collator = collator

    def __call__(self, records: Sequence[Record]) -> dict[str, Any] | SampleError:
        try:
            batch, errors = self.collator.readable(records)
        except SampleError as error:
            return error
        return batch | {"left_out": errors}
