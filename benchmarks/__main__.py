"""`python -m benchmarks [SUITE]`: measure, print, store; `python -m benchmarks report` writes the README's tables."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

SUITES = ("score", "train", "blur", "memory", "peak")
app = typer.Typer(add_completion=False, no_args_is_help=False, rich_markup_mode=None)
WIDE = None if sys.stdout.isatty() else 130  # tables in a log are not squeezed to 80 columns
console = Console(width=WIDE, emoji=False)
log = Console(stderr=True, emoji=False)

Quick = Annotated[
    bool, typer.Option("--quick", help="Small shapes and few rounds: less than a minute a suite.")
]
Threads = Annotated[int | None, typer.Option(help="Threads of every contender. Default: all cores.", min=1)]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder of the JSON results. Quick results are stored only if it is given."),
]


@app.callback(invoke_without_command=True)
def main(context: typer.Context, threads: Threads = None) -> None:
    """Benchmarks of vig_kernels. Without a suite: all CPU suites, quick.

    Exit code 1 where a row of the library is wrong or failed, or a bound is not kept."""
    if threads is not None and context.invoked_subcommand is not None:
        suite = context.invoked_subcommand
        raise typer.BadParameter(
            f"--threads {threads} stands before the suite. Give it behind: {suite} --threads {threads}"
        )
    if context.invoked_subcommand is None:
        broken = [line for suite in SUITES for line in measure(suite, True, threads, None)]
        raise typer.Exit(1 if broken else 0)


def _command(suite: str, text: str) -> None:
    @app.command(suite, help=text)
    def command(quick: Quick = False, threads: Threads = None, out: Out = None) -> None:
        raise typer.Exit(1 if measure(suite, quick, threads, out) else 0)


_command("score", "Per-token log-probabilities on the CPU, against the bare GEMM and the peers.")
_command("train", "Loss and gradients on the CPU, against three bare GEMMs and the peers.")
_command("blur", "Gaussian blur on the CPU, against OpenCV and others.")
_command("memory", "Peak extra memory, each call in a fresh process.")
_command(
    "throughput",
    "Scoring from image files to token values, against a plain loop over full logits: about 15 minutes.",
)
_command(
    "scale",
    "One million samples: write scores, select, report, start. About 4 minutes and 3 GB of temporary files.",
)
_command(
    "trainers", "A training step under HF's and TRL's trainers, stock and with the fused loss: 3 minutes."
)
_command("peak", "Register-only instruction peak of each instruction set.")


@app.command("gpu")
def gpu(
    minutes: Annotated[
        float,
        typer.Option(help="What the run may take, start to end. What does not fit is not measured.", min=0.1),
    ] = 20.0,
    out: Annotated[Path, typer.Option(help="Folder of the result, the steps' logs and lines.")] = Path(
        "gpu-results"
    ),
    rehearse: Annotated[
        bool,
        typer.Option(
            "--rehearse", help="Tiny shapes in Triton's interpreter on a CPU: the script, not the speed."
        ),
    ] = False,
    wheels: Annotated[
        Path | None,
        typer.Option(help="Folder of wheels of the peers, installed for the run without an index."),
    ] = None,
) -> None:
    """Correctness, times and counters on a GPU, what matters most first; without one, the plan."""
    from benchmarks import audit, terminal
    from benchmarks.gpu import plan

    if not rehearse and plan.why_not() is not None:
        plan.show(console)
        return
    path, result = plan.measure(minutes, out, rehearse, wheels, _tell)
    terminal.show_tables(result, console)
    if rehearse:
        console.print(
            "A rehearsal: times, rates and ratios above are of tiny shapes in an interpreter, not of a GPU."
        )
    console.print(f"wrote {path}", markup=False, highlight=False)
    broken = audit.broken(result)
    for line in broken:
        _tell(f"gpu: {line}")
    raise typer.Exit(1 if broken else 0)


@app.command(
    "static",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def static(context: typer.Context) -> None:
    """Compile the Triton kernels for four GPU targets without a GPU, and count: see `static --help`."""
    from benchmarks import static as suite

    raise typer.Exit(suite.main(context.args))


@app.command("evidence")
def evidence(
    seeds: Annotated[
        int,
        typer.Option(
            help="Seeds of the core arms; fewer on slower machines, never fewer arms.", min=1, max=10
        ),
    ] = 10,
    processes: Annotated[int, typer.Option(help="Processes of one thread each.", min=1)] = 2,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the lines. Default: benchmarks/results.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="One run, such as 'shipped/0.75/1100/vig', in this process.")
    ] = None,
    check: Annotated[
        str | None, typer.Option(help="A stored run, to be run again: exit code 1 if its line differs.")
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Only write page and figures from the stored lines.")
    ] = False,
    probes: Annotated[
        bool,
        typer.Option("--probes", help="Only the probes before and after tuning: a few minutes, one process."),
    ] = False,
) -> None:
    """The experiment of docs/evidence.md: 376 trainings, about an hour on 2 cores; the same command goes on.

    Then the page, its figures and the README's block are written from the lines."""
    from benchmarks.evidence import command

    same = True
    try:
        if check is not None:
            same = command.check(check, out, _tell)
        elif only is not None:
            command.run_one(only, out, _tell)
        elif probes:
            command.run_probes(out, seeds, _tell)
        else:
            if not report:
                command.run_experiment(out, seeds, processes, _tell)
            for path in command.write_report(out):
                console.print(f"wrote {path}", markup=False, highlight=False)
    except (ValueError, RuntimeError) as error:
        _tell(f"evidence: {error}")
        raise typer.Exit(1) from None
    raise typer.Exit(0 if same else 1)


