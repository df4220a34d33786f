"""Where an image lies: bytes, a picture in memory, or a file below the image root."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from PIL import Image

from vig.data.sample import ImageSource, SampleError, check_characters, shortened

FOLLOW_LINKS = "VIG_FOLLOW_LINKS"  # an environment variable: 1 follows links that leave the image root


def image_source(value: Any, root: str | None, key: str, id: str) -> ImageSource:
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
    check_characters("image path", str(value), key, id)
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
