"""Results on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from benchmarks import machine, results


def show(result: dict, console: Console) -> None:
    """One table a case, then what was compared and who did not run."""
    _show_head(result, console)
    for case in result["cases"]:
        if "unit" in case:
            _show_values(case, console)
        else:
            _show_timings(case, console)
        for comparison in case.get("comparisons", ()):
            if comparison["ratio"] is not None:
                console.print(f"  {comparison['name']}: {comparison['ratio']:.2f}", highlight=False)
        for line in results.problems(case):
            console.print(f"  not timed: {line}", style="yellow", markup=False, highlight=False)


def show_tables(result: dict, console: Console) -> None:
    """A suite that makes its tables itself, for the terminal and for the page alike."""
    _show_head(result, console)
    for head, *rows in results.tables(result):
        table = Table()
        for column, name in enumerate(head):
            table.add_column(name, justify="right" if column else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table, markup=False)


def _show_head(result: dict, console: Console) -> None:
    console.print(
        f"[bold]{result['suite']}[/] on {machine.place(result)}; torch "
        f"{result['versions']['torch']}; commit {result['commit']}",
        highlight=False,
    )


def _show_timings(case: dict, console: Console) -> None:
    peak = f"; register-only peak {case['peak_gflops']:.0f} GFLOP/s" if case.get("peak_gflops") else ""
    table = Table(title=f"{results.label(case)} ({case['model']}){peak}", title_justify="left")
    timed = [(row, results.cells(row)) for row in results.timed(case)]
    columns = [column for column in results.COLUMNS if any(cells[column] for _, cells in timed)]
    table.add_column("contender", no_wrap=True)
    for column in columns:
        title = case.get("ratio_to", "/ GEMM") if column == "ratio" else column
        table.add_column(title, justify="right", no_wrap=True)
    for row, cells in timed:
        table.add_row(
            results.named(row), *(cells[column] for column in columns), style="bold" if row["ours"] else ""
        )
    console.print(table)


def _show_values(case: dict, console: Console) -> None:
    """Suites that measure something else than time: a value and its unit."""
    table = Table(title=results.label(case), title_justify="left")
    table.add_column("contender", no_wrap=True)
    table.add_column(case["unit"], justify="right")
    promises = any(row.get("promised") for row in case["rows"])
    if promises:
        table.add_column("promised", justify="right")
    for row in case["rows"]:
        if row["status"] == "ok":
            promised = f"{row['promised']:.0f}" if row.get("promised") else ""
            values = (f"{row['value']:.1f}", promised) if promises else (f"{row['value']:.1f}",)
            table.add_row(row["name"], *values, style="bold" if row["ours"] else "")
    console.print(table)
