"""The processes that hold one tensor-parallel model together: the ranks of a group of `vig.models.launch`.

The model is sharded by transformers' own plan, and every call of it is a call of all its ranks, with the same inputs in
the same order. So the first rank reads, decides and writes, and tells the others what they have to know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from vig.models.families import ModelError
from vig.models.launch import PATIENCE, Launch

T = TypeVar("T")


class RankError(RuntimeError):
    """The first rank of the group has ended before its end."""


def join(size: int) -> None:
    """Makes a group of `size` ranks the process group of this process, on the GPU of its local rank.

    One that is there already is kept. Raises ModelError where it has another size, ValueError as `Launch.here` does.
    """
    if not dist.is_initialized():
        launch = Launch.here(size)
        here = torch.accelerator.current_accelerator(check_available=True)
        device = "cpu" if here is None else here.type
        if here is not None:
            _bind(device, launch.local_rank)
        store = dist.PrefixStore(f"vig-group-{launch.group}", launch.store())
        dist.init_process_group(
            dist.get_default_backend_for_device(device), store=store, rank=launch.rank % size, world_size=size,
            timeout=PATIENCE,
        )  # fmt: skip
    if dist.get_world_size() != size:
        raise ModelError(
            f"tensor_parallel_size = {size}, but the process group that was set up before has {dist.get_world_size()} "
            "ranks. Give that size, or load the model yourself (DistributedConfig of transformers)"
        )


def _bind(device: str, local_rank: int) -> None:
    """Raises ModelError where there are fewer devices than ranks on this machine."""
    count = torch.accelerator.device_count()
    if local_rank >= count:
        raise ModelError(
            f"local rank {local_rank}, but torch finds {count} {device} devices here. Start at most {count} processes "
            "a machine (--nproc-per-node)"
        )
    torch.accelerator.set_device_index(local_rank)


class Ranks:
    """The ranks that hold a model together, by their process group; without one, this process alone.

    All of them make the same calls in the same order.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.size = 1 if group is None else dist.get_world_size(group)
        self.is_first = group is None or dist.get_rank(group) == 0
        self._group = group
        if self.size > 1 and dist.get_backend(group) != "gloo":  # what is told lies in the memory of the host
            self._group = dist.new_group(
                dist.get_process_group_ranks(group), PATIENCE, "gloo", use_local_synchronization=True
            )

    @classmethod
    def of(cls, model: Any) -> Ranks:
        """Those of a model that transformers made tensor-parallel."""
        if (getattr(model, "tp_size", None) or 1) == 1:
            return cls()
        return cls(model.get_output_embeddings().weight.device_mesh.get_group())

    def tell(self, value: Any) -> None:
        """From the first rank, to the others, who ask for it (`told`)."""
        if self.size > 1:
            dist.broadcast_object_list([value], group_src=0, group=self._group)

    def told(self) -> Any:
        """What the first rank tells next. Raises RankError where it has ended."""
        box = [None]
        try:
            dist.broadcast_object_list(box, group_src=0, group=self._group)
        except RuntimeError as error:
            raise RankError("the first rank of this model has ended; its own message says why") from error
        return box[0]

    def agree(self, value: T) -> T:
        """The first rank's, of a value that all have computed."""
        return self.same(lambda: value)

    def same(self, make: Callable[[], T]) -> T:
        """What `make` gives on the first rank; the others are told, and do not call it."""
        if not self.is_first:
            return self.told()
        value = make()
        self.tell(value)
        return value

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """The items of the first rank; the others are told, and do not touch theirs."""
        if self.size == 1:
            yield from items
        elif self.is_first:
            for item in items:
                self.tell((True, item))
                yield item
            self.tell((False, None))
        else:
            while (following := self.told())[0]:
                yield following[1]
