"""Which files of a path hold the records, and in what format."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from vig.data.formats import FORMATS, Format, expected, format_of
from vig.data.sample import DataError


class Located(NamedTuple):
    """Data on disk: what to read, in order, and the folder that relative image paths start from by default."""

    format: Format
    paths: tuple[Path, ...]  # its files; the folder itself for a format that is read a folder at once
    root: Path


def locate(path: str | Path) -> Located:
    """Finds the data files of `path`. Raises DataError where there are none, with what could be there."""
    path = Path(path)
    if not path.exists():
        raise DataError(f"no such data: {path}. Give {expected()}")
    if path.is_dir():
        return _in_folder(path)
    row = format_of(path)
    if row is None:
        raise DataError(f"cannot read {path}: expected {expected()}, got {path.suffix or 'no suffix'!r}")
    return Located(row, (path,), path.parent)


def _in_folder(folder: Path) -> Located:
    files = visible_files(folder)
    for row in FORMATS:
        found = tuple(file for file in files if row.in_folders and is_of(file, row))
        if found:
            return Located(row, (folder,) if row.whole_folder else found, folder)
    inner = next(
        (f". {file} is not searched: give it" for file in sorted(folder.iterdir()) if file.is_dir()), ""
    )
    known = ", ".join(suffix for row in FORMATS if row.in_folders for suffix in row.suffixes)
    raise DataError(f"no photographs and no data files in {folder}: expected {known}{inner}")


def visible_files(folder: Path) -> list[Path]:
    """By name; without what systems and archivers hide there, as macOS does ``._photo.jpg``."""
    return sorted(file for file in folder.iterdir() if not file.name.startswith("."))


def is_of(file: Path, row: Format) -> bool:
    name = file.name.lower() if row.whole_folder else file.name
    return name.endswith(row.suffixes)
