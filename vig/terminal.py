"""What the commands print and how they end: progress with rate and time left, summaries, one sample with its answer."""

from __future__ import annotations

import faulthandler
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from vig.data.error_log import ErrorLog
from vig.data.printable import printable
from vig.scoring.progress_bar import LateBar, duration, rate, time_left
from vig.store.token_stats import TOKEN_STATS, stat_columns

if TYPE_CHECKING:
    from vig.models.null_image import NullSettings
    from vig.scoring.inspect import Inspection
    from vig.scoring.run import Estimate
    from vig.scoring.scorer import Progress
    from vig.selection.select import Selection
    from vig.training.settings import TrainProgress, TrainResult

LOG_EVERY = 10.0  # seconds between log lines where there is no terminal
SHOWN_REASONS = 8


def wants_traceback() -> bool:
    """VIG_TRACEBACK=1 shows where an error came from."""
    return os.environ.get("VIG_TRACEBACK", "") not in ("", "0")


_after_stop = ["What is finished is kept, and the same command goes on from there"]


def say_after_stop(text: str) -> None:
    """What `run_program` says instead, if the program is then stopped."""
    _after_stop.append(text)


def run_program(app: Callable[[], None], err: Console, stopped: int) -> None:
    """Runs a command line to its end; what a user can mend is one line on `err` and exit code 1, or the error's own.

    stopped: the exit code of Ctrl-C, and of SIGTERM, which is taken for it.
    """
    if sys.platform == "win32":
        err.print("vig: Windows is not supported. Use Linux, or WSL")
        sys.exit(1)
    signal.signal(signal.SIGTERM, _stop)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that a terminal cannot show ends no run
    if sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__)  # says where native code crashed
    try:
        app()
    except SystemExit as end:
        if end.code == stopped:  # what typer makes of Ctrl-C
            err.print(f"vig: stopped. {_after_stop[-1]}", markup=False)
        raise
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if wants_traceback():
            raise
        err.print(f"[bold red]vig: {type(error).__name__}:[/] ", end="")
        err.print(printable(str(error)), markup=False)
        sys.exit(getattr(error, "exit_code", 1))


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def quiet_libraries() -> None:
    """Leaves the terminal to our own progress: no bars for loading and writing weights."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@contextmanager
def waiting(console: Console, text: str) -> Iterator[None]:
    """A spinner on a terminal, one line elsewhere."""
    if not console.is_terminal:
        console.print(text, markup=False)
        yield
        return
    with console.status(Text(text)):  # a string would be read as markup
        yield


@contextmanager
def progress(console: Console, verb: str) -> Iterator[Callable[[Progress], None]]:
    """A callback that shows a scoring run: a bar on a terminal, plain log lines elsewhere."""
    if not console.is_terminal:
        yield _log_lines(console, verb)
        return
    columns = (
        TextColumn(verb), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(), TextColumn("{task.fields[errors]}"),
    )  # fmt: skip
    with LateBar(*columns, console=console) as bar:
        task = bar.add_task(verb, total=None, rate="", errors="")

        def show(state: Progress) -> None:
            errors = f"[red]{state.failed:,} failed[/]" if state.failed else ""
            bar.update(task, completed=state.done, total=state.total, rate=rate(state), errors=errors)

        yield show


@contextmanager
def share(console: Console, verb: str) -> Iterator[Callable[[float], None] | None]:
    """A callback that takes the share done, 0 to 1, and shows it on a terminal; None elsewhere."""
    if not console.is_terminal:
        yield None
        return
    with Bar(
        TextColumn(verb), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), console=console
    ) as bar:
        task = bar.add_task(verb, total=1.0)
        yield lambda done: bar.update(task, completed=done)


def _log_lines(console: Console, verb: str) -> Callable[[Progress], None]:
    last, told = time.monotonic(), -1

    def show(state: Progress) -> None:
        nonlocal last, told
        finished = state.done == state.total
        if state.done == told or (time.monotonic() - last < LOG_EVERY and not finished):
            return
        last, told = time.monotonic(), state.done
        left = f"{time_left(state)} left" if not finished else ""
        failed = f"{state.failed:,} failed" if state.failed else ""
        about = ", ".join(filter(None, (rate(state), left, failed)))
        total = "?" if state.total is None else f"{state.total:,}"
        console.print(f"{verb}: {state.done:,} of {total}{f' ({about})' if about else ''}", markup=False)

    return show


@contextmanager
def training(console: Console, begins: str) -> Iterator[Callable[[TrainProgress], None]]:
    """A callback that shows a training run: a bar on a terminal, plain log lines elsewhere; until then, `begins`."""
    if not console.is_terminal:
        console.print(begins, markup=False)
        last = -LOG_EVERY  # the first one is shown at once

        def log(state: TrainProgress) -> None:
            nonlocal last
            told = state.step in (state.steps, state.eval_step)
            if told or time.monotonic() - last >= LOG_EVERY:
                last = time.monotonic()
                console.print(str(state), markup=False)

        yield log
        return
    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.fields[state]}", markup=False))
    with Bar(*columns, console=console) as bar:
        task = bar.add_task("training", total=None, state=begins)
        yield lambda state: bar.update(task, completed=state.step, total=state.steps, state=str(state))


def show_training(console: Console, result: TrainResult) -> None:
    """The summary of `vig train`."""
    console.print(
        f"trained {result.steps:,} step{'s' if result.steps != 1 else ''} on {result.samples:,} samples, "
        f"{result.tokens:,} kept tokens in "
        f"{duration(result.seconds)}{' (interrupted)' if result.interrupted else ''}"
    )
    if result.was_finished:
        console.print("all of it was done before, and nothing is left to do")
    elif result.resumed:
        console.print(f"{result.resumed:,} steps were done before")
    for line in _loss_lines(result):
        console.print(line)
    console.print(f"{result.kept:,} samples kept, {result.dropped:,} not selected")
    if result.truncated:
        console.print(f"{result.truncated:,} answers were cut short by max_length")
    errors = ErrorLog()
    for line in result.errors:
        errors.add_line(line)
    for line in errors.lines(SHOWN_REASONS):
        console.print(line, style="red", markup=False)
    if result.errors and result.out is not None:
        console.print(f"all of them: `errors` in {result.out}/train.json", markup=False)
    if result.broken:
        console.print(f"{result.broken:,} records could not be read")
    if result.left_out:
        console.print(f"{result.left_out:,} samples were left out of training")
    if result.out is not None:
        console.print(f"checkpoint: {result.out}", markup=False)
    if result.was_finished:
        console.print("to train anew: --overwrite, or another folder as -o")


def _loss_lines(result: TrainResult) -> Iterator[str]:
    """What can be compared of a run's losses: means over as many steps, and the same data before and after."""
    ends = result.loss_ends
    if ends is not None:
        whose = f"the first and the last {ends.steps:,}" if ends.steps > 1 else "the first and the last"
        yield (
            f"loss {ends.first:.4f} -> {ends.last:.4f} nats a kept token "
            f"(mean of {whose} of {len(result.losses):,} steps)"
        )
    before, after = result.eval_ends
    if after is not None:
        change, where = f"{after:.4f}", f"after step {result.evals[-1][0]:,}"
        if before is not None:
            change, where = f"{before:.4f} -> {change}", f"before the first step, {where}"
        yield f"loss on the held-out data {change} nats an answer token ({where})"


