"""How much memory the images of kept samples take where the data carry their bytes."""

from __future__ import annotations

import warnings
from typing import Any

from vig.models.launch import Launch

MUCH = 1 << 30  # bytes


class HeldImages:
    """Counts the bytes of images as samples are kept, and warns once, before all of them are read.

    Parquet, Arrow, tar files and data URIs carry them. To read one of them again when it is needed would take its row
    group of a Parquet file, or the file up to it.
    """

    def __init__(self):
        self.samples = self.bytes = 0
        self._told = False

    def add(self, record: Any) -> None:
        self.samples += 1
        self.bytes += sum(len(image) for image in getattr(record, "images", ()) if isinstance(image, bytes))
        if self.bytes <= MUCH or self._told:
            return
        self._told = True
        if Launch.here().rank == 0:  # the others hold as much
            warnings.warn(
                f"the images of the first {self.samples:,} kept samples take {self.bytes / 2**30:.1f} GiB of memory in "
                "each process, and those of all will be held, since the data carry their bytes. Write them to files, "
                "which are read when they are needed: docs/train.md, What it takes in memory",
                stacklevel=3,
            )
