"""From files to samples: readers of instruction data, one `Sample` or one `BrokenRecord` a record.

Records: LLaVA / ShareGPT (``conversations``) and Hugging Face ``messages``. Files: a JSON array, JSON lines,
Parquet, Arrow or WebDataset, or a folder of photographs with a caption beside each. Nothing is ever dropped
silently: what cannot become a sample is yielded as a `BrokenRecord` that carries its key, its id and the cure.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from vig.data import readers
from vig.data.sample import (
    BrokenRecord,
    DataError,
    ImageSource,
    Sample,
    SampleError,
    shortened,
    text_of,
    writable,
)

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}
SPEAKERS = tuple(sorted(set(ROLES.values())))
FOLLOW_LINKS = "VIG_FOLLOW_LINKS"  # an environment variable: 1 follows links that leave the image root
IMAGE_MARK = "<image>"
PHOTOGRAPHS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TURNS = {"conversations", "messages"}
CAPTION_QUESTION = "Describe the image."


def read_samples(
    path: str | Path,
    *,
    image_root: str | Path | None = None,
    limit: int | None = None,
    wanted: Callable[[int], bool] | None = None,
) -> Iterator[Sample | BrokenRecord | None]:
    """Reads `path` record by record, in order, in constant memory.

    path: a ``.json`` array, a ``.jsonl`` file, ``.parquet``, ``.arrow`` or WebDataset ``.tar`` or ``.tar.gz``
        files (one, or a folder of them), or a folder of photographs (caption ``photo.txt`` beside ``photo.jpg``).
    image_root: folder that relative image paths start from; the data file's own folder unless given. Paths
        that leave it are refused, also by symbolic links, which VIG_FOLLOW_LINKS=1 follows. (The links of the hub's
        cache are followed without it.)
    limit: read at most this many records.
    wanted: of a record's number, counted from 0 over all files, whether it is needed; asked when it is reached.
        None stands in the place of the others, which cost as little as the format allows (`vig.data.readers`).
    Raises DataError where the file is missing or of an unknown format, ValueError for a negative limit.
    """
    if limit is not None and limit < 0:
        raise ValueError(f"limit = {limit}, expected at least 0 records")
    path, reader = _reader_of(path)
    root = Path(image_root) if image_root is not None else (path if path.is_dir() else path.parent)
    if not root.is_dir():
        raise DataError(f"no such image root: {root}. Give the folder of the images with --image-root")
    return islice(reader.read(path, root.absolute(), wanted or readers.every), limit)


def count_records(path: str | Path) -> int | None:
    """How many records `read_samples` yields; None where only reading all the images too would tell."""
    path, reader = _reader_of(path)
    return reader.count(path)


def _reader_of(path: str | Path) -> tuple[Path, Reader]:
    path = Path(path)
    if not path.exists():
        raise DataError(
            f"no such data: {path}. Give a .json, .jsonl, .parquet, .arrow, .tar or .tar.gz file, or a folder"
        )
    reader = next((reader for reader in READERS if reader.knows(path)), None)
    if reader is None:
        got = f"{path.suffix or 'no suffix'!r}"
        raise DataError(
            f"cannot read {path}: expected .json, .jsonl, .parquet, .arrow, .tar, .tar.gz or a folder, got {got}"
        )
    return path, reader


def sample_from_record(
    record: Any, *, key: str, image_root: Path | str | None = None, source: str = ""
) -> Sample:
    """Makes a `Sample` of one LLaVA, ShareGPT or ``messages`` record (a dict). Raises SampleError."""
    if not isinstance(record, dict):
        raise SampleError(
            key, "", f"the record is a {type(record).__name__}, not an object", "Give one object a record"
        )
    id = str(key if record.get("id") is None else record["id"])
    _check_characters("id", id, key, id)
    root = None if image_root is None else str(Path(image_root).absolute())
    images = tuple(_image_source(value, root, key, id) for value in _image_values(record))
    if "conversations" in record:
        turns = [(turn, "from", "value") for turn in _turns(record["conversations"], key, id)]
    elif "messages" in record:
        turns = [(turn, "role", "content") for turn in _turns(record["messages"], key, id)]
    else:
        raise SampleError(
            key,
            id,
            f"no turns among the fields {sorted(map(str, record))}",
            "Name them `conversations` or `messages`",
        )
    messages = tuple(_message(*turn, key, id) for turn in turns)
    _check_turns(messages, len(images), key, id)
    return Sample(key, id, images, messages, source)


def check_sample(sample: Sample) -> None:
    """Raises SampleError where a sample, perhaps made by hand, is not what `Sample` says."""
    key, id = sample.key, sample.id
    for message in _turns(sample.messages, key, id):
        if message.get("role") not in SPEAKERS:
            cure = f"Use one of {', '.join(SPEAKERS)}"
            raise SampleError(key, id, f"unknown role {message.get('role')!r}", cure)
        if not isinstance(message.get("content"), list | tuple):
            kind = type(message.get("content")).__name__
            reason = f"a {message['role']} turn's content is {kind}, not a list of parts"
            raise SampleError(key, id, reason, "Write parts, or make the sample with sample_from_record")
        _message(message, "role", "content", key, id)
    _check_turns(sample.messages, len(sample.images), key, id)


# --- one record ---


def _check_characters(what: str, text: str, key: str, id: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        lone = f"{text[error.start]!r} at character {error.start}"
        raise SampleError(
            key,
            id,
            f"the {what} holds the lone surrogate {lone}",
            "Write it in UTF-8, and characters beyond \\uffff as pairs of surrogates",
        ) from None


def _image_values(record: dict[str, Any]) -> list[Any]:
    for field in ("images", "image"):
        value = record.get(field)
        if value is not None:
            return list(value) if isinstance(value, list | tuple) else [value]
    return []


def _image_source(value: Any, root: str | None, key: str, id: str) -> ImageSource:
    if isinstance(value, Image.Image | bytes):
        return value
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return value["bytes"]
    if isinstance(value, dict) and isinstance(value.get("path"), str):
        value = value["path"]
    if not isinstance(value, str | Path):
        raise SampleError(
            key, id, f"an image is a {type(value).__name__}", "Give a path, bytes or a PIL image"
        )
    _check_characters("image path", str(value), key, id)
    if "\0" in str(value):
        raise SampleError(key, id, f"the image path {str(value)!r} holds a zero byte", "Remove it")
    if "://" in str(value) or str(value).startswith("data:"):
        reason = f"the image {shortened(value)} is an address"
        raise SampleError(key, id, reason, "Store it as a file and give its path")
    if root is None:
        return Path(value)
    path = os.path.join(root, value)
    real, real_root = _real_path(path), _real_folder(root)
    if _lies_in(real_root, real) or _is_blob_of_snapshot(path, real_root, real):
        return Path(real)
    reason = f"the image path {value} leaves the image root {root}"
    cure = "Set --image-root to a folder above it"
    if any(_lies_in(folder, os.path.normpath(path)) for folder in (os.path.normpath(root), real_root)):
        if os.environ.get(FOLLOW_LINKS) == "1":
            return Path(real)
        reason += f" by a link, to {real}"
        cure = f"If the links are yours, set {FOLLOW_LINKS}=1"
    raise SampleError(key, id, reason, cure)


def _lies_in(folder: str, path: str) -> bool:
    return path == folder or path.startswith(os.path.join(folder, ""))


def _is_blob_of_snapshot(path: str, root: str, real: str) -> bool:
    """Whether `path` is a file of a snapshot in the hub's cache, below the root, and `real` what it is a link to there:
    a blob of the same repository."""
    folder = _real_folder(os.path.dirname(path))
    blobs = _blobs_of_snapshot(folder)
    return blobs is not None and _lies_in(root, folder) and _lies_in(blobs, real)


@functools.lru_cache(maxsize=1 << 14)
def _blobs_of_snapshot(folder: str) -> str | None:
    """`<repository>/blobs` for a folder in `<repository>/snapshots/<revision>`."""
    for inner in (Path(folder), *Path(folder).parents):
        if inner.parent.name == "snapshots" and (inner.parent.parent / "blobs").is_dir():
            return os.path.realpath(inner.parent.parent / "blobs")
    return None


def _real_path(path: str) -> str:
    """os.path.realpath, at the cost of one system call for a file in a folder that was seen before."""
    folder, name = os.path.split(path)
    if name in ("", os.curdir, os.pardir):
        return os.path.realpath(path)
    path = os.path.join(_real_folder(folder), name)
    return os.path.realpath(path) if os.path.islink(path) else path


@functools.lru_cache(maxsize=1 << 14)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def _turns(turns: Any, key: str, id: str) -> list[dict[str, Any]]:
    if isinstance(turns, dict) and all(isinstance(column, list) for column in turns.values()):
        turns = [dict(zip(turns, turn, strict=False)) for turn in zip(*turns.values(), strict=False)]
    if not isinstance(turns, list | tuple) or not all(isinstance(turn, dict) for turn in turns):
        raise SampleError(
            key, id, "the turns are not a list of objects", "Give a list of {from, value} or {role, content}"
        )
    return list(turns)


def _message(turn: dict[str, Any], role_field: str, text_field: str, key: str, id: str) -> dict[str, Any]:
    name = turn.get(role_field)
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise SampleError(key, id, f"unknown role {name!r}", f"Use one of {', '.join(sorted(ROLES))}")
    content = turn.get(text_field)
    if isinstance(content, str):
        _check_characters(f"{role} turn's {text_field}", content, key, id)
        return {"role": role, "content": _parts(content)}
    if isinstance(content, list | tuple):
        parts = [_part(part, key, id) for part in content]
        return {"role": role, "content": [part for part in parts if part.get("text") != ""]}
    raise SampleError(
        key, id, f"a {role} turn's {text_field} is {type(content).__name__}", "Give text or a list of parts"
    )


def _part(part: Any, key: str, id: str) -> dict[str, Any]:
    if isinstance(part, dict) and part.get("type") == "image":
        return {"type": "image"}
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        _check_characters("text of a content part", part["text"], key, id)
        return {"type": "text", "text": part["text"]}
    raise SampleError(
        key, id, f"a content part is {part!r:.80}", 'Use {"type": "image"} or {"type": "text", "text": ...}'
    )


def _parts(text: str) -> list[dict[str, Any]]:
    """Splits text at ``<image>``; the newline that LLaVA writes beside it belongs to the mark."""
    if IMAGE_MARK not in text:
        return [{"type": "text", "text": text}]
    parts: list[dict[str, Any]] = []
    pieces = text.split(IMAGE_MARK)
    for number, piece in enumerate(pieces):
        if number > 0:
            parts.append({"type": "image"})
            piece = piece.removeprefix("\n")
        if number < len(pieces) - 1:
            piece = piece.removesuffix("\n")
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _check_turns(messages: tuple[dict[str, Any], ...], n_images: int, key: str, id: str) -> None:
    marks = sum(part["type"] == "image" for message in messages for part in message["content"])
    if marks != n_images:
        raise SampleError(
            key,
            id,
            f"{n_images} images but {marks} {IMAGE_MARK} marks",
            f"Write one {IMAGE_MARK} for each image",
        )
    spoken = [message for message in messages if message["role"] == "assistant"]
    if not spoken:
        raise SampleError(key, id, "no answer turn", "Give at least one gpt / assistant turn")
    for message in spoken:
        if any(part["type"] == "image" for part in message["content"]):
            raise SampleError(key, id, f"an answer holds {IMAGE_MARK}", "Put images into user turns")
        if not text_of(message).strip():
            raise SampleError(key, id, "an answer is empty", "Remove the turn or write its answer")


# --- readers ---


def _read_folder(path: Path, root: Path, wanted: readers.Wanted) -> Iterator[Sample | BrokenRecord | None]:
    photographs = _photographs(path)
    if not photographs:
        known = ", ".join((*PHOTOGRAPHS, *readers.KINDS))
        inner = next(
            (f". {file} is not searched: give it" for file in sorted(path.iterdir()) if file.is_dir()), ""
        )
        raise DataError(f"no photographs and no data files in {path}: expected {known}{inner}")
    source = writable(path.name)
    for number, photograph in enumerate(photographs):
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


def _photographs(path: Path) -> list[Path]:
    return sorted(
        file
        for file in path.iterdir()
        if file.suffix.lower() in PHOTOGRAPHS and not file.name.startswith(".")  # macOS writes ._photo.jpg
    )


def caption_turns(caption: str) -> list[dict[str, str]]:
    """A caption as the answer to a question about its image."""
    return [
        {"from": "human", "value": f"{IMAGE_MARK}\n{CAPTION_QUESTION}"},
        {"from": "gpt", "value": caption.strip()},
    ]


def _turns_of_caption(record: dict[str, Any], key: str) -> list[dict[str, str]]:
    caption, id = record["caption"], str(key if record.get("id") is None else record["id"])
    if not isinstance(caption, str):
        reason = f"the caption is {type(caption).__name__}"
        raise SampleError(key, id, reason, "Write it as text, or remove the record")
    return caption_turns(caption)


def _read_files(path: Path, root: Path, wanted: readers.Wanted) -> Iterator[Sample | BrokenRecord | None]:
    total = 0  # records of the files before
    for file in readers.data_files(path):
        before, number, source = total, -1, writable(file.name)
        for number, record, problem, cure in readers.read_rows(file, lambda row, n=before: wanted(n + row)):
            if record is readers.SKIPPED or not wanted(before + number):
                yield None
                continue
            key = f"{source}#{number}"
            try:
                if problem is not None:
                    raise SampleError(key, "", problem, cure)
                if isinstance(record, dict) and "caption" in record and not record.keys() & TURNS:
                    record = record | {"conversations": _turns_of_caption(record, key)}
                yield sample_from_record(record, key=key, image_root=root, source=source)
            except SampleError as error:
                yield BrokenRecord(key, error.id, source, error)
        total = before + number + 1


class Reader(NamedTuple):
    """One format: whether a path is of it, its records, and how many they are if that is cheap to know."""

    knows: Callable[[Path], Any]
    read: Callable[[Path, Path, readers.Wanted], Iterator[Sample | BrokenRecord | None]]
    count: Callable[[Path], int | None]


READERS = (
    Reader(readers.data_files, _read_files, readers.count_rows),
    Reader(Path.is_dir, _read_folder, lambda path: len(_photographs(path))),
)