def show_scores(
    console: Console, folder: Path, state: Progress, errors: ErrorLog, lines: Sequence[str] = ()
) -> None:
    """The summary of `vig score`. errors: of all rows in the folder. lines: what its scores as a whole tell."""
    here = state.done - state.resumed
    scored = here - state.failed
    console.print(
        f"scored {scored:,} samples, {state.tokens:,} answer tokens in {duration(state.seconds)}"
        + (f" ({rate(state)})" if here else "")
        + (f"; {state.text_only:,} text-only" if state.text_only else "")
    )
    if state.resumed:
        console.print(f"{state.resumed:,} were done before")
    if state.boundary_tokens:
        console.print(
            f"{state.boundary_tokens:,} boundary tokens hold characters from outside their answer: harmless where "
            "these are white space; `vig inspect --key` shows them"
        )
    show_unknown(console, state.unknown)
    if state.splits:
        console.print(f"{state.splits:,} batches did not fit into memory and were halved")
    show_errors(console, state, errors)
    if errors.count:
        console.print(f"all of them: {folder / '_errors.jsonl'}", markup=False)
    for line in lines:
        console.print(line, markup=False)
    console.print(f"scores: {folder}", markup=False)


def show_unknown(console: Console, count: int) -> None:
    """Warns of answer tokens that are the tokenizer's unknown token."""
    if count:
        what = "1 answer token is" if count == 1 else f"{count:,} answer tokens are"
        seen = "it says" if count == 1 else "they say"
        console.print(f"warning: {what} unknown to the tokenizer: the model never sees what {seen}")


def show_selection(console: Console, folder: Path, chosen: Selection) -> None:
    """The summary of `vig select`."""
    for line in chosen.figures():
        console.print(line, markup=False)
    console.print(f"selection: {folder}", markup=False)


def show_warnings(console: Console, chosen: Selection) -> None:
    """What a reader of the selection should know."""
    if chosen.unfinished:
        console.print("vig: the scores are not complete, and neither is this selection")
    for line in chosen.warnings:
        console.print(f"warning: {line}", markup=False)


def show_errors(console: Console, state: Progress, errors: ErrorLog) -> None:
    """Says how many samples failed, by reason: which, why, and what helps."""
    for line in errors.lines(SHOWN_REASONS):
        console.print(line, style="red", markup=False)
    if state.failed:
        console.print(f"{state.failed:,} of {state.done:,} samples could not be scored")
    if state.failed_before:
        console.print(
            f"{state.failed_before:,} samples of earlier runs could not be scored; --retry failed tries them again"
        )


