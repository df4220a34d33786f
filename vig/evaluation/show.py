"""What `vig eval` prints: figures with their intervals, a baseline beside them, and what a reader should know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vig.data.error_log import ErrorLog
from vig.evaluation.folder import ERRORS
from vig.evaluation.tasks import TASKS
from vig.scoring.progress_bar import duration, rate

if TYPE_CHECKING:
    from vig.evaluation.dry_run import Estimate
    from vig.evaluation.run import Evaluation

PLAIN = {"length": "words"}  # figures that are no shares


SHOWN_REASONS = 8


def show_evaluation(console: Console, done: Evaluation) -> None:
    """The summary of `vig eval`."""
    state, errors = done.progress, done.errors
    show_measures(console, done.measures)
    here = state.done - state.resumed
    if here:
        answered = f"answered {here - state.failed:,} questions in {duration(state.seconds)}"
        console.print(f"{answered} ({rate(state)})", markup=False)
    if state.resumed:
        console.print(f"{state.resumed:,} were done before")
    if state.splits:
        console.print(f"{state.splits:,} batches did not fit into memory and were halved")
    _show_errors(console, errors)
    if errors.count:
        console.print(f"{errors.count:,} questions could not be asked, and are in no figure")
        console.print(f"all of them: {done.folder / ERRORS}; --retry failed asks them again", markup=False)
    console.print(f"predictions and measures: {done.folder}", markup=False)


def show_estimate(console: Console, estimate: Estimate, errors: ErrorLog) -> None:
    """The summary of `vig eval --dry-run`."""
    console.print(f"checked {estimate.progress.done:,} questions")
    if estimate.whole is not None:
        about = f"measured on {estimate.answered:,} questions"
        console.print(f"estimate: {duration(estimate.whole)} here, {about}")
    _show_errors(console, errors)
    if errors.path is not None:
        console.print(f"all of them: {errors.path}", markup=False)
    console.print("dry run: nothing was stored")


def _show_errors(console: Console, errors: ErrorLog) -> None:
    for line in errors.lines(SHOWN_REASONS):
        console.print(line, style="red", markup=False)


def summary(done: Evaluation) -> dict[str, Any]:
    """For `--json`: measures.json and what this run did."""
    names = ("done", "resumed", "tokens", "failed", "failed_before", "seconds")
    state = {name: getattr(done.progress, name) for name in names}
    return {"out": done.folder, **done.measures, **state, "errors": done.errors.summary()}


def show_measures(console: Console, measures: Mapping[str, Any]) -> None:
    """One row a figure; with a baseline also its value, the difference, and the p-value."""
    found = {(one["group"], one["name"]): one for one in measures.get("comparison", {}).get("changes", ())}
    head = ["", "figure", "value", "95 % interval"]
    if found:
        head += ["baseline", "difference", "95 % interval", "p"]
    table = Table(*head, title=_title(measures), title_justify="left")
    last = None
    for figure in measures["figures"]:
        group, name = figure["group"], figure["name"]
        cells = [
            Text(group if group != last else ""),
            name.replace("_", " "),
            *_value(name, figure["value"], figure),
        ]
        if (group, name) in found:
            cells += _change(found[group, name])
        table.add_row(*cells, end_section=False)
        last = group
    console.print(table)
    for line in remarks(measures):
        console.print(line, markup=False)


def remarks(measures: Mapping[str, Any]) -> list[str]:
    """Counts, answers that say nothing or were cut, McNemar's test."""
    counts = measures["counts"]
    lines = [f"{counts['answered']:,} questions about {counts['images']:,} images"]
    if counts["units"] != counts["answered"]:
        lines[0] += f", counted as {counts['units']:,}"
    if counts["text_only"]:
        lines[0] += f", {counts['text_only']:,} without an image"
    lines[0] += "; intervals by drawing images"
    if counts["images"] + counts["text_only"] < 2:
        lines[0] += ", of which there are too few for any"
    if counts.get("abstained"):
        lines.append(_abstained(measures))
    if counts["cut"]:
        cure = "raise --max-new-tokens where that costs figures"
        lines.append(f"{counts['cut']:,} answers were still going on at the longest length: {cure}")
    if "comparison" in measures:
        lines += _of_baseline(measures["comparison"])
    return lines


def _abstained(measures: Mapping[str, Any]) -> str:
    counts, rule, task = measures["counts"], measures["rule"], TASKS[measures["task"]]
    line = f"{counts['abstained']:,} answers {task.silence}"
    if counts["abstained_read"]:
        return f"{line}; rule {rule} calls {counts['abstained_read']:,} of them yes ({task.rules[rule]})"
    return f"{line}; rule {rule} counts them as wrong"


def _of_baseline(comparison: Mapping[str, Any]) -> list[str]:
    lines = [
        f"baseline: {comparison['baseline']}, on the {comparison['questions']:,} questions that both answered"
    ]
    test = comparison["mcnemar"]
    if test is not None:
        lines.append(
            f"McNemar: {test['only_here']:,} right here alone, {test['only_baseline']:,} in the baseline alone, "
            f"p = {test['p_value']:.3g} (takes questions for independent; the bootstrap draws images)"
        )
    return lines


def _title(measures: Mapping[str, Any]) -> str:
    named = ((word, measures[name]) for word, name in (("by", "by"), ("rule", "rule")))
    return ", ".join([measures["task"], *(f"{word} {value}" for word, value in named if value)])


def _value(name: str, value: float, bounds: Mapping[str, Any]) -> list[str]:
    unit = PLAIN.get(name)
    scale, text = (1, f" {unit}") if unit else (100, " %")
    interval = "" if bounds["low"] is None else f"{scale * bounds['low']:.1f} to {scale * bounds['high']:.1f}"
    return [f"{scale * value:.1f}{text}", interval]


def _change(change: Mapping[str, Any]) -> list[str]:
    scale = 1 if change["name"] in PLAIN else 100
    interval = (
        "" if change["low"] is None else f"{scale * change['low']:+.1f} to {scale * change['high']:+.1f}"
    )
    p_value = "" if change["p_value"] is None else f"{change['p_value']:.3g}"
    return [f"{scale * change['baseline']:.1f}", f"{scale * change['difference']:+.1f}", interval, p_value]
