"""vig demo."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from vig import terminal
from vig.cli.options import Command, Json, app, out


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
        typer.echo(json.dumps(figures))
