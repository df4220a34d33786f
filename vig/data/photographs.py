"""A folder of photographs, each with its caption beside it: ``photo.txt`` beside ``photo.jpg``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vig.data import readers
from vig.data.records import caption_turns, sample_from_record
from vig.data.rows import Wanted
from vig.data.sample import BrokenRecord, DataError, Sample, SampleError, writable

PHOTOGRAPHS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def read_folder(path: Path, root: Path, wanted: Wanted) -> Iterator[Sample | BrokenRecord | None]:
    found = photographs(path)
    if not found:
        known = ", ".join((*PHOTOGRAPHS, *readers.KINDS))
        inner = next(
            (f". {file} is not searched: give it" for file in sorted(path.iterdir()) if file.is_dir()), ""
        )
        raise DataError(f"no photographs and no data files in {path}: expected {known}{inner}")
    source = writable(path.name)
    for number, photograph in enumerate(found):
        if not wanted(number):
            yield None
            continue
        key, caption = f"{source}#{writable(photograph.name)}", photograph.with_suffix(".txt")
        try:
            if not caption.is_file():
                raise SampleError(
                    key,
                    photograph.name,
                    "no answer turn",
                    f"Write the caption to score into {caption.name} beside it",
                )
            record = {"id": photograph.name, "image": photograph.name}
            record["conversations"] = caption_turns(_caption(caption, key, photograph.name))
            yield sample_from_record(record, key=key, image_root=root, source=source)
        except SampleError as error:
            yield BrokenRecord(key, error.id, source, error)


def _caption(file: Path, key: str, id: str) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"byte {error.start} is {error.object[error.start]:#04x}"
        raise SampleError(key, id, f"the caption {file} is not UTF-8 ({where})", "Save it as UTF-8") from None
    except OSError as error:
        reason = f"the caption {file} cannot be read ({error.strerror})"
        raise SampleError(key, id, reason, "Check its permissions") from None


def photographs(path: Path) -> list[Path]:
    return sorted(
        file
        for file in path.iterdir()
        if file.suffix.lower() in PHOTOGRAPHS and not file.name.startswith(".")  # macOS writes ._photo.jpg
    )
