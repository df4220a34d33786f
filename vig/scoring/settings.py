"""What a scoring run is asked for, as two values: how a model scores, and which records of which data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vig.data.reading import Source
from vig.data.sample import BrokenRecord, DataError, Sample
from vig.data.samples import read_samples
from vig.models.end_of_turn import check_end_of_turn
from vig.models.loading import check_dtype, device_named
from vig.models.null_image import BLUR_SIGMA, NullSettings
from vig.scoring import batching
from vig.store.token_stats import check_stats
from vig_kernels.dispatch import named


@dataclass(frozen=True)
class ScoreSettings:
    """How a model scores. The fields are the options of `Scorer`, which says what each means.

    Raises ValueError for a value that means nothing on any machine and to any model, before one is loaded.
    """

    null: str = "blur"
    sigma: float = BLUR_SIGMA
    dtype: str = "auto"
    device: str | torch.device | None = None
    batch_tokens: int = batching.BATCH_TOKENS
    batch_size: int | None = None
    backend: str = "auto"
    end_of_turn: str | None = None  # as a folder recorded that is resumed, else "add"
    max_length: int | None = None
    workers: int | None = 0
    revision: str | None = None
    attn: str | None = None
    share: bool = True
    trust_remote_code: bool = False
    stats: tuple[str, ...] = ()
    tensor_parallel_size: int = 1

    def __post_init__(self):
        NullSettings(self.null, self.sigma)
        check_dtype(self.dtype)
        if self.device is not None:
            device_named(self.device)
        named(self.backend)
        object.__setattr__(self, "stats", check_stats(self.stats))
        if self.end_of_turn is not None:
            check_end_of_turn(self.end_of_turn)
        if self.batch_tokens < 1 or (self.batch_size is not None and self.batch_size < 1):
            given = f"batch_tokens = {self.batch_tokens}, batch_size = {self.batch_size}"
            raise ValueError(f"{given}, expected at least 1")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length = {self.max_length}, expected at least 2 tokens")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers = {self.workers}, expected at least 0 processes")
        if self.tensor_parallel_size < 1:
            raise ValueError(f"tensor_parallel_size = {self.tensor_parallel_size}, expected at least 1 rank")
        if self.tensor_parallel_size > 1 and self.device is not None:
            raise ValueError(
                f"device = {str(self.device)!r}, but each rank takes the GPU of its local rank. Leave it out"
            )

    @property
    def null_settings(self) -> NullSettings:
        return NullSettings(self.null, self.sigma)


@dataclass(frozen=True)
class RunSpec:
    """Which records of which data a run scores, and how they are cut into windows.

    shard: (i, n), job i of n: only windows whose number is i modulo n. retry_failed: score the error rows of finished
    windows again. Raises ValueError for a part of the data that would be nothing, or cannot be cut into windows.
    """

    data: str | Path | Source
    image_root: str | Path | None = None
    limit: int | None = None  # read only the first so many records
    shard: tuple[int, int] | None = None
    window: int = batching.WINDOW  # records
    retry_failed: bool = False

    def __post_init__(self):
        if self.window < 1:
            raise ValueError(f"window = {self.window}, expected at least 1 record")
        if self.limit is not None and self.limit < 0:
            raise ValueError(f"limit = {self.limit}, expected at least 0 records")
        if self.shard is not None and not 0 <= self.shard[0] < self.shard[1]:
            raise ValueError(f"shard = {self.shard}, expected (i, n) with 0 <= i < n, such as (0, 8)")

    def check_data(self) -> None:
        """Raises DataError for data that cannot be read, or holds nothing."""
        first = read_samples(self.data, image_root=self.image_root, limit=1, wanted=lambda record: False)
        if not list(first):
            raise DataError(f"{self.data} holds no records")

    def records(self, wanted: Callable[[int], bool] | None = None) -> Iterator[Sample | BrokenRecord | None]:
        """All records up to the limit, of every job; None for those whose number is not `wanted`."""
        return read_samples(self.data, image_root=self.image_root, limit=self.limit, wanted=wanted)

    def count(self) -> int:
        """Records up to the limit, of every job, by reading past them."""
        return sum(1 for _ in self.records(lambda record: False))

    def takes(self, window: int) -> bool:
        """Whether window number `window` is this job's."""
        return batching.in_shard(window, self.shard)

    def windows(
        self, wanted: Callable[[int], bool] | None = None
    ) -> Iterator[tuple[int, list[Sample | BrokenRecord | None]]]:
        """(number, records) of this job's windows; the records of those that are not `wanted` are None."""

        def is_read(record: int) -> bool:
            window = record // self.window
            return self.takes(window) and (wanted is None or wanted(window))

        chunks = batching.chunks(self.records(is_read), self.window)
        return ((number, chunk) for number, chunk in enumerate(chunks) if self.takes(number))

    def part_of(self, total: int | None) -> int | None:
        """How many of `total` records are this job's."""
        if total is None or self.shard is None:
            return total
        index, count = self.shard
        windows, rest = divmod(total, self.window)
        mine = len(range(index, windows, count)) * self.window
        return mine + (rest if self.takes(windows) else 0)

    def about_no_window(self) -> str:
        """One line for a job that is left without a window."""
        records = self.count()
        windows = -(-records // self.window)
        index, count = self.shard or (0, 1)
        return (
            f"no window of the data is this job's ({index}/{count}): {records:,} records make {windows:,} "
            f"window{'' if windows == 1 else 's'} of {self.window:,}. Start fewer jobs, or give a smaller --window "
            "and another folder"
        )

    def part(self) -> dict[str, Any]:
        """What the metadata of the scores tell of the part that was scored."""
        shard = None if self.shard is None else f"{self.shard[0]}/{self.shard[1]}"
        return {"window": self.window, "limit": self.limit, "shard": shard}