def show_estimate(console: Console, estimate: Estimate, errors: ErrorLog) -> None:
    """The summary of `vig score --dry-run`."""
    state = estimate.progress
    console.print(
        f"checked {state.done:,} records: {estimate.multimodal:,} with images, {state.text_only:,} text-only, "
        f"{state.tokens:,} answer tokens, {estimate.model_tokens:,} tokens for the model to read"
    )
    if estimate.tokens_per_second:
        seconds = estimate.model_tokens / estimate.tokens_per_second
        console.print(
            f"estimate: {duration(seconds)} here, at {estimate.tokens_per_second:,.0f} tokens/s measured on "
            f"{estimate.measured:,} samples"
        )
    show_unknown(console, state.unknown)
    show_errors(console, state, errors)
    if errors.path is not None:
        console.print(f"all of them: {errors.path}", markup=False)
    console.print("dry run: nothing was scored")


# --- the same for --json ---

COUNTS = ("done", "resumed", "tokens", "text_only", "failed", "failed_before", "seconds")


def scores_summary(folder: Path, state: Progress, errors: ErrorLog) -> dict[str, Any]:
    counts = {name: getattr(state, name) for name in COUNTS}
    return {"scores": folder, **counts, "unknown_tokens": state.unknown, "errors": errors.summary()}


def estimate_summary(estimate: Estimate, errors: ErrorLog) -> dict[str, Any]:
    counts = {name: getattr(estimate.progress, name) for name in COUNTS}
    speed = {
        name: getattr(estimate, name)
        for name in ("multimodal", "model_tokens", "measured", "tokens_per_second")
    }
    unknown = estimate.progress.unknown
    return {"dry_run": True, **counts, **speed, "unknown_tokens": unknown, "errors": errors.summary()}


def training_summary(result: TrainResult) -> dict[str, Any]:
    counts = (
        "out", "steps", "resumed", "interrupted", "samples", "tokens", "truncated", "kept", "dropped", "broken",
        "left_out", "seconds",
    )  # fmt: skip
    names = ("first_loss", "last_loss", "loss_steps", "eval_loss_before", "eval_loss")
    values = (*(result.loss_ends or (None, None, None)), *result.eval_ends)
    ends = {name: value for name, value in zip(names, values, strict=True) if value is not None}
    return {name: getattr(result, name) for name in counts} | ends | {"errors": result.errors}


def inspection_summary(seen: Inspection, null: NullSettings, picture: Path | None) -> dict[str, Any]:
    row = seen.row
    lists = {
        "token_nll_image": list(map(float, row.token_nll_image)),
        "token_nll_null": None if row.vig is None else list(map(float, row.token_nll_null)),
    }
    about = {
        "key": seen.sample.key,
        "id": seen.sample.id,
        "null": null.kind,
        "answers_from": seen.answers_from,
    }
    lists |= {name: list(map(float, values)) for name, values in row.token_stats.items()}
    about |= {"vig": row.vig, "unknown_tokens": seen.unknown}
    return about | {"tokens": seen.answer, **lists, "picture": picture}


def show_inspection(console: Console, seen: Inspection, null: NullSettings, picture: Path | None) -> None:
    """Prompt with the answer tokens underlined, then each answer token with its numbers."""
    prompt = Text()
    for piece, is_answer in seen.tokens:
        prompt.append(printable(piece), style="bold green underline" if is_answer else "dim")
    console.print(Text(printable(f"{seen.sample.key} (id {seen.sample.id})"), style="bold"))
    console.print(prompt)
    console.print(f"\nanswer tokens (underlined) come from {seen.answers_from}; null image: {null.kind}")
    stats = [one for one in stat_columns(TOKEN_STATS) if one.name in seen.row.token_stats]
    labels = ("NLL image", "NLL null", "VIG") if seen.row.vig is not None else ("NLL",)
    table = Table("token", *labels, *(one.label.replace(" ", "\n") for one in stats))
    nulls = seen.row.token_nll_null if seen.row.vig is not None else [None] * seen.row.n_tokens
    more = list(zip(*(seen.row.token_stats[one.name] for one in stats), strict=True))
    for text, image, blind, beside in zip(
        seen.answer, seen.row.token_nll_image, nulls, more or [()] * seen.row.n_tokens, strict=True
    ):
        numbers = (image, *beside) if blind is None else (image, blind, blind - image, *beside)
        table.add_row(Text(repr(text)[1:-1]), *(f"{number:+.3f}" for number in numbers))
    console.print(table)
    if seen.row.vig is not None:
        console.print(f"sample VIG {seen.row.vig:+.4f} nats over {seen.row.n_tokens} answer tokens")
    show_unknown(console, seen.unknown)
    if picture is not None:
        console.print(f"image and null image as the model sees them: {picture}", markup=False)
