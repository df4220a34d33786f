"""What does not fit into memory: how it is told from other errors, and what is done then."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from vig.models.families import ModelError
from vig.models.loading import LoadedModel

Item = TypeVar("Item")
Result = TypeVar("Result")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Of a GPU, or of the processor's own memory."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def in_halves(
    work: Callable[[Sequence[Item]], Iterable[Result]],
    items: Sequence[Item],
    too_large: Callable[[Item, str], Result],
    on_split: Callable[[], None] | None = None,
) -> list[Result]:
    """`work(items)`, a result an item; a batch that does not fit into memory is halved until it does.

    too_large: from an item that does not fit alone and the reason, its result, or an error of its own.
    """
    try:
        return list(work(items))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
    # Out here the error is gone, and with it the tensors that its traceback held.
    if len(items) == 1:
        return [too_large(items[0], f"it does not fit into memory ({reason})")]
    if on_split is not None:
        on_split()
    middle = len(items) // 2
    halves = items[:middle], items[middle:]
    return [result for half in halves for result in in_halves(work, half, too_large, on_split)]


@contextmanager
def refused_by_ranks(loaded: LoadedModel, budget: int) -> Iterator[None]:
    """Raises ModelError where a batch of a tensor-parallel model does not fit into memory.

    Its ranks cannot try a smaller one, since they may be at different places. budget: tokens of a batch, so far.
    """
    try:
        yield
    except RuntimeError as error:
        if loaded.ranks.size == 1 or not is_out_of_memory(error):
            raise
        raise ModelError(
            f"{loaded.name}: a batch does not fit into the memory of {loaded.model.device}, one of the "
            f"{loaded.ranks.size} ranks that hold the model. Give --batch-tokens {max(1, budget // 2)}, or more ranks "
            "(--tensor-parallel-size); the same command goes on from the finished windows"
        ) from error
