"""vig card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vig.cli.options import Command, Json, app, out, summarise


@app.command(cls=Command)
def card(
    folder: Annotated[Path, typer.Argument(help="A folder of vig train or vig select.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a README.md that somebody may have edited.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write README.md for publishing: the model card or dataset card of the hub, from what the run recorded."""
    from vig.reporting.cards import UNSAID, write_card

    path, replaced = write_card(folder, overwrite)
    todo = path.read_text(encoding="utf-8").lower().count(f"**{UNSAID}")

    def show() -> None:
        if replaced:
            out.print(f"replaced {replaced}", markup=False)
        out.print(f"card: {path}; {todo} places are left for you: **{UNSAID}**", markup=False)

    summarise(as_json, show, lambda: {"card": path, "left": todo, "replaced": replaced})