@app.command()
def report(
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Change nothing; exit 1 when pages, plots and results differ or are wrong."
        ),
    ] = False,
    readme: Annotated[Path | None, typer.Option(help="Default: README.md of the checkout.")] = None,
    results: Annotated[
        Path | None, typer.Option(help="Folder of JSON results. Default: benchmarks/results.")
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder of the plots. Default: docs/plots.")] = None,
) -> None:
    """Write the README's tables and the plots from the stored results."""
    from benchmarks import report as writer

    paths = writer.Paths.default(readme, results, plots)
    for line in writer.outdated(paths):
        log.print(f"note: {line}", markup=False, highlight=False, soft_wrap=True)
    if check:
        found = writer.disagreements(paths)
        for line in found:
            log.print(line, markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1 if found else 0)
    for path in writer.write(paths):
        console.print(f"wrote {path}", markup=False, highlight=False)


def _tell(text: str) -> None:
    """A line of a log."""
    log.print(text, markup=False, highlight=False, soft_wrap=True)


def measure(suite: str, quick: bool, threads: int | None, out: Path | None) -> list[str]:
    """Run a suite, print it, store it; returns what of the library was wrong, failed or out of bounds."""
    import importlib

    import torch

    from benchmarks import audit, machine, results, terminal

    threads = threads or (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    torch.set_num_threads(threads)
    module = importlib.import_module(f"benchmarks.{suite}")
    keep = not quick or out is not None
    result = machine.header(suite, threads, quick) | {"cases": []}
    with log.status(suite) as status:
        say = (lambda text: status.update(f"{suite}: {text}")) if log.is_terminal else (lambda text: None)
        result["cases"] = module.run(threads, quick, say)
    show = terminal.show_tables if hasattr(module, "tables") else terminal.show
    show(result, console)
    if keep:
        path = results.write(result, out or results.FOLDER)
        console.print(f"wrote {path}", markup=False, highlight=False)
    broken = audit.broken(result)
    for line in broken:
        log.print(f"{suite}: {line}", markup=False, highlight=False, soft_wrap=True, style="red")
    return broken


if __name__ == "__main__":
    sys.exit(app(prog_name="python -m benchmarks"))
