"""The commands: vig inspect | score | select | train | report | compare | plot | demo. No logic lives here.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done but some samples could not be used or are not scored yet,
130 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import json
import math
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
from vig_kernels import backend_table

if TYPE_CHECKING:
    from vig.scoring.scorer import Progress

ADVANCED = {
    "batch_tokens", "batch_size", "workers", "backend", "revision", "attn", "window", "no_share", "engine", "actors",
    "trust_remote_code", "max_length", "end_of_turn", "device", "columns", "roles", "clip", "seed", "stop_tokens",
    "accumulate", "schedule", "warmup", "weight_decay", "max_grad_norm", "z_loss", "freeze", "gradient_checkpointing",
    "processor", "errors", "retry", "shard", "mean", "by", "eval_every", "report_to",
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
Backend = Annotated[str, typer.Option(help=f"Kernels: {backend_table.choices()}.")]


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
    from vig.scoring.scorer import Scorer
    from vig.scoring.settings import ScoreSettings

    if picture.is_dir() or not picture.absolute().parent.is_dir():
        raise typer.BadParameter(f"{picture} is not the name of a file in a folder that is there")
    settings = _usage(
        ScoreSettings, null=null, sigma=sigma, dtype=dtype, device=device, end_of_turn=end_of_turn,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if answer is None or not data.is_file():  # else a photograph
        data = _source(data, split, columns, roles)
    sample = find_sample(data, index=index, key=key, question=question, answer=answer, image_root=image_root)
    with terminal.waiting(err, f"loading {model}"):
        scorer = Scorer(model, **vars(settings))
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
            help="Processes that prefetch samples, and may die of an image. Default: up to 8 beside a GPU, "
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
        from vig.scoring.run import run_dry, run_scoring
        from vig.scoring.scorer import Scorer
        from vig.scoring.settings import RunSpec, ScoreSettings

    part = None if shard is None else _usage(batching.parse_shard, shard)
    settings = _usage(
        ScoreSettings, null=null, sigma=sigma, dtype=dtype, device=device, batch_tokens=batch_tokens,
        batch_size=batch_size, backend=backend, end_of_turn=end_of_turn, max_length=max_length, workers=workers,
        revision=revision, attn=attn, share=not no_share, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    data = _source(data, split, columns, roles)
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
                    estimate = run_dry(scorer, run, on_progress, log)
            else:
                done = run_scoring(scorer, run, folder, on_progress)
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
    by: Annotated[
        str | None, typer.Option(help="source: p within each source, so that none is emptied.")
    ] = None,
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
    from vig.selection.select import Choice
    from vig.selection.select import select as choose

    if clip is not None and not 0 < clip < 1:
        raise typer.BadParameter(f"got {clip}, expected a probability between 0 and 1", param_hint="--clip")
    lowest = None if clip is None else math.log(clip)
    _usage(Choice, p, level, lowest, tau_floor, seed, by, stop_tokens, mean)
    if export is not None:
        _usage(check_export, export)
    with warnings.catch_warnings(), terminal.share(err, "selecting") as on_share:
        warnings.simplefilter("ignore")  # the summary below shows them
        chosen = choose(
            scores[0] if len(scores) == 1 else scores, p, level=level, out=folder, tau_floor=tau_floor,
            clip=lowest, seed=seed, by=by, stop_tokens=stop_tokens, mean=mean, overwrite=overwrite,
            progress=on_share,
        )  # fmt: skip
    exported = None if export is None else export_records(chosen, export, data=data)

    def show() -> None:
        terminal.show_selection(out, folder, chosen)
        if exported is not None:
            out.print(f"{exported:,} records: {export}", markup=False)

    about = {"selection": folder, "export": export, "exported": exported, "warnings": chosen.warnings}
    _summarise(as_json, show, lambda: chosen.metadata["selection"] | about)
    terminal.show_warnings(err, chosen)
    if chosen.unfinished:
        raise typer.Exit(SOME_FAILED)


def _options_of_file(context: typer.Context, path: Path | None) -> Path | None:
    """--config, which is read before the other options."""
    if path is not None:
        from vig.training.config import take_options

        _usage(take_options, context, path)
    return path


@app.command(cls=Command)
def train(
    context: typer.Context,
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
        int, typer.Option(min=0, help="Processes that prefetch samples, and may die of an image.")
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
    eval_data: Annotated[
        Path | None, typer.Option("--eval", help="Held-out data: the loss on all its answer tokens.")
    ] = None,
    eval_every: Annotated[
        int, typer.Option(min=0, help="Steps between two evaluations. 0: only at the end.")
    ] = 0,
    report_to: Annotated[
        list[str] | None, typer.Option(help="tensorboard, trackio or wandb (accelerate's trackers); repeat.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            is_eager=True,
            callback=_options_of_file,
            dir_okay=False,
            help="Take options from this YAML file, such as an earlier checkpoint's train.yaml.",
        ),
    ] = None,
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

    from vig.training.config import write_options
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
            revision=revision, attn=attn, trust_remote_code=trust_remote_code, eval_data=eval_data,
            eval_every=eval_every, report_to=tuple(report_to or ()),
        )  # fmt: skip
    if PartialState().is_main_process:
        write_options(context, folder)
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
    samples: Annotated[int, typer.Option(min=0, help="How many samples to show.")] = 500,
    title: Annotated[str | None, typer.Option(help="Title of the page. Default: the data's name.")] = None,
    budget: Annotated[float, typer.Option(help="Size of the page in MB; pictures shrink to fit.")] = 15.0,
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page: figures, a slider for p, and samples to search, filter and export."""
    from vig.reporting.report import check_budget
    from vig.reporting.report import report as write

    _usage(check_budget, budget)
    terminal.quiet_libraries()
    write(
        scores, page, selection=selection, data=data, processor=_processor(processor), image_root=image_root,
        samples=samples, title=title, budget=budget,
    )  # fmt: skip
    _summarise(as_json, lambda: out.print(f"report: {page}", markup=False), lambda: {"report": page})


