"""vig eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vig import terminal
from vig.cli.options import (
    SOME_FAILED,
    Backend,
    Columns,
    Command,
    Device,
    ImageRoot,
    Json,
    Limit,
    Model,
    RemoteCode,
    Roles,
    Split,
    any_of,
    app,
    err,
    out,
    summarise,
    usage,
)
from vig.data.error_log import ErrorLog
from vig.data.reading import Reading, Source, parse_names
from vig.evaluation.tasks import TASKS, WAYS, rule_lines


@app.command("eval", cls=Command)
def evaluate(
    model: Model,
    data: Annotated[Path, typer.Argument(help="The benchmark's file or folder, in its published form.")],
    task: Annotated[
        str, typer.Option(help="; ".join(f"{task.name}: {task.measures}" for task in TASKS.values()) + ".")
    ],
    folder: Annotated[Path, typer.Option("-o", "--out", help="Folder of predictions and measures.")],
    rule: Annotated[
        str | None,
        typer.Option(help=f"How answers are read. {'; '.join(rule_lines())}. Default: the task's first."),
    ] = None,
    way: Annotated[
        str | None, typer.Option("--by", help=f"For multiple choice: {any_of(WAYS)}. Default: letter.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="What is asked; {question} stands for the record's own. Default: the task's."),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(help="Predictions of another model on the same data: paired tests of every figure."),
    ] = None,
    image_root: ImageRoot = None,
    synonyms: Annotated[
        Path | None,
        typer.Option(help="For chair: one category a line, its synonyms behind it, with commas."),
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option(help="For chair: COCO's captions_*.json. Default: the one beside the instances."),
    ] = None,
    circular: Annotated[
        bool | None,
        typer.Option(
            "--circular/--no-circular",
            help="For choice: ask once a rotation of the options; all must be right. Default: for MMBench's files.",
        ),
    ] = None,
    split: Split = None,
    columns: Columns = None,
    roles: Roles = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer in tokens. Default: the task's.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="auto (bfloat16 on a GPU, as stored elsewhere), float32, bfloat16 or float16.")
    ] = "auto",
    device: Device = None,
    limit: Limit = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check every record, estimate the time.")
    ] = False,
    retry: Annotated[str | None, typer.Option(help='"failed": ask the error rows again.')] = None,
    errors: Annotated[
        Path | None, typer.Option(help="Write all errors here, one JSON object a line; also with --dry-run.")
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Rows x (longest prompt + longest answer) of a batch.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="At most so many rows a batch.")] = None,
    temperature: Annotated[float, typer.Option(help="0 decodes greedily; above, answers are drawn.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the bootstrap, and of drawn answers.")] = 0,
    resamples: Annotated[int, typer.Option(min=1, help="Of the bootstrap over images.")] = 2000,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="Longest prompt and answer in tokens. Default: the model's context."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0, help="Processes that prefetch. Default: up to 8 beside a GPU, none beside a CPU."
        ),
    ] = None,
    backend: Backend = "auto",
    revision: Annotated[str | None, typer.Option(help="Revision of a model on the hub.")] = None,
    attn: Annotated[str | None, typer.Option(help="Attention implementation, such as sdpa.")] = None,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Answer a benchmark and measure: figures with 95 % intervals, paired tests against a baseline."""
    if retry not in (None, "failed"):
        raise typer.BadParameter(f"got {retry!r}, expected failed", param_hint="--retry")
    if task not in TASKS:
        raise typer.BadParameter(f"got {task!r}, expected {any_of(TASKS)}", param_hint="--task")
    names = [
        usage(parse_names, given or (), option)
        for given, option in ((columns, "--columns"), (roles, "--roles"))
    ]
    source = Source(data, usage(Reading, split, *names))
    with terminal.waiting(err, f"starting: {data}, {model}"):  # torch and transformers take seconds
        from vig.evaluation.settings import BATCH_TOKENS, AnswerSettings, EvalSpec

        spec = usage(
            EvalSpec, task, source, way=way, rule=rule, prompt=prompt, image_root=image_root, limit=limit,
            synonyms=synonyms, captions=captions, rotate=circular, resamples=resamples, seed=seed,
        )  # fmt: skip
        answers = usage(
            AnswerSettings, dtype=dtype, device=device, batch_tokens=batch_tokens or BATCH_TOKENS,
            batch_size=batch_size, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
            max_length=max_length, workers=workers, backend=backend, revision=revision, attn=attn,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        terminal.quiet_libraries()
    if dry_run:
        _dry_run(model, spec, answers, errors, as_json)
        return
    from vig.evaluation.run import EvalRun
    from vig.evaluation.show import show_evaluation, summary

    with EvalRun(model, spec, answers, folder, retry == "failed", baseline) as run:
        if run.pending:
            with terminal.waiting(err, f"loading {model}"):
                run.load()
            with terminal.progress(err, "answering") as on_progress:
                run.answer(on_progress)
        done = run.finish()

    summarise(as_json, lambda: show_evaluation(out, done), lambda: summary(done))
    if errors is not None:
        _write_errors(errors, folder)
    if done.errors.count:
        raise typer.Exit(SOME_FAILED)


def _write_errors(path: Path, folder: Path) -> None:
    from vig.evaluation.folder import read_predictions

    with ErrorLog(path) as log:
        rows = (row for row in read_predictions(folder) if "error" in row)
        log.extend((row["key"], row["id"], row["error"]) for row in rows)


def _dry_run(model: str, spec: Any, answers: Any, errors: Path | None, as_json: bool) -> None:
    from vig.evaluation.dry_run import dry_run
    from vig.evaluation.show import show_estimate

    with ErrorLog(errors) as log, terminal.progress(err, "checking") as on_progress:
        estimate = dry_run(model, spec, answers, on_progress, log)
    summarise(
        as_json,
        lambda: show_estimate(out, estimate, log),
        lambda: {"dry_run": True, **estimate.summary(), "errors": log.summary()},
    )
    if log.count:
        raise typer.Exit(SOME_FAILED)
