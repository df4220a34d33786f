"""vig report, vig compare, vig plot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vig import terminal
from vig.cli.options import Command, ImageRoot, Json, app, err, out, summarise, usage


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
    hide_values: Annotated[
        bool,
        typer.Option("--hide-values", help="Begin with the values of the samples hidden, to judge by eye."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page: figures, a slider for p, and samples to search, filter and export."""
    from vig.reporting.report import check_budget
    from vig.reporting.report import report as write

    usage(check_budget, budget)
    terminal.quiet_libraries()
    write(
        scores, page, selection=selection, data=data, processor=_processor(processor), image_root=image_root,
        samples=samples, title=title, budget=budget, hide_values=hide_values,
    )  # fmt: skip
    summarise(as_json, lambda: out.print(f"report: {page}", markup=False), lambda: {"report": page})


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
    keep_easy: Annotated[
        float | None,
        typer.Option(help="Nats: count tokens under it without the image as kept, as `vig select` does."),
    ] = None,
) -> None:
    """Compare two scorings of one dataset: another model, null image, sigma, checkpoint or dtype."""
    from vig.reporting.report import check_budget
    from vig.selection.compare import check_p
    from vig.selection.compare import compare as run
    from vig.selection.rule import check_easy

    usage(check_p, p)
    usage(check_easy, keep_easy)
    usage(check_budget, budget)
    found = run(a, b, p, moved=moved, keep_easy=keep_easy)
    summarise(as_json, lambda: out.print("\n".join(found.lines()), markup=False), found.as_dict)
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
    usage(check_formats, kinds)
    terminal.quiet_libraries()
    files = draw(
        scores, folder, selection=selection, sweep=sweep, formats=kinds, processor=_processor(processor)
    )
    summarise(
        as_json,
        lambda: out.print(f"{len(files)} files: {folder}", markup=False),
        lambda: {"figures": folder, "files": files},
    )


def _processor(name: str | None) -> Any:
    if name is None:
        return None
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(name)
