"""The table of data formats: one row is all that the rest of the package knows of a format.

A row says how files of the format are called, which function reads their records and how many they are, and what a
record looks like. Functions are named by their import path, so that the command line can read the table before
anything heavy is loaded. Help and error texts, docs/formats.md and the tests read the table.
"""

from __future__ import annotations

from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Format(NamedTuple):
    """One format.

    rows: import path of f(path, wanted) -> records in order, each a dict of fields, or `Lost`, or `SKIPPED` (see
        `vig.data.rows`); in a `Named` where the row's number is not its name.
    count: import path of f(path) -> number of records, or None where only reading them all would tell.
    whole_folder: `path` is the folder in which files of these suffixes lie, not one of them.
    in_folders: a folder of such files is data; False where the files must be named one by one.
    as_json: the selected records can be exported as they stand in the data.
    """

    name: str
    suffixes: tuple[str, ...]
    rows: str
    count: str
    holds: str  # for docs/formats.md
    whole_folder: bool = False
    in_folders: bool = True
    as_json: bool = False

    def read(self, path: Path, wanted: Any) -> Any:
        return resolve_name(self.rows)(path, wanted)


FORMATS = (
    Format(
        "JSON",
        (".json", ".jsonl"),
        "vig.data.json_rows:json_rows",
        "vig.data.json_rows:count_json",
        "an array of records, or one record a line",
        in_folders=False,
        as_json=True,
    ),
    Format(
        "Parquet",
        (".parquet",),
        "vig.data.tables:parquet_rows",
        "vig.data.tables:count_parquet",
        "one record a row; the columns are its fields",
    ),
    Format(
        "Arrow",
        (".arrow",),
        "vig.data.tables:arrow_rows",
        "vig.data.tables:count_arrow",
        "one record a row; the columns are its fields",
    ),
    Format(
        "WebDataset",
        (".tar", ".tar.gz", ".tgz"),
        "vig.data.webdataset:webdataset_rows",
        "vig.data.webdataset:count_webdataset",
        "consecutive members of one name are a record: `a.json` its fields, `a.jpg` (`a.0.jpg`, `a.1.jpg`, ...) its "
        "images, `a.txt` in the place of the JSON its caption",
    ),
    Format(
        "photographs",
        IMAGES,
        "vig.data.photographs:photograph_rows",
        "vig.data.photographs:count_photographs",
        "a folder; the caption of `photo.jpg` stands in `photo.txt` beside it",
        whole_folder=True,
    ),
)


def format_of(path: str | Path) -> Format | None:
    """The format that a file's name says it has; None for any other name, and for images."""
    name = Path(path).name
    return next((row for row in FORMATS if not row.whole_folder and name.endswith(row.suffixes)), None)


def file_suffixes() -> list[str]:
    """How files of records may be called."""
    return [suffix for row in FORMATS if not row.whole_folder for suffix in row.suffixes]


def expected() -> str:
    """What data may be, in words, for help and error texts."""
    folders = "".join(f", or a folder of {row.name}" for row in FORMATS if row.whole_folder)
    return f"{', '.join(file_suffixes())}{folders}"
