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
        bool, typer.Option("--overwrite", help="Replace a README.md that is there.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write README.md for publishing: the model card or dataset card of the hub, from what the run recorded."""
    from vig.reporting.cards import UNSAID, write_card

    path = write_card(folder, overwrite)
    todo = path.read_text(encoding="utf-8").lower().count(f"**{UNSAID}")
    summarise(
        as_json,
        lambda: out.print(f"card: {path}; {todo} places are left for you: **{UNSAID}**", markup=False),
        lambda: {"card": path, "left": todo},
    )
