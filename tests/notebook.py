"""Runs examples/*.ipynb. `python tests/notebook.py` writes their outputs anew, after which they are to be looked at."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))
CELL_SECONDS = 600  # on a machine that others use too


def run(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a run in `folder`. Raises CellExecutionError for a cell that does."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,  # else the pieces depend on time
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop("image/jpeg", None)  # the PNG beside it is enough
    return notebook


def main() -> None:
    for path in NOTEBOOKS:
        with TemporaryDirectory() as folder:
            notebook = run(path, Path(folder))
        notebook.metadata["language_info"] = {"name": "python"}  # the version of this machine says nothing
        nbformat.write(notebook, path)
        print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
