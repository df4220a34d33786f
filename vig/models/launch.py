"""Where this process stands among those that torchrun started, and which of them hold a model together.

torchrun starts WORLD_SIZE ranks. Each `tensor_parallel_size` of them, neighbours in number, are a group that holds one
model (`vig.models.ranks`). The groups share nothing: each scores windows of its own, like a job of an array.

    rank      0   1   2   3   4   5   6   7        WORLD_SIZE = 8, tensor_parallel_size = 4
    group     0   0   0   0   1   1   1   1        two models, so the parts 0/2 and 1/2 of the data
    first     *               *                    read the data, write the scores

It imports no torch before there is something to wait for.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any, NamedTuple

PATIENCE = timedelta(
    hours=2
)  # of a rank that waits for another, which may be reading; torchrun ends it much sooner
LOOK_EVERY = 0.1  # seconds between two looks at whether all ranks have come to their end
GIVEN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # by torchrun, in the environment


class Launch(NamedTuple):
    """One process among those of torchrun; one that torchrun did not start stands alone."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0  # on its machine: the number of its GPU
    size: int = 1  # ranks of a group

    @classmethod
    def here(cls, size: int = 1) -> Launch:
        """This process. Raises ValueError where its ranks do not make whole groups of `size`."""
        found = [os.environ.get(name, "") for name in GIVEN]
        launch = cls(size=size)
        if all(value.isdigit() for value in found):
            launch = cls(*map(int, found), size)
        if size > 1 and launch.world == 1:
            raise ValueError(
                f"tensor_parallel_size = {size}, but this process stands alone. Start {size} of them: "
                f"torchrun --nproc-per-node {size} -m vig ..."
            )
        if launch.world % size:
            raise ValueError(
                f"tensor_parallel_size = {size}, but torchrun started {launch.world} processes, which make no whole "
                f"groups of {size}. Start a multiple of {size} (--nproc-per-node), or give another size"
            )
        return launch

    @property
    def groups(self) -> int:
        return self.world // self.size

    @property
    def group(self) -> int:
        return self.rank // self.size

    @property
    def is_first(self) -> bool:
        """Of its group: it reads and writes."""
        return self.rank % self.size == 0

    def shard(self, asked: tuple[int, int] | None) -> tuple[int, int] | None:
        """(i, n) of this group: the part asked for, cut once more where there are several groups."""
        if self.groups == 1:
            return asked
        index, count = asked or (0, 1)
        return index * self.groups + self.group, count * self.groups

    def device(self) -> str | None:
        """The accelerator of this process where it holds a model alone; None without one."""
        import torch

        here = torch.accelerator.current_accelerator(check_available=True)
        return None if here is None else f"{here.type}:{self.local_rank}"

    def store(self) -> Any:
        """The key-value store that all ranks share."""
        import torch.distributed as dist

        return next(iter(dist.rendezvous("env://", timeout=PATIENCE)))[0]

    def end(self) -> None:
        """Waits for all ranks of all groups: where one ends with an error code, torchrun stops the others."""
        if self.world == 1:
            return
        store = self.store()
        store.add("vig-ended", 1)
        _wait_for(store, "vig-ended", self.world)
        if self.rank:
            store.add("vig-left", 1)
        else:  # which may hold the store: it leaves last
            _wait_for(store, "vig-left", self.world - 1)


def _wait_for(store: Any, name: str, count: int) -> None:
    while store.add(name, 0) < count:
        time.sleep(LOOK_EVERY)
