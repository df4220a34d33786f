"""Photographs, each with its caption beside it: ``photo.txt`` beside ``photo.jpg``; in a folder and those within it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vig.data.formats import IMAGES
from vig.data.rows import SKIPPED, Lost, Named, Wanted
from vig.data.sample import SAVE_AS_UTF8


def photograph_rows(folder: Path, wanted: Wanted) -> Iterator[Any]:
    """One record a photograph, named after its file."""
    for number, photograph in enumerate(photographs(folder)):
        name = photograph.relative_to(folder).as_posix()
        yield Named(name, _record(photograph, name)) if wanted(number) else SKIPPED


def count_photographs(folder: Path) -> int:
    return len(photographs(folder))


def photographs(folder: Path) -> list[Path]:
    """The images of a folder and of the folders within it, by name; those of the folder first."""
    return [file for file in visible_files(folder)[0] if file.name.lower().endswith(IMAGES)]


def visible_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files of a folder and of the folders within it, without what systems and archivers hide there
    (macOS writes ``._photo.jpg``); and the folders that are left out.

    Links to folders are followed. Left out are those that lead to a folder above or to one that is read under another
    name, and folders that cannot be read.
    """
    found, left, root = [], [], os.path.realpath(folder)
    linked = {root}  # the folders that links lead to

    def enters(place: str, name: str) -> bool:
        path = Path(place, name)
        real = os.path.realpath(path)
        if real == os.path.join(root, path.relative_to(folder)):  # no link on the way
            return True
        # A folder keeps its own name before that of a link to it, so that keys do not depend on links.
        named = not any(map(_is_hidden, os.path.relpath(real, root).split(os.sep)))  # "..": outside
        if named or real in linked or Path(os.path.realpath(place)).is_relative_to(real):
            left.append(path)
            return False
        linked.add(real)
        return True

    walk = os.walk(folder, followlinks=True, onerror=lambda error: left.append(Path(error.filename)))
    for place, folders, names in walk:
        folders[:] = [name for name in sorted(folders) if not _is_hidden(name) and enters(place, name)]
        found += [Path(place, name) for name in sorted(names) if not name.startswith(".")]
    return found, left


def _is_hidden(folder: str) -> bool:
    return folder.startswith((".", "__"))


def _record(photograph: Path, name: str) -> dict[str, Any] | Lost:
    caption = photograph.with_suffix(".txt")
    if not caption.is_file():
        return Lost("no answer turn", f"Write the caption to score into {caption.name} beside it")
    try:
        text = caption.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"byte {error.start} is {error.object[error.start]:#04x}"
        return Lost(f"the caption {caption} is not UTF-8 ({where})", SAVE_AS_UTF8)
    except OSError as error:
        return Lost(f"the caption {caption} cannot be read ({error.strerror})", "Check its permissions")
    return {"id": name, "image": str(photograph.absolute()), "caption": text}
