"""Which samples a step of the lean loop takes, and the batches made of them; unreadable samples are left out."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from vig.loss import IGNORE
from vig.samples import Sample, SampleError
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

    A micro-batch of nothing else holds a stand-in without a label, so that every process of DDP runs its forward and
    backward. A sample that does not fit the selection is another matter: its SampleError is returned, not raised,
    since torch would make it anew from one string where it comes out of a worker.
    """

    def __init__(self, collator: SelectiveCollator):
        self.collator = collator

    def __call__(self, records: Sequence[Record]) -> dict[str, Any] | SampleError:
        items, left_out = [], []
        for record in records:
            try:
                items.append(self.collator.encode(record))
            except SampleError as error:
                left_out.append(error)
        try:
            batch = self.collator(items) if items else self._stand_in()
        except SampleError as error:
            return error
        return batch | {"left_out": left_out}

    def _stand_in(self) -> dict[str, Any]:
        encoder = copy.copy(self.collator.encoder)
        encoder.max_length = None
        images = (Image.new("RGB", (64, 64)),) if encoder.image_token else ()
        asked = [{"type": "image"}] * len(images) + [{"type": "text", "text": "?"}]
        turns = (
            {"role": "user", "content": asked},
            {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
        )
        batch = encoder.collate([encoder.encode(Sample("stand-in", "stand-in", images, turns, ""))])
        batch["labels"].fill_(IGNORE)
        return batch | {"num_kept": 0, "num_truncated": 0}
