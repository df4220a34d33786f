"""vig inspect, vig score."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vig import terminal
from vig.cli.options import (
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
from vig.models.null_image import BLUR_SIGMA
from vig.scoring.record_count import RecordCount
from vig.store.token_stats import TOKEN_STATS

if TYPE_CHECKING:
    from vig.scoring.scorer import Progress


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
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Score a dataset: log-likelihood of every answer token with the image and with its null."""
    if retry not in (None, "failed"):
        raise typer.BadParameter(f"got {retry!r}, expected failed", param_hint="--retry")
    if engine not in ("plain", "ray"):
        raise typer.BadParameter(f"got {engine!r}, expected plain or ray", param_hint="--engine")
    with ExitStack() as ending:
        with terminal.waiting(err, f"starting: {data}, {model}"):  # torch and transformers take seconds
            reading = usage(Reading, split)
            count = ending.enter_context(RecordCount(Source(data, reading), limit))  # by a process of its own

            from vig.scoring import batching
            from vig.scoring.run import run_dry, run_scoring
            from vig.scoring.scorer import Scorer
            from vig.scoring.settings import RunSpec, ScoreSettings

        part = None if shard is None else usage(batching.parse_shard, shard)
        settings = usage(
            ScoreSettings, null=null, sigma=sigma, dtype=dtype, device=device, batch_tokens=batch_tokens,
            batch_size=batch_size, backend=backend, end_of_turn=end_of_turn, max_length=max_length,
            workers=workers, revision=revision, attn=attn, share=not no_share, trust_remote_code=trust_remote_code,
            stats=[name.strip() for name in stats.split(",") if name.strip()],
        )  # fmt: skip
        data = source(data, split, columns, roles)
        run = RunSpec(data, image_root, limit, part, window, retry_failed=retry == "failed")
        run.check_data()  # before a model is loaded
        terminal.quiet_libraries()
        if engine == "ray" and not dry_run:
            from vig.scoring.run_ray import Actors, Job, run_scoring_on_ray

            with terminal.progress(err, "scoring") as on_progress:
                done = run_scoring_on_ray(Job(model, settings, run, str(folder)), Actors(actors), on_progress)
        else:
            with terminal.waiting(err, f"loading {model}"):
                scorer = Scorer(model, **vars(settings))
            with terminal.progress(err, "checking" if dry_run else "scoring") as on_progress:
                if dry_run:
                    with ErrorLog(errors) as log:
                        estimate = run_dry(scorer, run, on_progress, log, count)
                else:
                    done = run_scoring(scorer, run, folder, on_progress, count)
    if dry_run:
        summarise(
            as_json,
            lambda: terminal.show_estimate(out, estimate, log),
            lambda: terminal.estimate_summary(estimate, log),
        )
        if estimate.progress.failed:
            raise typer.Exit(SOME_FAILED)
        return
    _end_scoring(folder, part, done, errors, as_json)


def _end_scoring(
    folder: Path, part: tuple[int, int] | None, done: Progress, errors: Path | None, as_json: bool
) -> None:
    """Shows what was scored; exit code 3 where some samples could not be. errors: a file for them all."""
    from vig.reporting.null_check import check_scores
    from vig.reporting.viewer import Viewer
    from vig.store.errors import stored_errors
    from vig.store.folder import output_folder
    from vig.store.scores import score_metadata

    failed = done.failed or done.failed_before
    with ErrorLog(errors) as log:
        log.extend(stored_errors(output_folder(folder, part)) if failed else ())
    place = output_folder(folder, part)
    check = check_scores(place, Viewer(score_metadata(place)).tokenizer)
    summarise(
        as_json,
        lambda: terminal.show_scores(out, place, done, log, check.lines()),
        lambda: terminal.scores_summary(place, done, log) | {"check": check.as_dict()},
    )
    if failed:
        raise typer.Exit(SOME_FAILED)
