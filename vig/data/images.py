"""The images of samples as 8-bit RGB, from files, bytes or pictures in memory."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from stat import S_ISREG

import numpy as np
from PIL import ExifTags, Image

from vig.data.sample import ImageSource, Sample, SampleError, shortened

MAX_PIXELS = 178_956_970  # twice Image.MAX_IMAGE_PIXELS: Pillow opens nothing larger

RUN_BY_OTHERS = ("EPS",)  # Pillow would start Ghostscript, and PostScript is a program

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation
ON_ITS_SIDE = [turn for orientation, turn in UPRIGHT.items() if orientation >= 5]

# What Pillow's plugins were seen to raise at damaged files, and may.
UNDECODABLE = (OSError, ValueError, RuntimeError, EOFError, SyntaxError, TypeError, LookupError, ArithmeticError,
               AttributeError, struct.error, zlib.error)  # fmt: skip


def open_images(sample: Sample, *, max_pixels: int = MAX_PIXELS) -> list[Image.Image]:
    """Decodes the images of a sample to 8-bit RGB, in order: upright as their EXIF data say, and of several frames the
    first; 16 bits are scaled by 1/257 and rounded.

    Raises SampleError for a missing file, a file that is not an image, a truncated one, one of 32-bit or float
    pixels, whose range is anyone's guess, one of more than `max_pixels` pixels (checked on the header, before anything
    is decoded), and PostScript, which would be run.
    """
    return [open_image(source, sample.key, sample.id, max_pixels=max_pixels) for source in sample.images]


def open_image(source: ImageSource, key: str, id: str, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    name = f"{len(source)} bytes" if isinstance(source, bytes) else shortened(source)
    try:
        if isinstance(source, Path) and not S_ISREG(source.stat().st_mode):  # a pipe would be waited for
            raise SampleError(key, id, f"{name} is not a file", "Replace or remove it")
        if isinstance(source, Image.Image):
            name = f"of {source.width} x {source.height} pixels"
            return _as_rgb(source, name, key, id)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of pictures that it can read
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                if image.width * image.height > max_pixels:
                    raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
                if image.format in RUN_BY_OTHERS:
                    reason = f"the image {name} is {image.format}, which another program would have to run"
                    raise SampleError(key, id, reason, "Convert it to PNG, if you trust it")
                return _as_rgb(image, name, key, id)
    except SampleError:
        raise
    except FileNotFoundError:
        raise SampleError(key, id, f"no image at {name}", "Check --image-root") from None
    except Image.DecompressionBombError as error:
        raise SampleError(
            key, id, f"the image {name} is too large ({error})", f"Shrink it below {max_pixels:,} pixels"
        ) from None
    except Image.UnidentifiedImageError:
        raise SampleError(
            key, id, f"{name} is not an image that Pillow can read", "Replace or remove it"
        ) from None
    except UNDECODABLE as error:
        reason = getattr(error, "strerror", None) or error  # which names the file at any length
        raise SampleError(
            key, id, f"the image {name} cannot be decoded ({reason})", "Replace or remove it"
        ) from None


def image_size(source: ImageSource) -> tuple[int, int] | None:
    """(width, height) of the upright picture, from its header alone; None where it cannot be read."""
    if isinstance(source, Image.Image):
        return source.size
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                size, turn = image.size, _turn(image)
    except (*UNDECODABLE, Image.DecompressionBombError):
        return None
    return size[::-1] if turn in ON_ITS_SIDE else size


def _as_rgb(image: Image.Image, name: str, key: str, id: str) -> Image.Image:
    """8-bit RGB. `convert` alone cuts off what is above 255: 16 bits turn white, floats in [0, 1] black."""
    image.load()  # Pillow turns TIFF files itself as it reads them
    turn = _turn(image)
    is_png = getattr(image, "format", None) == "PNG"  # whose 16 bits are mode I to some versions of Pillow
    if image.mode.startswith("I;16") or (image.mode == "I" and is_png):
        values = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        low, high = image.getextrema()
        reason = f"the image {name} has pixels of mode {image.mode}, from {low:g} to {high:g}"
        raise SampleError(key, id, reason, "Convert it to 8-bit RGB, in a range of your choice")
    image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What brings a camera's picture upright, as `datasets` and transformers do when they open one."""
    try:
        return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except UNDECODABLE:  # damaged EXIF data do not make the picture unreadable
        return None
