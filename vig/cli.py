"""The commands: vig inspect | score | select | train | report | demo. No logic lives here.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done but some samples could not be used or are not scored yet,
130 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import faulthandler
import io
import json
import math
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

import vig
from vig import terminal
from vig.data.error_log import ErrorLog
from vig.data.formats import expected
from vig.data.reading import Reading, Source, parse_names
from vig.models.end_of_turn import DEFAULT, END_OF_TURN
from vig.models.families import FAMILIES
from vig.models.null_image import BLUR_SIGMA, NULLS

if TYPE_CHECKING:
    from vig.scoring.scorer import Progress

ADVANCED = {
    "batch_tokens", "batch_size", "workers", "backend", "revision", "attn", "window", "no_share", "engine", "actors",
    "trust_remote_code", "max_length", "end_of_turn", "device", "columns", "roles", "clip", "seed", "stop_tokens",
    "accumulate", "schedule", "warmup", "weight_decay", "max_grad_norm", "z_loss", "freeze", "gradient_checkpointing",
    "processor", "errors", "retry", "shard", "mean",
}  # fmt: skip


def _summarise(as_json: bool, show: Callable[[], None], summary: Callable[[], dict[str, Any]]) -> None:
    """Shows what a command did, or prints its summary as one JSON object."""
    if as_json:
        out.print(json.dumps(summary(), ensure_ascii=False, default=str), markup=False, highlight=False)
    else:
        show()


class Command(TyperCommand):
    """A command whose help has the common options first, and the rest under "Advanced"."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        for parameter in self.params:
            if parameter.name in ADVANCED:
                parameter.rich_help_panel = "Advanced"


