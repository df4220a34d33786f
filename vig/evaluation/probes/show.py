"""Tables of probes for a terminal: a row a group, a column a measure, 95 % intervals in brackets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vig.evaluation.probes.findings import Change, Figure
from vig.evaluation.probes.run import ProbeResult, by_group
from vig.evaluation.probes.table import PROBES, Measure


def show_result(console: Console, result: ProbeResult) -> None:
    """The figures, the changes where there is a baseline, what each column means, and the notes."""
    probe = PROBES[result.probe]
    console.print(f"[bold]{result.probe}[/]: {probe.question}")
    console.print(_table(result.figures, result.probe, _figure))
    if result.changes:
        console.print("baseline -> here, difference \\[95 % interval]")
        console.print(_table(result.changes, result.probe, _change))
    shown = {figure.measure for figure in result.figures}
    for measure in probe.measures:
        if measure.name in shown:
            console.print(f"  {measure.name}: {measure.says}", markup=False, style="dim")
    for note in notes(result):
        console.print(note, markup=False)


def notes(result: ProbeResult) -> Iterator[str]:
    yield from result.findings.notes
    if result.unpaired:
        yield f"{result.unpaired:,} samples have no twin in the baseline, or here: left out of the differences"


def _table(figures: list, probe: str, cell: Callable) -> Table:
    measures = [
        one for one in PROBES[probe].measures if any(figure.measure == one.name for figure in figures)
    ]
    table = Table()
    table.add_column("", no_wrap=True)
    table.add_column("n", justify="right")
    for measure in measures:
        table.add_column(measure.name + (", nats" if measure.unit == "nats" else ", %"), justify="right")
    for group, of_group in by_group(figures).items():
        n = max(figure.n for figure in of_group.values())
        table.add_row(Text(group), f"{n:,}", *_cells(measures, of_group, n, cell))
    return table


def _cells(
    measures: list[Measure], of_group: Mapping[str, Figure | Change], n: int, cell: Callable
) -> Iterator[str]:
    for measure in measures:
        figure = of_group.get(measure.name)
        if figure is None:
            yield ""
        else:
            fewer = f" of {figure.n:,}" if figure.n != n else ""
            yield cell(figure, measure) + fewer


def _number(value: float, measure: Measure, sign: bool = False) -> str:
    if measure.unit == "nats":
        return f"{value:+.3f}"
    return f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}"


def _interval(figure: Figure | Change, measure: Measure, sign: bool = False) -> str:
    if figure.low is None:
        return ""
    return f" \\[{_number(figure.low, measure, sign)}, {_number(figure.high, measure, sign)}]"


def _figure(figure: Figure, measure: Measure) -> str:
    return _number(figure.value, measure) + _interval(figure, measure)


def _change(change: Change, measure: Measure) -> str:
    before, after = _number(change.baseline, measure), _number(change.value, measure)
    difference = _number(change.difference, measure, sign=True)
    return f"{before} -> {after}, {difference}{_interval(change, measure, sign=True)}"
