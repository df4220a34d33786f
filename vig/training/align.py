"""Where a stored answer stands among the labels of a row: token ids alone, no template and no text.

The scores hold the answer tokens of all turns one behind the other. A trainer's row holds them among whatever else its
collator supervises. `lay` finds every way to put the stored ids, in order, on supervised positions of the row as
contiguous segments, one a turn; between two turns something else stands. A row that leaves exactly one way is sure.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from vig.models.lm_head import IGNORE

HEAD = 16  # supervised tokens that a template may write in front of an answer: the header of its turn
TAIL = 2  # and behind one: its end of turn, a newline
HEADLESS = (
    2  # a row supervised from one of its first tokens on hides no prompt: its labels are the full sequence
)


class Layout(NamedTuple):
    """One way to lay a stored answer on a row."""

    index: tuple[int, ...]  # (m,) positions in the row, ascending
    stored: tuple[int, ...]  # (m,) which stored token stands there
    truncated: bool  # the row ends before the answer does
    ways: int  # to lay as many tokens, counted up to 2


class _Turns(NamedTuple):
    """A reading of where turns end: which stored ids to look for, and after which of them a turn may end where."""

    stored: Sequence[int]  # places in the stored ids
    may_end: Callable[[int, int], bool]  # (place among `stored`, position in the row)
    closed: bool  # the whole answer must end where a turn may


def lay(labels: Sequence[int], ids: Sequence[int], ends: Collection[int] = ()) -> Layout | None:
    """How the stored answer lies on a row; None where it does not.

    labels: (T,), IGNORE off the supervised tokens. ids: (n,) of all turns, n > 0.
    ends: ids of end-of-turn tokens, as far as they are known.

    What tells turns apart is tried in this order, and the first reading that fits decides: the stored answers end in
    an end-of-turn token, and so do the row's; only the stored ones do; only the row's do, or a turn ends with its run
    of supervised tokens; no end-of-turn token is known or there, and all turns end in the same way, whichever it is.
    Where no reading lays the whole answer, the longest part of it is laid that ends where the row does.
    """
    row = _Row(labels, ends)
    if len(row.supervised) == len(ids) and all(
        labels[position] == id for position, id in zip(row.supervised, ids, strict=True)
    ):
        return Layout(tuple(row.supervised), tuple(range(len(ids))), False, 1)
    readings = [
        [_Search(row, ids, turns) for turns in reading] for reading in _readings(row, ids, row.end_ids)
    ]
    for ways in (_Search.whole, _Search.cut):
        for reading in readings:
            found = _longest([layout for search in reading for layout in ways(search)])
            if found is not None:
                return found
    return None


def _longest(layouts: Sequence[Layout]) -> Layout | None:
    """The one that lays the most tokens, and whether another one lays as many."""
    if not layouts:
        return None
    longest = max(layouts, key=lambda layout: len(layout.index))
    others = {layout.index for layout in layouts if len(layout.index) == len(longest.index)} - {longest.index}
    return longest._replace(ways=2) if others else longest


class _Row:
    """A row's labels, and their runs of supervised tokens."""

    def __init__(self, labels: Sequence[int], ends: Collection[int]):
        self.labels = labels
        values = np.asarray(labels)
        self.supervised = np.flatnonzero(values != IGNORE).tolist()
        self.places: dict[int, list[int]] = {}  # of each supervised id
        self.run: dict[int, int] = {}  # number of the run that a position is in
        self.starts: list[int] = []  # of the runs
        before = None
        for position in self.supervised:
            if before is None or position != before + 1:
                self.starts.append(position)
            self.run[position] = len(self.starts) - 1
            self.places.setdefault(labels[position], []).append(position)
            before = position
        self.last = self.supervised[-1] if self.supervised else -1
        self.is_full = bool(self.supervised) and self.supervised[0] < HEADLESS
        self.end_ids = frozenset(ends)
        self.ends = sorted(position for id in self.end_ids for position in self.places.get(id, ()))

    def after(self, position: int) -> int:
        """The label behind a position; IGNORE at the end of a run."""
        return self.labels[position + 1] if position + 1 < len(self.labels) else IGNORE

    def first(self, id: int) -> list[int]:
        """Where the first turn may start: anywhere in a full sequence, else where the first run does."""
        places = self.places.get(id, [])
        return places if self.is_full else [position for position in places if self._is_start(position, 0)]

    def next(self, id: int, end: int) -> list[int]:
        """Where the next turn may start, behind one that ended at `end`: in the same run, or where the next one starts.

        A row whose prompts are masked has no run without an answer.
        """
        places = self.places.get(id, [])
        places = places[bisect_left(places, end + 2) :]
        if self.is_full:
            return places
        here, may_leave = self.run[end], self.tail(end) <= TAIL
        return [
            position
            for position in places
            if self.run[position] == here or (may_leave and self._is_start(position, here + 1))
        ]

    def _is_start(self, position: int, run: int) -> bool:
        return self.run[position] == run and position - self.starts[run] <= HEAD

    def tail(self, position: int) -> int:
        """How many supervised tokens follow a position in its run."""
        run = self.run[position]
        stop = self.starts[run + 1] if run + 1 < len(self.starts) else len(self.labels)
        return bisect_left(self.supervised, stop) - bisect_left(self.supervised, position) - 1

    def is_rest(self, position: int) -> bool:
        """Whether what follows the last answer, which ends there, can be the template's, or a question without answer.

        A question has an end of turn of its own; two of them show that an answer follows.
        """
        in_last_run = self.is_full or self.run[position] == len(self.starts) - 1
        if in_last_run and not self.is_full and self.tail(position) <= TAIL:
            return True
        own_end = self.after(position) in self.end_ids
        ended = own_end or self.labels[position] in self.end_ids
        ends_behind = len(self.ends) - bisect_left(self.ends, position + 1) - own_end
        return in_last_run and ends_behind <= 1 and (ended or self.is_full)


