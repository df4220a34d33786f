"""Where an image lies: bytes, a picture in memory, or a file below the image root."""

from __future__ import annotations

import base64
import binascii
import functools
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from PIL import Image

from vig.data.sample import ImageSource, SampleError, check_characters, shortened

BASE64_BEGINNINGS = (
    "/9j/",
    "iVBORw0KGgo",
    "R0lGOD",
    "UklGR",
    "Qk",
    "SUkqA",
    "TU0AK",
    "AAAA",
)  # of known formats
SHORTEST_PICTURE = 60  # characters of base64
DATA_ADDRESS = re.compile(r"data:[\w/+.-]*(?:;[\w=.-]+)*;base64,")
FIELDS_OF_PICTURES = ("bytes", "path", "image", "image_url", "url", "base64", "data")
FOLLOW_LINKS = "VIG_FOLLOW_LINKS"  # an environment variable: 1 follows links that leave the image root


def image_source(value: Any, root: str | None, key: str, id: str) -> ImageSource:
    """What an image of a record is: a picture, its bytes (also as text), or a path below `root`. Raises SampleError."""
    value = value if isinstance(value, str) else _inner(value)
    if isinstance(value, Image.Image | bytes):
        return value
    if not isinstance(value, str | Path):
        raise SampleError(
            key, id, f"an image is a {type(value).__name__}", "Give a path, bytes or a PIL image"
        )
    text = str(value)
    if text.startswith("data:") or (len(text) > SHORTEST_PICTURE and text.startswith(BASE64_BEGINNINGS)):
        content = _from_base64(text)
        if content is not None:
            return content
        if text.startswith("data:"):
            reason = f"the image {shortened(text)} is not base64"
            raise SampleError(key, id, reason, "Write data:image/png;base64, followed by the bytes in base64")
    if not text.isascii():
        check_characters("image path", text, key, id)
    if "\0" in text:
        raise SampleError(key, id, f"the image path {text!r} holds a zero byte", "Remove it")
    if text.startswith("file://"):
        value = text = unquote(text.removeprefix("file://").removeprefix("localhost"))
    if "://" in text:
        reason = f"the image {shortened(text)} is a web address"
        raise SampleError(key, id, reason, "Download it first, and give the path of the file")
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


def _inner(value: Any) -> Any:
    """What a struct of bytes and path, or of an address, holds."""
    while isinstance(value, dict):
        value = next((value[name] for name in FIELDS_OF_PICTURES if value.get(name) is not None), None)
    return bytes(value) if isinstance(value, bytearray | memoryview) else value


def _from_base64(text: str) -> bytes | None:
    """The bytes that an address or a plain text holds in base64; None where it is none."""
    address = DATA_ADDRESS.match(text)
    try:
        content = base64.b64decode("".join(text[address.end() if address else 0 :].split()), validate=True)
    except (binascii.Error, ValueError):
        return None
    return content if address or _is_picture(content) else None


def _is_picture(content: bytes) -> bool:
    beginnings = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
    return content.startswith(beginnings) or content[4:8] == b"ftyp"


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
