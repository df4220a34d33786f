"""What the commands share: the program, its consoles and exit codes, options, and how a command ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

import vig
from vig.data.formats import expected
from vig.data.reading import Reading, Source, parse_names
from vig.models.end_of_turn import DEFAULT, END_OF_TURN
from vig.models.families import FAMILIES
from vig.models.null_image import NULLS
from vig_kernels import backend_table

ADVANCED = {
    "batch_tokens", "batch_size", "workers", "backend", "revision", "attn", "window", "no_share", "engine", "actors",
    "trust_remote_code", "max_length", "end_of_turn", "device", "columns", "roles", "clip", "seed", "stop_tokens",
    "accumulate", "schedule", "warmup", "weight_decay", "max_grad_norm", "z_loss", "freeze", "gradient_checkpointing",
    "processor", "errors", "retry", "shard", "mean", "by", "stats", "eval_every", "report_to",
    "keep_easy", "temperature", "resamples", "statement", "judge", "max_new_tokens", "near_zero", "lmms_model",
    "model_args", "tensor_parallel_size", "fsdp",
}  # fmt: skip


ORDER = (
    "inspect", "score", "select", "train", "eval", "probe", "mmhal", "lmms-eval", "report", "compare", "plot", "card",
    "demo",
)  # fmt: skip


class Command(TyperCommand):
    """A command whose help has the common options first, and the rest under "Advanced"."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        for parameter in self.params:
            if parameter.name in ADVANCED:
                parameter.rich_help_panel = "Advanced"


class Program(TyperGroup):
    """Lists the commands in the order of the work, whatever the order of their modules."""

    def list_commands(self, context: typer.Context) -> list[str]:
        return sorted(super().list_commands(context), key=ORDER.index)


app = typer.Typer(
    cls=Program,
    help="Visual Information Gain: score, select, train, look. Source: arXiv 2602.17186.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# emoji=False: an id such as urn:a:17 is printed as it is
out = Console(highlight=False, soft_wrap=True, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
NOBODY = Console(quiet=True, force_terminal=False, emoji=False)  # told by processes beside the one that tells

SOME_FAILED = 3
STOPPED = 130  # by Ctrl-C, as shells count it, or by a scheduler's SIGTERM


def any_of(names: Iterable[str]) -> str:
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
    typer.Option(
        help="Columns of other names: images=img_path,question=q,answer=ans; ignore=mask leaves one out."
    ),
]
Roles = Annotated[list[str] | None, typer.Option(help="Roles of other names: assistant=helper,user=client.")]
Null = Annotated[str, typer.Option(help=f"Null image: {any_of(NULLS)}.")]
Sigma = Annotated[float, typer.Option(help="Blur's sigma, a fraction of the picture's shorter side.")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")]
Device = Annotated[
    str | None,
    typer.Option(help="cuda, cuda:1, xpu, mps, cpu, ... Default: cuda or xpu where there is such a GPU."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Read only the first N records.")]
EndOfTurn = Annotated[
    str | None,
    typer.Option(
        help=f"End-of-turn tokens in the answers: {any_of(END_OF_TURN)}. Default: {DEFAULT}, or as the folder has it."
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


def summarise(as_json: bool, show: Callable[[], None], summary: Callable[[], dict[str, Any]]) -> None:
    """Shows what a command did, or prints its summary as one JSON object."""
    if as_json:
        typer.echo(json.dumps(summary(), ensure_ascii=False, default=str))
    else:
        show()


def usage(check, *values: Any, **named: Any) -> Any:
    """What `check` makes of an option's values; what it refuses is wrong usage, which ends with exit code 2."""
    try:
        return check(*values, **named)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def source(data: Path, split: str | None, columns: list[str] | None, roles: list[str] | None) -> Source:
    """The data and how they are read; says which files of a folder are not."""
    from vig.data.locate import locate

    names = [
        usage(parse_names, given or (), option)
        for given, option in ((columns, "--columns"), (roles, "--roles"))
    ]
    source = Source(data, usage(Reading, split, *names))
    about = locate(data, split).about_unread()
    if about is not None:
        err.print(f"note: {about}", markup=False)
    return source