def _readings(row: _Row, ids: Sequence[int], ends: frozenset[int]) -> Iterator[list[_Turns]]:
    """What `lay` tries, in order; alternatives within a reading stand beside each other."""
    places = range(len(ids))
    if ids[-1] in ends:
        yield [_Turns(places, lambda place, _: ids[place] in ends, True)]
        kept = [place for place in places if ids[place] not in ends]
        if kept and not row.ends:
            closing = {number for number, place in enumerate(kept) if ids[place + 1] in ends}
            yield [_Turns(kept, lambda number, _: number in closing, False)]
        return
    if ends:
        yield [_Turns(places, lambda _, position: row.after(position) in {IGNORE, *ends}, True)]
    if not row.ends:
        last = row.places.get(ids[-1], ())
        yield [
            _Turns(places, lambda _, position: row.after(position) == IGNORE, False),
            _Turns(places, lambda place, _: ids[place] == ids[-1], True),
            *(
                _Turns(places, lambda _, position, id=id: row.after(position) in (IGNORE, id), True)
                for id in sorted({row.after(position) for position in last} - {IGNORE})
            ),
        ]


class _Search:
    """Every path of the stored ids through a row, under one reading of its turns.

    steps[k]: position -> (number of ways to have laid stored ids 0..k with k there, counted up to 2, the position of
    k - 1 in one of them).
    """

    def __init__(self, row: _Row, ids: Sequence[int], turns: _Turns):
        self.row, self.turns = row, turns
        wanted = [int(ids[place]) for place in turns.stored]
        self.length = len(wanted)
        self.steps: list[dict[int, tuple[int, int]]] = [dict.fromkeys(row.first(wanted[0]), (1, -1))]
        for number, id in enumerate(wanted[1:]):
            step: dict[int, tuple[int, int]] = {}
            for position, (ways, _) in self.steps[-1].items():
                following = [position + 1] if row.after(position) == id else []
                if turns.may_end(number, position):
                    following += row.next(id, position)
                for there in following:
                    step[there] = (min(2, ways + step.get(there, (0, 0))[0]), position)
            if not step:
                break
            self.steps.append(step)

    def whole(self) -> Iterator[Layout]:
        """The layouts of all of it."""
        if len(self.steps) < self.length:
            return
        number = self.length - 1
        for position in self.steps[-1]:
            closed = self.turns.may_end(number, position)
            if (closed or not self.turns.closed) and self.row.is_rest(position):
                yield self._layout(number, position, False)

    def cut(self) -> Iterator[Layout]:
        """The longest layouts of a part of it that ends where the row does: within an answer, or in a question."""
        for number in reversed(range(min(len(self.steps), self.length - 1))):
            found = False
            for position in self.steps[number]:
                closed = self.turns.may_end(number, position)
                if position == self.row.last or (closed and self._cut_in_question(position)):
                    found = True
                    yield self._layout(number, position, True)
            if found:
                return

    def _cut_in_question(self, position: int) -> bool:
        known = bool(self.row.ends) or not self.row.is_full or self.row.tail(position) <= TAIL
        return known and self.row.is_rest(position)

    def _layout(self, number: int, position: int, truncated: bool) -> Layout:
        """The layout of stored ids 0..number that ends there."""
        at, index = position, []
        for step in reversed(self.steps[: number + 1]):
            index.append(at)
            at = step[at][1]
        ways = self.steps[number][position][0]
        return Layout(tuple(reversed(index)), tuple(self.turns.stored[: number + 1]), truncated, ways)
