"""vig inspect, vig score."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vig import terminal
from vig.cli.options import (
    NOBODY,
    SOME_FAILED,
    Backend,
    Columns,
    Command,
    Data,
    Device,
    Dtype,
    EndOfTurn,
    ImageRoot,
    Json,
    Limit,
    MaxLength,
    Model,
    Null,
    RemoteCode,
    Roles,
    Sigma,
    Split,
    any_of,
    app,
    err,
    out,
    source,
    summarise,
    usage,
)
from vig.data.error_log import ErrorLog
from vig.data.reading import Reading, Source
from vig.models.launch import Launch
from vig.models.null_image import BLUR_SIGMA
from vig.scoring.record_count import RecordCount
from vig.store.folder import output_folder, shards_in
from vig.store.token_stats import TOKEN_STATS

if TYPE_CHECKING:
    from vig.scoring.run import Estimate
    from vig.scoring.scorer import Progress
    from vig.scoring.settings import RunSpec


@app.command(cls=Command)
def inspect(
    model: Model,
    data: Data,
    index: Annotated[int, typer.Option(min=0, help="Which record.")] = 0,
    key: Annotated[str | None, typer.Option(help="Which record, by its key (file.json#17).")] = None,
    question: Annotated[str | None, typer.Option(help="With a photograph as DATA: the question.")] = None,
    answer: Annotated[
        str | None, typer.Option(help="With a photograph as DATA: the answer to score.")
    ] = None,
    image_root: ImageRoot = None,
    split: Split = None,
    columns: Columns = None,
    roles: Roles = None,
    null: Null = "blur",
    sigma: Sigma = BLUR_SIGMA,
    dtype: Dtype = "auto",
    device: Device = None,
    end_of_turn: EndOfTurn = None,
    picture: Annotated[Path, typer.Option("-o", "--out", help="PNG of image and null image.")] = Path(
        "inspect.png"
    ),
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Show what the model sees of one sample: prompt, answer mask, image, null image, VIG of each token."""
    from vig.scoring.inspect import find_sample, sheet, window_of
    from vig.scoring.inspect import inspect as look
    from vig.scoring.scorer import Scorer
    from vig.scoring.settings import ScoreSettings

    if picture.is_dir() or not picture.absolute().parent.is_dir():
        raise typer.BadParameter(f"{picture} is not the name of a file in a folder that is there")
    settings = usage(
        ScoreSettings, null=null, sigma=sigma, dtype=dtype, device=device, end_of_turn=end_of_turn,
        trust_remote_code=trust_remote_code, stats=tuple(TOKEN_STATS),
    )  # fmt: skip
    if answer is None or not data.is_file():  # else a photograph
        data = source(data, split, columns, roles)
    sample = find_sample(data, index=index, key=key, question=question, answer=answer, image_root=image_root)
    with terminal.waiting(err, f"loading {model}"):
        scorer = Scorer(model, **vars(settings))
    others = window_of(data, sample, image_root=image_root) if scorer.null.stage == "image" else None
    seen = look(scorer, sample, others)
    if seen.images:
        sheet(seen.images, seen.nulls).save(picture, "PNG")
    shown = picture if seen.images else None
    summarise(
        as_json,
        lambda: terminal.show_inspection(out, seen, scorer.null, shown),
        lambda: terminal.inspection_summary(seen, scorer.null, shown),
    )