app = typer.Typer(
    help="Visual Information Gain: score, select, train, look. Source: arXiv 2602.17186.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

SOME_FAILED = 3
STOPPED = 130  # by Ctrl-C, as shells count it, or by a scheduler's SIGTERM
BACKENDS = ("triton", "cpu", "torch", "reference")  # vig_kernels.dispatch's, which imports torch


def _any_of(names: Iterable[str]) -> str:
    """\"a, b or c\""""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


Model = Annotated[
    str,
    typer.Argument(
        help="Checkpoint folder, or a name on the hub (downloads it), of one of these families: "
        f"{', '.join(family.name for family in FAMILIES.values())}."
    ),
]
Data = Annotated[Path, typer.Argument(help=f"Instruction data: {expected()}.")]
ImageRoot = Annotated[
    Path | None, typer.Option(help="Folder that image paths start from. Default: the data's own.")
]
Split = Annotated[
    str | None, typer.Option(help="Which split, of a folder that holds several: train, test, ...")
]
Columns = Annotated[
    list[str] | None,
    typer.Option(help="Columns of other names: messages=conv,images=pics; ignore=mask leaves one out."),
]
Roles = Annotated[list[str] | None, typer.Option(help="Roles of other names: assistant=helper,user=client.")]
Null = Annotated[str, typer.Option(help=f"Null image: {_any_of(NULLS)}.")]
Sigma = Annotated[float, typer.Option(help="Blur's sigma, a fraction of the picture's shorter side.")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")]
Device = Annotated[
    str | None, typer.Option(help="cuda, cuda:1, cpu, ... Default: the GPU where there is one.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Read only the first so many records.")]
EndOfTurn = Annotated[
    str | None,
    typer.Option(
        help=f"End-of-turn tokens in the answers: {_any_of(END_OF_TURN)}. Default: {DEFAULT}, or as the folder has it."
    ),
]
MaxLength = Annotated[
    int | None, typer.Option(min=2, help="Longest sequence in tokens. Default: the model's context.")
]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")]
Backend = Annotated[str, typer.Option(help=f"Kernels: {_any_of(('auto', *BACKENDS))}.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        out.print(f"vig-kernels {vig.__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version.")
    ] = False,
) -> None:
    pass


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
    from vig.scoring.scorer import Scorer, check_settings

    if picture.is_dir() or not picture.absolute().parent.is_dir():
        raise typer.BadParameter(f"{picture} is not the name of a file in a folder that is there")
    _usage(check_settings, null, sigma, dtype, "auto", end_of_turn or DEFAULT, device)
    if answer is None:  # else it may be a photograph
        data = _source(data, split, columns, roles)
    sample = find_sample(data, index=index, key=key, question=question, answer=answer, image_root=image_root)
    with terminal.waiting(err, f"loading {model}"):
        scorer = Scorer(
            model, null=null, sigma=sigma, dtype=dtype, device=device, end_of_turn=end_of_turn,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    others = window_of(data, sample, image_root=image_root) if scorer.null.stage == "image" else None
    seen = look(scorer, sample, others)
    if seen.images:
        sheet(seen.images, seen.nulls).save(picture, "PNG")
    shown = picture if seen.images else None
    _summarise(
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
    batch_tokens: Annotated[int, typer.Option(min=1, help="Rows x longest row of a batch.")] = 8192,
    batch_size: Annotated[int | None, typer.Option(min=1, help="At most so many rows a batch.")] = None,
    limit: Limit = None,
    shard: Annotated[str | None, typer.Option(help="i/n: the i-th of n jobs, counted from 0.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check every record, estimate the time.")
    ] = False,
    retry: Annotated[str | None, typer.Option(help='"failed": score the error rows again.')] = None,
    errors: Annotated[
        Path | None, typer.Option(help="Write all errors here, one JSON object a line; also with --dry-run.")
    ] = None,
    end_of_turn: EndOfTurn = None,
    max_length: MaxLength = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Processes that decode and tokenise ahead, and may die of an image. Default: up to 8 beside a GPU, "
            "none beside a CPU.",
        ),
    ] = None,
    backend: Backend = "auto",
    revision: Annotated[str | None, typer.Option(help="Revision of a model on the hub.")] = None,
    attn: Annotated[str | None, typer.Option(help="Attention implementation, such as sdpa.")] = None,
    window: Annotated[int, typer.Option(min=1, help="Records a shard of the output.")] = 8192,
    no_share: Annotated[
        bool,
        typer.Option("--no-share", help="Compute every sample alone, even with the same images and prompt."),
    ] = False,
    engine: Annotated[str, typer.Option(help="plain, or ray: actors on a Ray cluster.")] = "plain",
    actors: Annotated[
        int | None, typer.Option(min=1, help="With --engine ray: how many. Default: one a GPU.")
    ] = None,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Score a dataset: log-likelihood of every answer token with the image and with its null."""
    if retry not in (None, "failed"):
        raise typer.BadParameter(f"got {retry!r}, expected failed", param_hint="--retry")
    if engine not in ("plain", "ray"):
        raise typer.BadParameter(f"got {engine!r}, expected plain or ray", param_hint="--engine")
    with terminal.waiting(err, f"starting: {data}, {model}"):  # torch and transformers take seconds
        from vig.scoring import batching
        from vig.scoring.run import check_data, dry_run_dataset, score_dataset
        from vig.scoring.scorer import Scorer, check_settings

    part = None if shard is None else _usage(batching.parse_shard, shard)
    _usage(check_settings, null, sigma, dtype, backend, end_of_turn or DEFAULT, device)
    data = _source(data, split, columns, roles)
    check_data(data, image_root)  # before a model is loaded
    terminal.quiet_libraries()
    options = {
        "null": null,
        "sigma": sigma,
        "dtype": dtype,
        "device": device,
        "batch_tokens": batch_tokens,
        "batch_size": batch_size,
        "backend": backend,
        "end_of_turn": end_of_turn,
        "max_length": max_length,
        "workers": workers,
        "revision": revision,
        "attn": attn,
        "share": not no_share,
        "trust_remote_code": trust_remote_code,
    }
    run = {
        "image_root": image_root,
        "limit": limit,
        "shard": part,
        "retry_failed": retry == "failed",
        "window": window,
    }
    if engine == "ray" and not dry_run:
        from vig.scoring.run_ray import score_dataset_on_ray

        with terminal.progress(err, "scoring") as on_progress:
            done = score_dataset_on_ray(
                model, data, folder, options=options, actors=actors, on_progress=on_progress, **run
            )
        _end_scoring(folder, part, done, errors, as_json)
        return
    with terminal.waiting(err, f"loading {model}"):
        scorer = Scorer(model, **options)
    with terminal.progress(err, "checking" if dry_run else "scoring") as on_progress:
        if dry_run:
            with ErrorLog(errors) as log:
                estimate = dry_run_dataset(
                    scorer, data, image_root=image_root, limit=limit, shard=part, window=window,
                    on_progress=on_progress, errors=log,
                )  # fmt: skip
        else:
            done = score_dataset(scorer, data, folder, on_progress=on_progress, **run)
    if dry_run:
        _summarise(
            as_json,
            lambda: terminal.show_estimate(out, estimate, log),
            lambda: terminal.estimate_summary(estimate, log),
        )
        if estimate.progress.failed:
            raise typer.Exit(SOME_FAILED)
        return
    _end_scoring(folder, part, done, errors, as_json)


@app.command(cls=Command)
def select(
    scores: Annotated[list[Path], typer.Argument(help="Folders of scores.")],
    folder: Annotated[Path, typer.Option("-o", "--out", help="Folder of the selection.")],
    p: Annotated[float, typer.Option(help="Per cent of the multimodal samples to keep.")] = 70.0,
    level: Annotated[str, typer.Option(help="both, sample, token or random.")] = "both",
    clip: Annotated[
        float | None, typer.Option(help="Smallest probability either pass counts with, such as 0.01.")
    ] = None,
    tau_floor: Annotated[float | None, typer.Option(help="Lowest tau, in nats.")] = None,
    seed: Annotated[int, typer.Option(help="For level random.")] = 0,
    stop_tokens: Annotated[
        str,
        typer.Option(
            help="End-of-turn tokens of kept samples: keep, or select by VIG as the paper's rule does."
        ),
    ] = "keep",
    mean: Annotated[
        str,
        typer.Option(help="Sample VIG over all answer tokens, or over content: without end-of-turn tokens."),
    ] = "all",
    export: Annotated[
        Path | None,
        typer.Option(
            help="Also write the kept records as they are in the data, to this .json or .jsonl file."
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="With --export: the data, if it is not where it was scored.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a selection made with other settings.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Choose samples and tokens from scores; no model is needed. Exit code 3: the scores are not complete."""
    import warnings

    from vig.selection.export import check_export, export_records
    from vig.selection.select import check_choice
    from vig.selection.select import select as choose
    from vig.selection.stop_tokens import Stops

    if clip is not None and not 0 < clip < 1:
        raise typer.BadParameter(f"got {clip}, expected a probability between 0 and 1", param_hint="--clip")
    lowest = None if clip is None else math.log(clip)
    _usage(check_choice, p, level, lowest, tau_floor, seed)
    _usage(Stops.of, {"stop_ids": []}, stop_tokens, mean)
    if export is not None:
        _usage(check_export, export)
    with warnings.catch_warnings(), terminal.share(err, "selecting") as on_share:
        warnings.simplefilter("ignore")  # the summary below shows them
        chosen = choose(
            scores[0] if len(scores) == 1 else scores, p, level=level, out=folder, tau_floor=tau_floor,
            clip=lowest, seed=seed, stop_tokens=stop_tokens, mean=mean, overwrite=overwrite, progress=on_share,
        )  # fmt: skip
    exported = None if export is None else export_records(chosen, export, data=data)

    def show() -> None:
        for line in chosen.figures():
            out.print(line, markup=False)
        out.print(f"selection: {folder}", markup=False)
        if exported is not None:
            out.print(f"{exported:,} records: {export}", markup=False)

    about = {"selection": folder, "export": export, "exported": exported, "warnings": chosen.warnings}
    _summarise(as_json, show, lambda: chosen.metadata["selection"] | about)
    if chosen.unfinished:
        err.print("vig: the scores are not complete, and neither is this selection")
    for line in chosen.warnings:
        err.print(f"warning: {line}", markup=False)
    if chosen.unfinished:
        raise typer.Exit(SOME_FAILED)


@app.command(cls=Command)
def train(
    model: Model,
    data: Data,
    folder: Annotated[Path, typer.Option("-o", "--out", help="Folder of the trained checkpoint.")],
    selection: Annotated[
        Path | None, typer.Option(help="Folder of the selection. Without: all tokens.")
    ] = None,
    image_root: ImageRoot = None,
    split: Split = None,
    columns: Columns = None,
    roles: Roles = None,
    epochs: Annotated[float, typer.Option(help="Passes over the kept samples, more than 0.")] = 1.0,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Stop after so many steps.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples a micro-batch.")] = 8,
    accumulate: Annotated[int, typer.Option(min=1, help="Micro-batches a step.")] = 1,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-5,
    schedule: Annotated[
        str, typer.Option(help="cosine, linear, constant, constant_with_warmup, ...")
    ] = "cosine",
    warmup: Annotated[float, typer.Option(help="Share of the steps, 0 to 1.")] = 0.03,
    weight_decay: Annotated[float, typer.Option()] = 0.0,
    max_grad_norm: Annotated[float, typer.Option()] = 1.0,
    z_loss: Annotated[float, typer.Option(help="Weight of lse^2.")] = 0.0,
    freeze: Annotated[
        list[str] | None,
        typer.Option(
            help="Pattern of frozen parameters; repeat. Default: the vision tower. none: nothing is frozen."
        ),
    ] = None,
    lora_rank: Annotated[int, typer.Option(min=0, help="Train LoRA adapters of this rank (needs peft).")] = 0,
    dtype: Annotated[
        str,
        typer.Option(
            help="Of the forward: bfloat16 (autocast over float32 weights), float32, or auto by the device."
        ),
    ] = "auto",
    device: Device = None,
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing")] = False,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes that decode and tokenise ahead, and may die of an image.")
    ] = 0,
    end_of_turn: Annotated[
        str | None, typer.Option(help=f"{_any_of(END_OF_TURN)}. Default: as the selection was scored.")
    ] = None,
    max_length: MaxLength = None,
    seed: Annotated[int, typer.Option()] = 0,
    limit: Limit = None,
    save_every: Annotated[
        int,
        typer.Option(min=0, help="Steps between two checkpoints; run again to resume. 0: only the end."),
    ] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a checkpoint in the folder, resume none.")
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option(
            help="Revision of a model on the hub. Default: the one that the selection was scored at."
        ),
    ] = None,
    attn: Annotated[str | None, typer.Option(help="Attention implementation, such as sdpa.")] = None,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Train on the selected tokens of the selected samples, with the fused masked loss.

    `torchrun --nproc-per-node 8 -m vig train ...` trains on eight GPUs.
    """
    from accelerate import PartialState

    from vig.training.train import train as run

    if split or columns or roles:  # else as the selection was scored
        data = _source(data, split, columns, roles)
    terminal.quiet_libraries()
    with terminal.training(err) as on_progress:
        result = run(
            model, data, selection, folder, image_root=image_root, limit=limit, overwrite=overwrite,
            on_progress=on_progress, epochs=epochs, max_steps=max_steps, batch_size=batch_size,
            accumulate=accumulate, lr=lr, schedule=schedule, warmup=warmup, weight_decay=weight_decay,
            max_grad_norm=max_grad_norm, z_loss=z_loss, freeze=tuple(freeze) if freeze else None, lora_rank=lora_rank,
            dtype=dtype, end_of_turn=end_of_turn, max_length=max_length, seed=seed,
            gradient_checkpointing=gradient_checkpointing, workers=workers, save_every=save_every, device=device,
            revision=revision, attn=attn, trust_remote_code=trust_remote_code,
        )  # fmt: skip
    if PartialState().is_main_process:
        _summarise(
            as_json, lambda: terminal.show_training(out, result), lambda: terminal.training_summary(result)
        )
    if result.interrupted:
        raise typer.Exit(STOPPED)
    if result.errors:
        raise typer.Exit(SOME_FAILED)


@app.command(cls=Command)
def report(
    scores: Annotated[list[Path], typer.Argument(help="Folders of scores.")],
    page: Annotated[Path, typer.Option("-o", "--out", help="The HTML file to write.")] = Path("report.html"),
    selection: Annotated[Path | None, typer.Option(help="Mark what this selection keeps.")] = None,
    data: Annotated[Path | None, typer.Option(help="The data, if it is not where it was scored.")] = None,
    processor: Annotated[
        str | None, typer.Option(help="Checkpoint whose tokenizer to use, if the scores' own has moved.")
    ] = None,
    image_root: ImageRoot = None,
    samples: Annotated[int, typer.Option(min=0, help="How many samples to show.")] = 24,
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page: image, null image, and each answer token coloured by its VIG."""
    from transformers import AutoProcessor

    from vig.reporting.report import report as write

    terminal.quiet_libraries()
    given = None if processor is None else AutoProcessor.from_pretrained(processor)
    write(
        scores,
        page,
        selection=selection,
        data=data,
        processor=given,
        image_root=image_root,
        samples=samples,
    )
    _summarise(as_json, lambda: out.print(f"report: {page}", markup=False), lambda: {"report": page})


@app.command(cls=Command)
def demo(
    folder: Annotated[
        Path, typer.Option("-o", "--out", help="Where to work; an earlier demo there is replaced.")
    ] = Path("demo-output"),
    as_json: Json = False,
) -> None:
    """The whole road in miniature, offline: drawn scenes, a tiny model, score, select, train, examine, report."""
    from vig.demo.run import demo as run

    terminal.quiet_libraries()
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        figures = run(folder, console=out, command=lambda words: app(words, standalone_mode=False))
    if as_json:
        out.print(json.dumps(figures), markup=False)


def _source(data: Path, split: str | None, columns: list[str] | None, roles: list[str] | None) -> Source:
    """The data and how they are read; says which files of a folder are not."""
    from vig.data.locate import locate

    names = [
        _usage(parse_names, given or (), option)
        for given, option in ((columns, "--columns"), (roles, "--roles"))
    ]
    source = Source(data, _usage(Reading, split, *names))
    about = locate(data, split).about_unread()
    if about is not None:
        err.print(f"note: {about}", markup=False)
    return source


def _usage(check, *values: Any) -> Any:
    """What `check` makes of an option's values; what it refuses is wrong usage, which ends with exit code 2."""
    try:
        return check(*values)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _end_scoring(
    folder: Path, part: tuple[int, int] | None, done: Progress, errors: Path | None, as_json: bool
) -> None:
    """Shows what was scored; exit code 3 where some samples could not be. errors: a file for them all."""
    from vig.store.errors import stored_errors
    from vig.store.folder import output_folder

    failed = done.failed or done.failed_before
    with ErrorLog(errors) as log:
        log.extend(stored_errors(output_folder(folder, part)) if failed else ())
    place = output_folder(folder, part)
    _summarise(
        as_json,
        lambda: terminal.show_scores(out, place, done, log),
        lambda: terminal.scores_summary(place, done, log),
    )
    if failed:
        raise typer.Exit(SOME_FAILED)


def _stopped(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Runs the command line; what a user can mend is one line on stderr and exit code 1, or the error's own."""
    if sys.platform == "win32":
        err.print("vig: Windows is not supported. Use Linux, or WSL")
        sys.exit(1)
    signal.signal(signal.SIGTERM, _stopped)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that a terminal cannot show ends no run
    if sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__)  # says where native code crashed
    try:
        app()
    except SystemExit as end:
        if end.code == STOPPED:  # what typer makes of Ctrl-C
            err.print("vig: stopped. What is finished is kept, and the same command goes on from there")
        raise
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if terminal.wants_traceback():
            raise
        err.print(f"[bold red]vig: {type(error).__name__}:[/] ", end="")
        err.print(str(error), markup=False)
        sys.exit(getattr(error, "exit_code", 1))
