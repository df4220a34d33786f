"""Pure planning: records -> windows -> blocks -> batches. Nothing here reads a clock, a file or a random number.

A window (8,192 records in reading order) is a shard of the output and the unit of resuming. Inside it, records with
the same images stand together, and blocks of them are encoded and cut into batches of similar length under a token
budget. The batches depend only on the window's own records and the settings, so a run that was killed and resumed
scores the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

from vig.data.sample import BrokenRecord, ImageSource, Sample

WINDOW = 8192  # records
BLOCK = 256  # records whose pixels are in memory at a time,
BLOCK_BYTES = 64 << 20  # and about how many bytes of pixels: a block ends with the record that reaches either
BATCH_TOKENS = 8192  # default budget of one batch: rows x longest row

Item = TypeVar("Item")


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one shorter.

    Each is emptied when the next is asked for: whoever asks still holds it, and two windows may not fit into memory.
    """
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
        chunk.clear()


def by_images(records: Sequence[Sample | BrokenRecord], most: int = 64) -> list[list[int]]:
    """Numbers of the records, those with the same images together, at most `most`, in order of first appearance.

    Equal paths, equal bytes or the same picture in memory are the same image here; nothing is opened.
    """
    groups: list[list[int]] = []
    of_images: dict[tuple, list[int]] = {}
    for number, record in enumerate(records):
        images = getattr(record, "images", ())
        key = tuple(map(image_key, images))
        group = of_images.get(key) if key else None
        if group is None or len(group) == most:
            group = []
            groups.append(group)
            if key:
                of_images[key] = group
        group.append(number)
    return groups


def image_key(image: ImageSource) -> Hashable:
    """Equal for equal paths, equal bytes and the same picture in memory."""
    return image if isinstance(image, Path | bytes) else id(image)


def blocks(items: Iterable[Item], n_bytes: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Cuts items in order into lists of at most BLOCK, ending with the one that reaches BLOCK_BYTES."""
    block, held = [], 0
    for item in items:
        block.append(item)
        held += n_bytes(item)
        if len(block) == BLOCK or held >= BLOCK_BYTES:
            yield block
            block, held = [], 0
    if block:
        yield block


def in_shard(window: int, shard: tuple[int, int] | None) -> bool:
    """Whether window number `window` is the work of job i of n, shard = (i, n)."""
    return shard is None or window % shard[1] == shard[0]


def parse_shard(text: str) -> tuple[int, int]:
    """ "3/8" -> (3, 8): job 3 of 8, counted from 0. Raises ValueError."""
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ValueError(f"shard = {text!r}, expected i/n with 0 <= i < n, such as 0/8")
    return int(index), int(count)


def batches(lengths: Sequence[int], budget: int, max_rows: int | None = None) -> list[list[int]]:
    """Cuts items into batches whose padded size, rows x longest row, stays within `budget` tokens.

    lengths: tokens of each item. max_rows: at most so many items a batch.
    Longest first, so that memory trouble shows at once. An item over the budget is a batch of its own. Every
    index appears exactly once; equal lengths keep their order.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    cut: list[list[int]] = []
    for index in order:
        fits = cut and lengths[cut[-1][0]] * (len(cut[-1]) + 1) <= budget
        if fits and (max_rows is None or len(cut[-1]) < max_rows):
            cut[-1].append(index)
        else:
            cut.append([index])
    return cut