@app.command(cls=Command)
def score(
    model: Model,
    data: Data,
    folder: Annotated[Path, typer.Option("-o", "--out", help="Folder of the scores. Run again to resume.")],
    image_root: ImageRoot = None,
    split: Split = None,
    columns: Columns = None,
    roles: Roles = None,
    null: Null = "blur",
    sigma: Sigma = BLUR_SIGMA,
    dtype: Dtype = "auto",
    device: Device = None,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Largest batch, in tokens: rows x longest row.")
    ] = 8192,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Largest batch, in rows.")] = None,
    limit: Limit = None,
    shard: Annotated[str | None, typer.Option(help="i/n: job i of n, counted from 0.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check every record, estimate the time.")
    ] = False,
    retry: Annotated[str | None, typer.Option(help='"failed": score the error rows again.')] = None,
    errors: Annotated[
        Path | None,
        typer.Option(help="Write all errors to this file, one JSON object per line; also with --dry-run."),
    ] = None,
    end_of_turn: EndOfTurn = None,
    max_length: MaxLength = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Processes that prefetch samples; an image that crashes its decoder kills one of them, not the run. "
            "Default: up to 8 with a GPU, none on a CPU.",
        ),
    ] = None,
    backend: Backend = "auto",
    revision: Annotated[str | None, typer.Option(help="Revision of a model on the hub.")] = None,
    attn: Annotated[str | None, typer.Option(help="Attention implementation, such as sdpa.")] = None,
    window: Annotated[int, typer.Option(min=1, help="Records per file of the output.")] = 8192,
    no_share: Annotated[
        bool,
        typer.Option("--no-share", help="Compute every sample alone, even with the same images and prompt."),
    ] = False,
    stats: Annotated[
        str,
        typer.Option(
            help=f"Also store {any_of(TOKEN_STATS)} of each answer token, from the same sweep; both: kl,entropy."
        ),
    ] = "",
    engine: Annotated[str, typer.Option(help="plain, or ray: actors on a Ray cluster.")] = "plain",
    actors: Annotated[
        int | None, typer.Option(min=1, help="With --engine ray: how many. Default: one per GPU.")
    ] = None,
    tensor_parallel_size: Annotated[
        int,
        typer.Option(
            min=1,
            help="Processes of torchrun that hold one model together, for a model larger than one GPU.",
        ),
    ] = 1,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Score a dataset: log-likelihood of every answer token with the image and with its null.

    `torchrun --nproc-per-node 8 -m vig score ...` scores with eight GPUs: the windows are divided among the models.
    """
    if retry not in (None, "failed"):
        raise typer.BadParameter(f"got {retry!r}, expected failed", param_hint="--retry")
    if engine not in ("plain", "ray"):
        raise typer.BadParameter(f"got {engine!r}, expected plain or ray", param_hint="--engine")
    launch = usage(Launch.here, tensor_parallel_size)
    _check_launch(launch, engine, device, errors)
    told = err if launch.is_first else NOBODY
    with ExitStack() as ending:
        with terminal.waiting(told, f"starting: {data}, {model}"):  # torch and transformers take seconds
            reading, count = usage(Reading, split), None
            if launch.is_first:  # by a process of its own
                count = ending.enter_context(RecordCount(Source(data, reading), limit))

            from vig.scoring import batching
            from vig.scoring.run import run_dry, run_scoring
            from vig.scoring.scorer import Scorer
            from vig.scoring.settings import RunSpec, ScoreSettings

        part = launch.shard(None if shard is None else usage(batching.parse_shard, shard))
        settings = usage(
            ScoreSettings, null=null, sigma=sigma, dtype=dtype, device=device, batch_tokens=batch_tokens,
            batch_size=batch_size, backend=backend, end_of_turn=end_of_turn, max_length=max_length,
            workers=workers, revision=revision, attn=attn, share=not no_share, trust_remote_code=trust_remote_code,
            stats=[name.strip() for name in stats.split(",") if name.strip()],
            tensor_parallel_size=tensor_parallel_size,
        )  # fmt: skip
        if launch.world > 1 and launch.size == 1:
            settings = replace(settings, device=launch.device())
        data = source(data, split, columns, roles)
        run = RunSpec(data, image_root, limit, part, window, retry_failed=retry == "failed")
        run.check_data()  # before a model is loaded
        terminal.quiet_libraries()
        bar = err if launch.rank == 0 else NOBODY  # several models share one terminal
        if engine == "ray" and not dry_run:
            from vig.scoring.run_ray import Actors, Job, run_scoring_on_ray

            with terminal.progress(err, "scoring") as on_progress:
                done = run_scoring_on_ray(Job(model, settings, run, str(folder)), Actors(actors), on_progress)
        else:
            with terminal.waiting(told, f"loading {model}"):
                scorer = Scorer(model, **vars(settings))
            with terminal.progress(bar, "checking" if dry_run else "scoring") as on_progress:
                if dry_run:
                    with ErrorLog(errors) as log:
                        estimate = run_dry(scorer, run, on_progress, log, count)
                else:
                    done = run_scoring(scorer, run, folder, on_progress, count)
    failed = False
    if launch.is_first:
        failed = (
            _end_dry_run(estimate, log, as_json) if dry_run
            else _end_scoring(output_folder(folder, part), run, done, errors, as_json)
        )  # fmt: skip
    launch.end()
    if failed:
        raise typer.Exit(SOME_FAILED)


def _check_launch(launch: Launch, engine: str, device: str | None, errors: Path | None) -> None:
    """Raises BadParameter for options that mean nothing for processes of torchrun."""
    if launch.world == 1:
        return
    if engine == "ray":
        raise typer.BadParameter(
            f"ray starts its actors itself, but torchrun started {launch.world} processes. Leave one of them out",
            param_hint="--engine",
        )
    if device is not None:
        raise typer.BadParameter(
            f"got {device!r}, but each process of torchrun takes the GPU of its local rank. Leave it out",
            param_hint="--device",
        )
    if errors is not None and launch.groups > 1:
        raise typer.BadParameter(
            f"{launch.groups} models would write {errors}. Read _errors.jsonl in the folder of each part",
            param_hint="--errors",
        )


def _end_dry_run(estimate: Estimate, log: ErrorLog, as_json: bool) -> bool:
    """Shows what was found; whether some samples could not be scored."""
    summarise(
        as_json,
        lambda: terminal.show_estimate(out, estimate, log),
        lambda: terminal.estimate_summary(estimate, log),
    )
    return bool(estimate.progress.failed)


def _end_scoring(place: Path, run: RunSpec, done: Progress, errors: Path | None, as_json: bool) -> bool:
    """Shows what was scored into `place`; whether some samples could not be. errors: a file for them all."""
    from vig.reporting.null_check import NOTHING, check_scores
    from vig.reporting.viewer import Viewer
    from vig.store.errors import stored_errors
    from vig.store.scores import score_metadata

    failed = bool(done.failed or done.failed_before)
    with ErrorLog(errors) as log:
        log.extend(stored_errors(place) if failed else ())
    if shards_in(place):
        check, notes = check_scores(place, Viewer(score_metadata(place)).tokenizer), []
    else:  # of more jobs than windows
        check, notes = NOTHING, [run.about_no_window()]
    summarise(
        as_json,
        lambda: terminal.show_scores(out, place, done, log, [*notes, *check.lines()]),
        lambda: terminal.scores_summary(place, done, log) | {"check": check.as_dict(), "notes": notes},
    )
    return failed