@app.command(cls=Command)
def compare(
    a: Annotated[Path, typer.Argument(help="Folder of scores.")],
    b: Annotated[Path, typer.Argument(help="Scores of the same data with other settings.")],
    p: Annotated[float, typer.Option(help="Per cent to keep, at which selections are compared.")] = 70.0,
    page: Annotated[
        Path | None, typer.Option("-o", "--out", help="Also write a page with the samples that moved most.")
    ] = None,
    as_json: Json = False,
    moved: Annotated[int, typer.Option(min=0, help="Samples listed in each direction.")] = 24,
    data: Annotated[Path | None, typer.Option(help="The data, if it is not where it was scored.")] = None,
    image_root: ImageRoot = None,
    title: Annotated[str | None, typer.Option(help="Title of the page. Default: the data's name.")] = None,
    budget: Annotated[float, typer.Option(help="Size of the page in MB; pictures shrink to fit.")] = 15.0,
) -> None:
    """Compare two scorings of one dataset: another model, null image, sigma, checkpoint or dtype."""
    from vig.reporting.report import check_budget
    from vig.selection.compare import check_p
    from vig.selection.compare import compare as run

    _usage(check_p, p)
    _usage(check_budget, budget)
    found = run(a, b, p, moved=moved)
    _summarise(as_json, lambda: out.print("\n".join(found.lines()), markup=False), found.as_dict)
    if page is not None:
        from vig.reporting.compare_page import comparison_page

        terminal.quiet_libraries()
        comparison_page(found, a, b, page, data=data, image_root=image_root, title=title, budget=budget)
        (err if as_json else out).print(f"page: {page}", markup=False)


@app.command(cls=Command)
def plot(
    scores: Annotated[list[Path], typer.Argument(help="Folders of scores.")],
    folder: Annotated[Path, typer.Option("-o", "--out", help="Folder of the figures.")] = Path("figures"),
    selection: Annotated[Path | None, typer.Option(help="Draw this selection's tau.")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Also draw what each p keeps.")] = False,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="png, svg or pdf; repeat. Default: png and svg.")
    ] = None,
    processor: Annotated[
        str | None, typer.Option(help="Checkpoint whose tokenizer to use, if the scores' own has moved.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw the report's figures for papers, as PNG and SVG; needs matplotlib."""
    from vig.reporting.plots import FORMATS, check_formats
    from vig.reporting.plots import plot as draw

    kinds = tuple(formats or FORMATS)
    _usage(check_formats, kinds)
    terminal.quiet_libraries()
    files = draw(
        scores, folder, selection=selection, sweep=sweep, formats=kinds, processor=_processor(processor)
    )
    _summarise(
        as_json,
        lambda: out.print(f"{len(files)} files: {folder}", markup=False),
        lambda: {"figures": folder, "files": files},
    )


def _processor(name: str | None) -> Any:
    if name is None:
        return None
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(name)


@app.command(cls=Command)
def demo(
    folder: Annotated[
        Path, typer.Option("-o", "--out", help="Where to work; an earlier demo there is replaced.")
    ] = Path("demo-output"),
    as_json: Json = False,
) -> None:
    """An end-to-end example, offline: drawn scenes, a tiny model; score, select, train, evaluate, report."""
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


def _usage(check, *values: Any, **named: Any) -> Any:
    """What `check` makes of an option's values; what it refuses is wrong usage, which ends with exit code 2."""
    try:
        return check(*values, **named)
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


def main() -> None:
    """Runs the command line; what a user can mend is one line on stderr and exit code 1, or the error's own."""
    terminal.run_program(app, err, STOPPED)
