"""Where the segments of a batch lie in its one sequence, as each kernel of `packed_attention` wants to know it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vig.models.transfer import to_device
from vig.scoring.prefix_sharing import SharedRow

KEYS = 8192  # tokens whose keys are gathered at a time, so that repeated prefixes stay within bounds


class Segment(NamedTuple):
    """Tokens that attend to themselves causally, and to a prefix. Places in the sequence, and lengths in tokens."""

    start: int
    length: int
    prefix_start: int = 0
    prefix: int = 0


def segments(rows: Sequence[SharedRow]) -> list[Segment]:
    """Of rows that lie one after another; together they are the sequence, in order."""
    found, start = [], 0
    for row in rows:
        if len(row.members) == 1:
            found.append(Segment(start, row.n_tokens))
        else:
            found.append(Segment(start, row.prefix))
            place = start + row.prefix
            for length in row.lengths:
                found.append(Segment(place, length - row.prefix, start, row.prefix))
                place += found[-1].length
        start += row.n_tokens
    return found


class Group(NamedTuple):
    """n segments with equal prefixes of P tokens and S tokens at most. Those that are shorter repeat their first."""

    queries: Tensor  # (n * S,) places in the sequence
    keys: Tensor  # (n * (P + S),)
    filled: Tensor  # (tokens of all,) which of the n * S are no filling
    places: Tensor  # (tokens of all,) where those stand in the sequence
    n: int
    mask: Tensor | None  # (S, P + S) bool, what is seen; None where that is all before a token and P = 0

    def to(self, device: torch.device) -> Group:
        return Group(*(to_device(part, device) if torch.is_tensor(part) else part for part in self))


def groups(found: Sequence[Segment], window: int | None = None) -> list[Group]:
    """Segments of equal prefix length and similar length together; within KEYS tokens of keys, unless alone.

    window: keys that a token sees, itself included; None: all before it.
    """
    order = sorted(found, key=lambda one: (-one.prefix, -one.length, one.start))
    cut: list[list[Segment]] = []
    for one in order:
        if cut:
            first = cut[-1][0]
            similar = first.prefix == one.prefix and first.length <= one.length + one.length // 8 + 8
            if similar and (len(cut[-1]) + 1) * (first.prefix + first.length) <= KEYS:
                cut[-1].append(one)
                continue
        cut.append([one])
    return [_group(members, window) for members in cut]


def _group(members: Sequence[Segment], window: int | None) -> Group:
    longest, prefix = members[0].length, members[0].prefix
    step = torch.arange(longest)
    start, length = (torch.tensor([one[field] for one in members])[:, None] for field in (0, 1))
    inside = step < length  # (n, S)
    queries = start + torch.where(inside, step, 0)
    keys, mask = queries, None
    if prefix:
        before = torch.tensor([one.prefix_start for one in members])[:, None] + torch.arange(prefix)
        keys = torch.cat([before, queries], dim=1)
    if prefix or (window or longest) < longest:
        mask = torch.ones(longest, prefix + longest, dtype=torch.bool).tril(prefix)
        mask = mask if window is None else mask.triu(prefix - window + 1)
    filled = inside.flatten().nonzero().squeeze(1)
    places = queries.flatten()[filled]
    return Group(queries.flatten(), keys.flatten(), filled, places, len(members), mask)


class Packed(NamedTuple):
    """Segments that stand one after another, with or without a prefix, for a kernel that takes any lengths."""

    queries: slice  # places in the sequence
    keys: Tensor | None  # (keys,) places; None where no segment has a prefix: those of the queries
    query_ends: Tensor  # (n + 1,) int32, from 0
    key_ends: Tensor  # (n + 1,) int32, from 0
    longest: tuple[int, int]  # queries and keys of a segment

    def to(self, device: torch.device) -> Packed:
        return Packed(*(to_device(part, device) if torch.is_tensor(part) else part for part in self))


def packs(found: Sequence[Segment], most: int) -> list[Packed]:
    """All segments in order, in parts of at most `most` tokens of keys unless one has more."""
    cut: list[list[Segment]] = []
    held = 0
    for one in found:
        held += one.prefix + one.length
        if not cut or held > most:
            cut.append([])
            held = one.prefix + one.length
        cut[-1].append(one)
    return [_packed(members) for members in cut]


def _packed(members: Sequence[Segment]) -> Packed:
    lengths = [one.length for one in members]
    seen = [one.prefix + one.length for one in members]
    ends = [torch.tensor([0, *each]).cumsum(0, dtype=torch.int32) for each in (lengths, seen)]
    queries = slice(members[0].start, members[-1].start + members[-1].length)
    keys = None
    if any(one.prefix for one in members):
        spans = [
            torch.arange(start, start + length)
            for one in members
            for start, length in ((one.prefix_start, one.prefix), (one.start, one.length))
        ]
        keys = torch.cat(spans)
    return Packed(queries, keys, *ends, (max(lengths), max(seen)))


class SegmentLayout:
    """Where the segments of one batch lie, and the kernel that attends to them (`attention_kernels.KERNELS`, "auto").

    What a kernel wants to know of the segments is made once for all layers that ask in the same way.
    """

    def __init__(self, rows: Sequence[SharedRow], kernel: str = "auto"):
        self.segments, self.kernel = segments(rows), kernel
        self._made: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """make(), at the first call with this key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]
