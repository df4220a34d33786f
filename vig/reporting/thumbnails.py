"""Pictures inside a page: WebP thumbnails, each once, that together fit a budget of bytes."""

from __future__ import annotations

import base64
import hashlib
import io
from typing import Any

from PIL import Image

EXACT_PIXELS = 160  # pictures up to this side are kept pixel by pixel and enlarged without smoothing
# Side in pixels and quality, from fine to coarse.
STEPS = ((448, 80), (448, 65), (384, 60), (320, 55), (256, 50), (192, 45), (128, 40), (96, 30))
DEAR = 1.8  # of its fair share a picture may take: a blurred null beside it takes a tenth


class Thumbnails:
    """Encodes pictures as they come and gives their numbers; equal pictures are stored once.

    Each picture is shrunk until it takes at most 1.8 times an equal share of what is left of the budget. expected: how
    many pictures will come.
    """

    def __init__(self, budget: int, expected: int):
        self.left, self.expected = budget, max(expected, 1)
        self.images: list[dict[str, Any]] = []  # for the page: src, width, height, exact
        self.left_out = 0
        self._numbers: dict[bytes, int | None] = {}
        self._step = 0

    def add(self, image: Image.Image) -> int | None:
        """The picture's number on the page; None where the budget is used up."""
        image = image.convert("RGB")
        content = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest()
        self.expected = max(self.expected - 1, 0)
        if content not in self._numbers:
            self._numbers[content] = self._store(image)
        if self._numbers[content] is None:
            self.left_out += 1
        return self._numbers[content]

    def _store(self, image: Image.Image) -> int | None:
        share = min(DEAR * max(self.left, 0) / (self.expected + 1), self.left)
        if max(image.size) <= EXACT_PIXELS:
            found = self._keep(image, True, _webp(image, None), share)
            if found is not None:
                return found
        for step in range(max(self._step - 1, 0), len(STEPS)):
            side, quality = STEPS[step]
            small = image.copy()
            small.thumbnail((side, side), Image.Resampling.LANCZOS)
            last = step == len(STEPS) - 1
            found = self._keep(small, False, _webp(small, quality), self.left if last else share)
            if found is not None:
                self._step = step if len(self.images[found]["src"]) > share / 3 else self._step
                return found
        return None

    def _keep(self, image: Image.Image, exact: bool, content: bytes, most: float) -> int | None:
        src = "data:image/webp;base64," + base64.b64encode(content).decode()
        if len(src) > most:
            return None
        self.left -= len(src)
        self.images.append({"src": src, "w": image.width, "h": image.height, "exact": exact})
        return len(self.images) - 1


def _webp(image: Image.Image, quality: int | None) -> bytes:
    buffer = io.BytesIO()
    if quality is None:
        image.save(buffer, "WEBP", lossless=True, method=2)
    else:
        image.save(buffer, "WEBP", quality=quality, method=2)
    return buffer.getvalue()
