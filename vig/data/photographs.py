"""A folder of photographs, each with its caption beside it: ``photo.txt`` beside ``photo.jpg``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vig.data.formats import IMAGES
from vig.data.rows import SKIPPED, Lost, Named, Wanted


def photograph_rows(folder: Path, wanted: Wanted) -> Iterator[Any]:
    """One record a photograph, named after its file."""
    for number, photograph in enumerate(photographs(folder)):
        yield Named(photograph.name, _record(photograph)) if wanted(number) else SKIPPED


def count_photographs(folder: Path) -> int:
    return len(photographs(folder))


def photographs(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in IMAGES and not file.name.startswith(".")  # macOS writes ._photo.jpg
    )


def _record(photograph: Path) -> dict[str, Any] | Lost:
    caption = photograph.with_suffix(".txt")
    if not caption.is_file():
        return Lost("no answer turn", f"Write the caption to score into {caption.name} beside it")
    try:
        text = caption.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"byte {error.start} is {error.object[error.start]:#04x}"
        return Lost(f"the caption {caption} is not UTF-8 ({where})", "Save it as UTF-8")
    except OSError as error:
        return Lost(f"the caption {caption} cannot be read ({error.strerror})", "Check its permissions")
    return {"id": photograph.name, "image": photograph.name, "caption": text}
