"""Where the segments of a batch lie in its one sequence, as each kernel of `packed_attention` wants to know it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
    mask: Tensor | None  # (S, P + S) bool, what is seen; None where P = 0 and causal attention is meant

    def to(self, device: torch.device) -> Group:
        return Group(*(part.to(device) if torch.is_tensor(part) else part for part in self))


def groups(found: Sequence[Segment]) -> list[Group]:
    """Segments of equal prefix length and similar length together; within KEYS tokens of keys, unless alone."""
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
    return [_group(members) for members in cut]


def _group(members: Sequence[Segment]) -> Group:
    longest, prefix = members[0].length, members[0].prefix
    step = torch.arange(longest)
    start, length = (torch.tensor([one[field] for one in members])[:, None] for field in (0, 1))
    inside = step < length  # (n, S)
    queries = start + torch.where(inside, step, 0)
    keys, mask = queries, None
    if prefix:
        before = torch.tensor([one.prefix_start for one in members])[:, None] + torch.arange(prefix)
        keys = torch.cat([before, queries], dim=1)
        mask = torch.ones(longest, prefix + longest, dtype=torch.bool).tril(prefix)
    filled = inside.flatten().nonzero().squeeze(1)
    places = queries.flatten()[filled]
    return Group(queries.flatten(), keys.flatten(), filled, places, len(members), mask)


class Packed(NamedTuple):
    """Segments with or without a prefix, for a kernel that takes any lengths. Never run on a GPU."""

    places: Tensor  # (queries,) in the sequence
    keys: Tensor  # (keys,)
    query_ends: Tensor  # (n + 1,) int32, from 0
    key_ends: Tensor  # (n + 1,) int32, from 0
    longest: tuple[int, int]  # queries and keys of a segment

    def to(self, device: torch.device) -> Packed:
        return Packed(*(part.to(device) if torch.is_tensor(part) else part for part in self))


def packs(found: Sequence[Segment]) -> list[Packed]:
    """All segments, in parts of at most KEYS tokens of keys unless one has more."""
    cut: list[list[Segment]] = []
    held = 0
    for one in found:
        held += one.prefix + one.length
        if not cut or held > KEYS:
            cut.append([])
            held = one.prefix + one.length
        cut[-1].append(one)
    return [_packed(members) for members in cut]


def _packed(members: Sequence[Segment]) -> Packed:
    own = [torch.arange(one.start, one.start + one.length) for one in members]
    before = [torch.arange(one.prefix_start, one.prefix_start + one.prefix) for one in members]
    both = [torch.cat(pair) for pair in zip(before, own, strict=True)]
    ends = [
        torch.tensor([0, *(len(part) for part in parts)]).cumsum(0, dtype=torch.int32)
        for parts in (own, both)
    ]
    longest = (max(map(len, own)), max(map(len, both)))
    return Packed(torch.cat(own), torch.cat(both), *ends, longest)


class SegmentLayout:
    """Where the segments of one batch lie, as the attention function of kernel `kernel` wants to know it."""

    def __init__(self, rows: Sequence[SharedRow], kernel: str = "sdpa"):
        self.segments, self.kernel = segments(rows), kernel
        self._on: dict[torch.device, Any] = {}

    def on(self, device: torch.device) -> Any:
        """[Group] for "sdpa", [Packed] for "flash_attention_2", with their tensors on `device`."""
        if device not in self._on:
            made = groups(self.segments) if self.kernel == "sdpa" else packs(self.segments)
            self._on[device] = [part.to(device) for part in made]
        return self._on[device]
