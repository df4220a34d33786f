"""A bar for scoring from Python, on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def bar(wanted: bool) -> Iterator[Callable[[Any], None] | None]:
    """A callback that shows a run's state on standard error; None where it is no terminal, or not wanted."""
    console = Console(stderr=True)
    if not wanted or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as shown:
        task = shown.add_task("scoring", total=None)
        yield lambda state: shown.update(task, completed=state.done, total=state.total)
