"""Which files of a path hold the records, in what format and of which split, and which files are not read."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from vig.data.formats import FORMATS, IMAGES, Format, expected, format_of
from vig.data.kinds import kind_of
from vig.data.photographs import visible_files
from vig.data.sample import DataError

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF_WORD = {word: split for split, words in SPLIT_WORDS.items() for word in words}
OF_THE_HUB = re.compile(r"(\w+)-\d{5}-of-\d{5}\b")
ABOUT_DATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
SHOWN = 5  # names in a message


class Located(NamedTuple):
    """Data on disk: what to read, in order, the folder that relative image paths start from, and what is left.

    names: of `paths`, as keys begin with them. unread: the files of the folder that are no data, and the folders that
    are left out.
    """

    format: Format
    paths: tuple[Path, ...]  # its files; the folder itself for a format that is read a folder at once
    root: Path
    names: tuple[str, ...]
    unread: tuple[Path, ...] = ()

    def about_unread(self) -> str | None:
        """One line that counts and names what is not read."""
        if not self.unread:
            return None
        count, what = len(self.unread), "path" if any(map(Path.is_dir, self.unread)) else "file"
        return (
            f"{self.root}: {count} {what}{'s' if count > 1 else ''} not read: {_some(self.unread, self.root)}"
        )


def locate(path: str | Path, split: str | None = None) -> Located:
    """Finds the data files of `path`. Raises DataError where there are none, or more than one thing to read."""
    path = Path(path)
    if not path.exists():
        raise DataError(f"no such data: {path}. Give {expected()}")
    other = kind_of(path)
    if other is not None and (path.is_dir() or path.suffix == ".parquet"):
        order = " MODEL comes first, then DATA" if other.name == "checkpoint" else ""
        raise DataError(f"{path} is {other.text}, not data. Give {expected()}.{order}".rstrip("."))
    if path.is_dir():
        return _in_folder(path, split)
    row = format_of(path)
    if row is None:
        raise DataError(f"cannot read {path}: expected {expected()}, got {path.suffix or 'no suffix'!r}")
    return Located(row, (path,), path.parent, (path.name,))


def _in_folder(folder: Path, split: str | None) -> Located:
    if (folder / "dataset_dict.json").is_file():
        return _dataset_dict(folder, split)
    if (folder / "state.json").is_file():
        return _saved_dataset(folder)
    files, left = visible_files(folder)
    kinds = _kinds(files)
    row = _the_kind(folder, files, kinds)
    chosen = _of_split(folder, kinds[row.name], split, row.whole_folder)
    if row.whole_folder:
        return _photographs(folder, files, left, chosen, split, row)
    _refuse_broken_links(chosen)
    return Located(row, tuple(chosen), folder, _names(folder, chosen), _unread(files, left, chosen))


def _refuse_broken_links(files: Iterable[Path]) -> None:
    """Raises DataError where a data file is not there: nobody can tell how many records it holds."""
    for file in files:
        if not file.exists():
            raise DataError(
                f"{file} is a link to {os.readlink(file)}, which is not there. Restore it, or remove the link"
            )


def _kinds(files: Iterable[Path]) -> dict[str, list[Path]]:
    """The files that may be data, by the name of their format; images are where nothing else is."""
    found: dict[str, list[Path]] = {}
    for file in files:
        row = format_of(file) if file.name not in ABOUT_DATA else None
        if row is not None:
            found.setdefault(row.name, []).append(file)
        elif file.name.lower().endswith(IMAGES):
            found.setdefault("photographs", []).append(file)
    return found


def _the_kind(folder: Path, files: list[Path], kinds: dict[str, list[Path]]) -> Format:
    """The one format of the folder. Raises DataError where there is none, or are several."""
    rows = [row for row in FORMATS if row.name in kinds]
    if not rows:
        known = ", ".join(end for row in FORMATS for end in row.suffixes if end.startswith("."))
        raise DataError(f"no photographs and no data files in {folder}: expected {known}")
    captions = {file.with_suffix("") for file in files if file.name.lower().endswith(".txt")}
    captioned = any(file.with_suffix("") in captions for file in kinds.get("photographs", ()))
    first = [row for row in rows if not row.gives_way and (captioned or not row.whole_folder)]
    first = first or [row for row in rows if row.gives_way] or rows
    if first[0].name == "imagefolder":  # which says of the images beside it what they are
        first = [row for row in first if not row.whole_folder]
    if len(first) > 1:
        found = ", ".join(_counted(row, kinds[row.name]) for row in rows)
        one = kinds[first[0].name][0]
        raise DataError(f"{folder} holds data of several kinds: {found}. Give one of them, such as {one}")
    return first[0]


def _counted(row: Format, files: list[Path]) -> str:
    """ "1 Parquet file (2 rows)"."""
    if row.whole_folder:
        return f"{len(files)} image{'s' if len(files) > 1 else ''}"
    counts = [row.n_records(file) for file in files] if not row.gives_way else [None]
    rows = "" if None in counts else f" ({sum(counts):,} rows)"
    return f"{len(files)} {row.name} file{'s' if len(files) > 1 else ''}{rows}"


# --- splits ---


def _of_split(folder: Path, files: list[Path], split: str | None, by_folder: bool) -> list[Path]:
    """The files of the split that was asked for, or of the only one. Raises DataError."""
    splits = {file: split_of(file.relative_to(folder), by_folder) for file in files}
    found = sorted({name for name in splits.values() if name})
    if split is None:
        if len(found) > 1:
            raise DataError(_ask_for_split(folder, found))
        return files
    chosen = [file for file in files if splits[file] == split]
    if not chosen:
        known = f"It holds {', '.join(found)}" if found else "Its files name no splits: leave out --split"
        raise DataError(f"{folder} has no split {split!r}. {known}")
    return chosen


def split_of(path: Path, by_folder: bool = False) -> str | None:
    """The split that a file's name, or that of a folder above it, says: as the hub names them, or by a word.

    by_folder: the file's own name says nothing, as a photograph's."""
    if not by_folder:
        hub = OF_THE_HUB.match(path.name)
        if hub:
            return SPLIT_OF_WORD.get(hub[1], hub[1])
    for part in (*path.parent.parts[::-1],) if by_folder else (path.name, *path.parent.parts[::-1]):
        for word in re.split(r"[^a-z0-9]+", part.lower()):
            if word in SPLIT_OF_WORD:
                return SPLIT_OF_WORD[word]
    return None


def _ask_for_split(folder: Path, found: Iterable[str]) -> str:
    return f"{folder} holds several splits: {', '.join(found)}. Give the one to read with --split"


# --- folders that say themselves what they hold ---


def _dataset_dict(folder: Path, split: str | None) -> Located:
    """A DatasetDict of `save_to_disk`: one saved dataset a split."""
    splits = _json_object(folder / "dataset_dict.json").get("splits") or []
    if split is None and len(splits) != 1:
        raise DataError(_ask_for_split(folder, map(str, splits)))
    if split is not None and split not in splits:
        raise DataError(f"{folder} has no split {split!r}. It holds {', '.join(map(str, splits))}")
    return _saved_dataset(folder / str(split or splits[0]))


def _saved_dataset(folder: Path) -> Located:
    """A dataset of `save_to_disk` is what its state.json lists; what `map` and `shuffle` left beside it is none."""
    state = _json_object(folder / "state.json")
    paths = tuple(folder / str(entry.get("filename")) for entry in state.get("_data_files") or [])
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        what = f"{missing[0]} is missing" if missing else "it lists no files"
        raise DataError(f"{folder / 'state.json'} does not describe a saved dataset: {what}. Save it again")
    if state.get("_indices_data_files"):
        raise DataError(
            f"{folder} was saved with an order of its own. Call flatten_indices() and save it again"
        )
    arrow = next(row for row in FORMATS if row.name == "Arrow")
    return Located(arrow, paths, folder, _names(folder, paths), _unread(*visible_files(folder), paths))


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}). Save the dataset again") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} holds no object. Save the dataset again")
    return found


def _photographs(
    folder: Path, files: list[Path], left: list[Path], chosen: list[Path], split: str | None, row: Format
) -> Located:
    """All images below the folder, or below its folder of the split."""
    home = folder
    if split is not None:
        parts = {file.relative_to(folder).parts[0] for file in chosen}
        if len(parts) > 1:
            raise DataError(
                f"the split {split} is in {', '.join(sorted(parts))} of {folder}. Give one of these"
            )
        home = folder / parts.pop()
    captions = {file.with_suffix("") for file in chosen}
    read = {
        *chosen,
        *(file for file in files if file.suffix.lower() == ".txt" and file.with_suffix("") in captions),
    }
    name = Path(os.path.abspath(home)).name  # also of "."
    return Located(row, (home,), home, (name,), (*(file for file in files if file not in read), *left))


# --- what is left ---


def _names(folder: Path, paths: Iterable[Path]) -> tuple[str, ...]:
    return tuple(path.relative_to(folder).as_posix() for path in paths)


def _unread(files: Iterable[Path], left: Iterable[Path], read: Iterable[Path]) -> tuple[Path, ...]:
    """Neither data, nor images that records may name, nor what describes a dataset."""
    read = set(read)
    unread = (
        file
        for file in files
        if file not in read and file.name not in ABOUT_DATA and not file.name.lower().endswith(IMAGES)
    )
    return (*unread, *left)


def _some(paths: tuple[Path, ...], folder: Path) -> str:
    names = [path.relative_to(folder).as_posix() if folder in path.parents else str(path) for path in paths]
    shown = (name + _why_unread(path) for name, path in zip(names[:SHOWN], paths, strict=False))
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return f"{', '.join(shown)}{more}"


def _why_unread(path: Path) -> str:
    """Of a link and of a folder; of other files their names say enough."""
    if not path.exists():
        return " (a link to nothing)"
    if not path.is_dir():
        return ""
    known = os.access(path, os.R_OK | os.X_OK)
    return " (read under another name, or above)" if known else " (cannot be read)"
