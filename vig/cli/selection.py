"""vig select."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from vig import terminal
from vig.cli.options import SOME_FAILED, Command, Json, app, err, out, summarise, usage


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
        str | None,
        typer.Option(
            help="source: p within each source, so that none is emptied. kl: rank by KL(image || null), not VIG; "
            "needs `vig score --stats kl`. loss: a loss filter, which keeps the samples of the lowest loss with the "
            "image, whole; for comparison, with --level sample."
        ),
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
    keep_easy: Annotated[
        float | None,
        typer.Option(
            help="Nats: also keep the tokens whose NLL under the null image is below, of dropped samples too: the "
            "words that give answers their form. docs/evidence.md tries 0.5. Off by default."
        ),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(
            help="Also write the kept records to this .json or .jsonl file, with their fields as they are in the "
            "data. Images whose bytes are in the data are written as base64."
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

    from vig.selection.choice import Choice
    from vig.selection.export import check_export, export_records, how_to_read
    from vig.selection.select import select as choose

    if clip is not None and not 0 < clip < 1:
        raise typer.BadParameter(f"got {clip}, expected a probability between 0 and 1", param_hint="--clip")
    lowest = None if clip is None else math.log(clip)
    usage(Choice, p, level, lowest, tau_floor, seed, by, stop_tokens, mean, keep_easy)
    if export is not None:
        usage(check_export, export)
    with warnings.catch_warnings(), terminal.share(err, "selecting") as on_share:
        warnings.simplefilter("ignore")  # the summary below shows them
        chosen = choose(
            scores[0] if len(scores) == 1 else scores, p, level=level, out=folder, tau_floor=tau_floor,
            clip=lowest, seed=seed, by=by, stop_tokens=stop_tokens, mean=mean, keep_easy=keep_easy,
            overwrite=overwrite, progress=on_share,
        )  # fmt: skip
    exported, told, options = None, [], []
    if export is not None:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", UserWarning)
            exported = export_records(chosen, export, data=data)
        options = how_to_read(chosen, data)
    told = [str(one.message) for one in told if issubclass(one.category, UserWarning)]

    def show() -> None:
        terminal.show_selection(out, folder, chosen)
        if exported is not None:
            out.print(f"{exported:,} records: {export}", markup=False)
            for line in options:
                out.print(f"to read them elsewhere: {line}", markup=False)

    about = {"selection": folder, "export": export, "exported": exported, "read_with": options}
    about |= {"warnings": [*chosen.warnings, *told]}
    summarise(as_json, show, lambda: chosen.metadata["selection"] | about)
    terminal.show_warnings(err, chosen)
    for line in told:
        err.print(f"warning: {line}", markup=False)
    if chosen.unfinished:
        raise typer.Exit(SOME_FAILED)
