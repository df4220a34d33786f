"""What `python -m benchmarks evidence` does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks import machine, results
from benchmarks.evidence import design, store, workers

Say = Callable[[str], None]


def run_experiment(out: Path | None, seeds: int, processes: int, say: Say) -> None:
    """All runs that have no line yet."""
    path = _file(out)
    store.begin(path, _head())
    done = workers.run_all(path, seeds, processes, say)
    say(f"{done} runs stand in {path}")


def run_one(name: str, out: Path | None, say: Say) -> None:
    """One run in this process, unless it has a line."""
    run, path = design.find(name), _file(out)
    store.begin(path, _head())
    if run in store.read(path)[1]:
        say(f"{run} stands in {path}")
        return
    store.append(path, _line(run))
    say(f"{run} was added to {path}")


def check(name: str, out: Path | None, say: Say) -> bool:
    """Run a stored run again; says where its lines differ, and returns whether they do not."""
    from benchmarks.evidence.runs import repeated

    run, path = design.find(name), _file(out)
    lines = store.read(path)[1]
    if run not in lines:
        raise ValueError(f"{path} has no line of {run}: run it with --only {str(run)!r}")
    stored, again = repeated(lines[run]), repeated(_line(run))
    differ = [field for field in stored.keys() | again.keys() if stored.get(field) != again.get(field)]
    for field in sorted(differ):
        say(f"{run}: {field} was {stored.get(field)!r}, is {again.get(field)!r}")
    if not differ:
        say(f"{run}: the same line again, {len(stored)} fields")
    return not differ


def run_probes(out: Path | None, seeds: int, say: Say) -> None:
    """The probes before and after tuning, of the runs that have no line yet, in this process."""
    from transformers.utils import logging

    from benchmarks.evidence import probes

    path = (out or results.FOLDER) / probes.NAME
    store.begin(path, _head() | {"command": "python -m benchmarks evidence --probes"})
    wanted = probes.plan(min(seeds, len(probes.SEEDS)))
    missing = [run for run in wanted if run not in store.read(path)[1]]
    logging.disable_progress_bar()
    for line in probes.lines(missing) if missing else ():
        store.append(path, line)
        say(f"{design.Run.of(line)} was probed")
    say(f"{len(wanted)} models stand in {path}; --report writes them into the page")


def write_report(out: Path | None) -> list[Path]:
    """Page, figures and the README's block; beside the lines where these are not the checkout's own."""
    from benchmarks.evidence import report

    return report.write(report.places_of(_file(out)))


def _head() -> dict:
    head = machine.header("evidence", threads=1, quick=False)
    return head | {"command": "python -m benchmarks evidence"}


def _line(run: design.Run) -> dict:
    from transformers.utils import logging

    from benchmarks.evidence.runs import Laboratory

    logging.disable_progress_bar()
    return Laboratory(run.base).line(run)


def _file(out: Path | None) -> Path:
    return (out or results.FOLDER) / store.NAME
