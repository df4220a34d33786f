"""Bars on a terminal: one that is drawn when there is something to show, and that of scoring from Python; rates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class LateBar(Progress):
    """A bar that is drawn with its first state, so that it never stands there without its total."""

    def __enter__(self) -> LateBar:
        return self

    def update(self, *args: Any, **state: Any) -> None:
        super().update(*args, **state)
        self.start()

    def __exit__(self, *_: Any) -> None:
        if self.live.is_started:
            self.stop()


@contextmanager
def bar(wanted: bool) -> Iterator[Callable[[Any], None] | None]:
    """A callback that shows a run's state on standard error; None where it is no terminal, or not wanted."""
    console = Console(stderr=True, emoji=False)
    if not wanted or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with LateBar(*columns, console=console) as shown:
        task = shown.add_task("scoring", total=None)
        yield lambda state: shown.update(task, completed=state.done, total=state.total)


def rate(state: Any) -> str:
    here = state.done - state.resumed
    return f"{here / max(state.seconds, 1e-9):,.1f} samples/s" if here else ""


def time_left(state: Any) -> str:
    here = state.done - state.resumed
    if not here or state.total is None:
        return "unknown time"
    return duration((state.total - state.done) * state.seconds / here)


def duration(seconds: float) -> str:
    """75 -> "1:15", 8000 -> "2:13:20"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
