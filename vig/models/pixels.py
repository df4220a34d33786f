"""Where pictures lie in a family's pixel inputs: each is taken out whole, without its padding, and put back.

A null image is defined on the picture as the model sees it. Some processors cut a picture into tiles, pad it, add a
thumbnail, or flatten it into patches. A `PixelLayout` undoes that on the device and does it again:

    plain     (images, C, H, W)            the picture; with do_pad, a square with the picture in its middle
    tiles     (images, 1 + tiles, C, H, W) a thumbnail, then the tiles of the picture in the middle of its canvas
    tiles     (tiles, C, H, W)             the tiles of the picture, then a thumbnail
    tiles     (samples, tiles, C, H, W)    the same, for all images of a sample, with a pixel_attention_mask
    patches   (patches, C * 2 * p * p)     p x p patches, the merge x merge neighbours together, twice in time

How a picture was cut follows from its size and the processor's settings, so the layouts ask for `sizes`: for each
sample of the batch, the (height, width) of its decoded images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, floor
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

Size = tuple[int, int]  # height, width
Sizes = Sequence[Sequence[Size]]  # for each sample, its images in order
PixelInputs = dict[str, Tensor]

TABLES = (
    "image_grid_thw",
    "pixel_attention_mask",
    "batch_num_images",
)  # what layouts read beside `pixel_values`
ALMOST_BLACK = 1e-6  # in the place of a zero, where a tile that is zero throughout would pass for padding


class Picture(NamedTuple):
    """One picture of an image: the image itself or its thumbnail."""

    image: int  # number of its image in the batch, in reading order
    pixels: Tensor  # (C, H, W)


class PixelLayout(Protocol):
    """Takes pictures out of pixel inputs and puts others, of the same shapes, in their places."""

    def take(self, pixels: PixelInputs, sizes: Sizes, processor: Any) -> list[Picture]: ...

    def put_back(
        self, pixels: PixelInputs, sizes: Sizes, processor: Any, pictures: Sequence[Tensor]
    ) -> PixelInputs: ...

    def check(self, pixels: PixelInputs, sizes: Sizes, processor: Any) -> None:
        """Raises ValueError where `take` would, and moves no pixel."""


def image_processor(processor: Any) -> Any:
    """The part of a processor that makes the pixel inputs, whose settings say how pictures were cut."""
    return getattr(processor, "image_processor", processor)


# --- tiles ---


class Piece(NamedTuple):
    """A rectangle of one tile, and where it lies in the picture."""

    tile: tuple[int, ...]  # index into the leading dimensions of pixel_values
    rows: slice  # of the tile
    columns: slice
    top: int  # in the picture
    left: int

    @property
    def within(self) -> tuple[slice, slice, slice]:
        """Index into the picture (C, H, W)."""
        height, width = self.rows.stop - self.rows.start, self.columns.stop - self.columns.start
        return slice(None), slice(self.top, self.top + height), slice(self.left, self.left + width)


class Spread(NamedTuple):
    """How one picture is spread over tiles."""

    image: int
    height: int
    width: int
    pieces: tuple[Piece, ...]


class Tiles:
    """Pictures that lie in rectangles of `pixel_values`. `spread` (pixels, sizes, processor) says where."""

    def __init__(
        self, spread: Callable[[PixelInputs, Sizes, Any], list[Spread]], keep_from_zero: bool = False
    ):
        self.spread, self.keep_from_zero = spread, keep_from_zero

    def take(self, pixels: PixelInputs, sizes: Sizes, processor: Any) -> list[Picture]:
        values = pixels["pixel_values"]
        return [
            Picture(spread.image, _assembled(values, spread))
            for spread in self.spread(pixels, sizes, processor)
        ]

    def put_back(
        self, pixels: PixelInputs, sizes: Sizes, processor: Any, pictures: Sequence[Tensor]
    ) -> PixelInputs:
        values = pixels["pixel_values"].clone()
        for spread, picture in zip(self.spread(pixels, sizes, processor), pictures, strict=True):
            for piece in spread.pieces:
                values[piece.tile][:, piece.rows, piece.columns] = picture[piece.within]
        if self.keep_from_zero:
            values = _kept_from_zero(values, pixels["pixel_values"])
        return pixels | {"pixel_values": values}

    def check(self, pixels: PixelInputs, sizes: Sizes, processor: Any) -> None:
        self.spread(pixels, sizes, processor)


def _assembled(values: Tensor, spread: Spread) -> Tensor:
    if len(spread.pieces) == 1:
        piece = spread.pieces[0]
        return values[piece.tile][:, piece.rows, piece.columns]
    picture = values.new_empty((values.shape[-3], spread.height, spread.width))
    for piece in spread.pieces:
        picture[piece.within] = values[piece.tile][:, piece.rows, piece.columns]
    return picture


def _kept_from_zero(values: Tensor, before: Tensor) -> Tensor:
    """Tiles that have become zero throughout, which such a model takes for padding, get one pixel that is not."""
    emptied = (values == 0).flatten(-3).all(-1) & (before != 0).flatten(-3).any(-1)
    corner = values[..., 0, 0, 0]
    values[..., 0, 0, 0] = torch.where(emptied, ALMOST_BLACK, corner)
    return values


def _whole(image: int, tile: tuple[int, ...], height: int, width: int) -> Spread:
    return Spread(image, height, width, (Piece(tile, slice(0, height), slice(0, width), 0, 0),))


def _grid(
    image: int,
    tiles: Sequence[tuple[int, ...]],  # in reading order
    columns: int,
    tile_size: Size,
    area: tuple[int, int, int, int],  # top, left, height, width of the picture on the canvas of all tiles
) -> Spread:
    """A picture on a canvas that is cut into tiles row by row; what lies outside its area is padding."""
    top, left, height, width = area
    pieces = []
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        y, x = row * tile_size[0], column * tile_size[1]  # of the tile on the canvas
        rows = slice(max(top - y, 0), min(top + height - y, tile_size[0]))
        across = slice(max(left - x, 0), min(left + width - x, tile_size[1]))
        if rows.start < rows.stop and across.start < across.stop:
            pieces.append(Piece(tile, rows, across, y + rows.start - top, x + across.start - left))
    return Spread(image, height, width, tuple(pieces))


def _numbered(sizes: Sizes) -> list[tuple[int, Size, bool]]:
    """(number in the batch, size, whether it is its sample's only image) of every image."""
    every = [(size, len(sample) == 1) for sample in sizes for size in sample]
    return [(number, size, alone) for number, (size, alone) in enumerate(every)]


def _check_count(found: int, expected: int, what: str) -> None:
    if found != expected:
        raise ValueError(
            f"the processor made {found} {what}, its settings say {expected}. "
            "Score with the processor that the checkpoint came with"
        )


def plain(pixels: PixelInputs, sizes: Sizes, processor: Any) -> list[Spread]:
    """(images, C, H, W). With do_pad the picture lies in the middle of a square, whose edges are left alone."""
    values = pixels["pixel_values"]
    images = _numbered(sizes)
    _check_count(len(values), len(images), "pictures")
    height, width = values.shape[-2:]
    if not (
        getattr(image_processor(processor), "do_pad", False)
        and hasattr(image_processor(processor), "pad_to_square")
    ):
        return [_whole(image, (image,), height, width) for image, _, _ in images]
    return [_in_square(image, (image,), size, height) for image, size, _ in images]


def _in_square(image: int, tile: tuple[int, ...], size: Size, side: int) -> Spread:
    """A picture that was padded to a square of its longer edge and then resized to `side` x `side`."""
    longest = max(size)
    top, left = ((longest - length) // 2 for length in size)
    edges = []
    for start, length in ((top, size[0]), (left, size[1])):
        first = ceil(start * side / longest)
        edges.append(slice(first, max(floor((start + length) * side / longest), first + 1)))
    rows, columns = edges
    return Spread(
        image, rows.stop - rows.start, columns.stop - columns.start, (Piece(tile, rows, columns, 0, 0),)
    )


def any_resolution(pixels: PixelInputs, sizes: Sizes, processor: Any) -> list[Spread]:
    """(images, 1 + tiles, C, H, W): the thumbnail first, then the tiles of the canvas that fits the image best.

    On its canvas the picture lies in the middle. With batch_num_images (LLaVA-OneVision) the images of a sample
    that has several are not tiled, but padded to squares.
    """
    values = pixels["pixel_values"]
    images = _numbered(sizes)
    _check_count(len(values), len(images), "tiled images")
    tile_size = tuple(values.shape[-2:])
    spreads = []
    for image, size, alone in images:
        if "batch_num_images" in pixels and not alone:
            spreads.append(_in_square(image, (image, 0), size, tile_size[0]))
            continue
        spreads.append(_whole(image, (image, 0), *tile_size))
        canvas = select_best_resolution(size, image_processor(processor).image_grid_pinpoints)
        if canvas[0] % tile_size[0] or canvas[1] % tile_size[1]:
            raise ValueError(f"image_grid_pinpoints {canvas} cannot be cut into tiles of {tile_size}")
        columns = canvas[1] // tile_size[1]
        tiles = [(image, 1 + number) for number in range(canvas[0] // tile_size[0] * columns)]
        if len(tiles) >= values.shape[1]:
            _check_count(values.shape[1] - 1, len(tiles), f"tiles of an image of {size[0]} x {size[1]}")
        spreads.append(_grid(image, tiles, columns, tile_size, _fitted(size, canvas)))
    return spreads


def _fitted(size: Size, canvas: Size) -> tuple[int, int, int, int]:
    """Top, left, height, width of an image scaled to fit a canvas, in its middle, as the processor rounds."""
    down, across = canvas[0] / size[0], canvas[1] / size[1]
    height = min(ceil(size[0] * across), canvas[0]) if across < down else canvas[0]
    width = canvas[1] if across < down else min(ceil(size[1] * down), canvas[1])
    return (canvas[0] - height) // 2, (canvas[1] - width) // 2, height, width


def optimal_canvas(pixels: PixelInputs, sizes: Sizes, processor: Any) -> list[Spread]:
    """(tiles, C, H, W): of each image its tiles row by row, then a thumbnail where there is more than one tile."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    values, maker = pixels["pixel_values"], image_processor(processor)
    tile_size = tuple(values.shape[-2:])
    given = getattr(processor, "images_kwargs", {})  # what the processor asks of its image processor
    split, least, most = (
        given.get(name, getattr(maker, name)) for name in ("crop_to_patches", "min_patches", "max_patches")
    )
    spreads, first = [], 0
    for image, size, _ in _numbered(sizes):
        columns, rows = (
            get_optimal_tiled_canvas(size, tile_size, least, most) if split and most > 1 else (1, 1)
        )
        tiles = [(first + number,) for number in range(rows * columns)]
        area = (0, 0, rows * tile_size[0], columns * tile_size[1])
        spreads.append(_grid(image, tiles, columns, tile_size, area))
        first += len(tiles)
        if len(tiles) > 1:
            spreads.append(_whole(image, (first,), *tile_size))
            first += 1
    _check_count(len(values), first, "tiles")
    return spreads


def masked_tiles(pixels: PixelInputs, sizes: Sizes, processor: Any) -> list[Spread]:
    """(samples, tiles, C, H, W): the images of a sample one after another, each its tiles and then a thumbnail.

    An image that is not split is one tile. pixel_attention_mask (samples, tiles, H, W) is 0 on padding, which lies
    below and to the right of a tile's pixels, and on all of the tiles that fill up a sample.
    """
    values = pixels["pixel_values"]
    mask = pixels.get("pixel_attention_mask")
    if mask is None:
        filled = (values != 0).flatten(2).any(-1)
        mask = filled[..., None, None].expand(*filled.shape, *values.shape[-2:])
    heights, widths = (edge.bool().sum(-1).tolist() for edge in (mask[..., :, 0], mask[..., 0, :]))
    spreads, image = [], 0
    for sample, images in enumerate(sizes):
        grids = [image_processor(processor).get_number_of_image_patches(*size, {})[1:] for size in images]
        expected = sum(rows * columns + 1 for rows, columns in grids)
        _check_count(sum(height > 0 for height in heights[sample]), expected, "tiles")
        tile = 0
        for rows, columns in grids:
            tiles = [(sample, tile + number) for number in range(rows * columns)]
            tile += len(tiles)
            if tiles:
                full = (heights[sample][tiles[0][1]], widths[sample][tiles[0][1]])
                height = sum(heights[sample][number] for _, number in tiles[::columns])
                width = sum(widths[sample][number] for _, number in tiles[:columns])
                spreads.append(_grid(image, tiles, columns, full, (0, 0, height, width)))
            spreads.append(_whole(image, (sample, tile), heights[sample][tile], widths[sample][tile]))
            tile, image = tile + 1, image + 1
    return spreads


# --- patches ---


class Patches:
    """Qwen's flattened patches: pixel_values (patches, C * T * p * p) and image_grid_thw (images, 3).

    Patches come block by block of merge x merge neighbours, blocks row by row; in a patch the order is channel, time,
    row, column. A still image is one step of T equal frames.
    """

    def take(self, pixels: PixelInputs, sizes: Sizes, processor: Any) -> list[Picture]:
        pictures, first = [], 0
        for image, (rows, columns) in enumerate(_patch_grids(pixels, sizes)):
            flat = pixels["pixel_values"][first : first + rows * columns]
            first += rows * columns
            blocks = _blocks(flat, rows, columns, processor)[:, :, :, :, :, 0]
            picture = blocks.permute(4, 0, 2, 5, 1, 3, 6)  # C, then rows and columns from coarse to fine
            side = blocks.shape[-1]
            pictures.append(Picture(image, picture.reshape(blocks.shape[4], rows * side, columns * side)))
        return pictures

    def put_back(
        self, pixels: PixelInputs, sizes: Sizes, processor: Any, pictures: Sequence[Tensor]
    ) -> PixelInputs:
        values, first = pixels["pixel_values"].clone(), 0
        for (rows, columns), picture in zip(_patch_grids(pixels, sizes), pictures, strict=True):
            flat = values[first : first + rows * columns]
            first += rows * columns
            blocks = _blocks(flat, rows, columns, processor)
            high, wide, merge, _, channels, _, side, _ = blocks.shape
            cut = picture.reshape(channels, high, merge, side, wide, merge, side).permute(1, 4, 2, 5, 0, 3, 6)
            blocks.copy_(cut.unsqueeze(5).expand_as(blocks))  # a view of `values`
        return pixels | {"pixel_values": values}

    def check(self, pixels: PixelInputs, sizes: Sizes, processor: Any) -> None:
        _patch_grids(pixels, sizes)


def _patch_grids(pixels: PixelInputs, sizes: Sizes) -> list[Size]:
    grids = pixels["image_grid_thw"].tolist()
    _check_count(len(grids), sum(map(len, sizes)), "patch grids")
    if any(time != 1 for time, _, _ in grids):
        raise ValueError(f"image_grid_thw {grids} holds a video; only still images have a null image")
    return [(rows, columns) for _, rows, columns in grids]


def _blocks(flat: Tensor, rows: int, columns: int, processor: Any) -> Tensor:
    """(rows * columns, C * T * p * p) seen as (rows / m, columns / m, m, m, C, T, p, p)."""
    maker = image_processor(processor)
    merge, side, frames = maker.merge_size, maker.patch_size, maker.temporal_patch_size
    shape = (rows // merge, columns // merge, merge, merge, -1, frames, side, side)
    return flat.view(shape)


PLAIN, ANY_RESOLUTION, OPTIMAL_CANVAS = Tiles(plain), Tiles(any_resolution), Tiles(optimal_canvas)
MASKED_TILES, PATCHES = Tiles(masked_tiles, keep_from_zero=True), Patches()
