"""gaussian_blur by Triton: two products with banded matrices, on tensor cores.

    mid = K_x @ image.T        (W, H)        out = K_y @ mid.T        (H, W)

One kernel does both: it multiplies a matrix with the transpose of what it reads, so the second launch turns the
picture upright again, and both store along contiguous lines. The border is folded into the matrices, and a tile
visits only the columns of its band. Planes run in chunks whose intermediate stays in the L2 cache.

Samples are addressed through tables, offset = plane[p] + row[y] + column[x], so that strided images, tiles of a
cut picture and Qwen's flattened patches are all read and written where they lie.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vig_kernels.problem import Gaussian

from .launch import cdiv, compute_precision, device_guard
from .logit_tiles import narrow
from .tile_configs import blur_config

INTERMEDIATE_BYTES = 16 * 2**20
CACHED_BYTES = 4 * 2**20


@triton.jit
def band_kernel(
    matrix,  # (operators, SIZE_OUT, stride_matrix): rows of K, zero beyond SIZE_IN
    operator_of,  # (planes,) int32
    radius_of,  # (operators,) int32
    source,
    source_plane,  # (planes,) int64 element offsets, like the next ones
    source_line,  # (lines,)
    source_step,  # (size,) along the contraction
    out,
    out_plane,
    out_row,  # (size,)
    out_column,  # (lines,)
    centre_of,  # (planes,) float32 or None: read (x - centre) * factor
    factor_of,  # (planes,) float32 or None
    size,  # of the blurred axis, in and out
    lines,  # of the other axis
    stride_matrix,
    row_tiles,
    line_tiles,
    BLOCK_R: tl.constexpr,  # rows of the matrix
    BLOCK_L: tl.constexpr,  # lines of the source
    BLOCK_K: tl.constexpr,
    ENTER: tl.constexpr,  # scale what is read
    LEAVE: tl.constexpr,  # undo it in what is written
    SOURCE_UNIT: tl.constexpr,  # source_step is 0, 1, 2, ...
    OUT_UNIT: tl.constexpr,  # out_column is 0, 1, 2, ...
    SOURCE_DIVISOR: tl.constexpr,  # of source_plane and source_line: what lets 16 bytes be read at once
    OUT_DIVISOR: tl.constexpr,  # of out_plane and out_row
    PRECISION: tl.constexpr,
):
    """out[row, line] = sum_k K[row, k] source[line, k] of one tile of one plane."""
    pid = tl.program_id(0)
    tiles = row_tiles * line_tiles
    plane = pid // tiles
    row = ((pid % tiles) // line_tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
    line = ((pid % tiles) % line_tiles) * BLOCK_L + tl.arange(0, BLOCK_L)
    k = tl.arange(0, BLOCK_K)
    operator = tl.load(operator_of + plane)
    radius = tl.load(radius_of + operator)
    matrix_ptr = matrix + (operator.to(tl.int64) * size + tl.minimum(row, size - 1))[:, None] * stride_matrix
    at = source + tl.multiple_of(tl.load(source_plane + plane), SOURCE_DIVISOR)
    at_line = tl.multiple_of(tl.load(source_line + line, mask=line < lines, other=0), SOURCE_DIVISOR)
    if ENTER or LEAVE:
        centre = tl.load(centre_of + plane)
        factor = tl.load(factor_of + plane)

    first = ((pid % tiles) // line_tiles) * BLOCK_R
    low = tl.maximum(first - radius, 0) // BLOCK_K * BLOCK_K
    high = tl.minimum(first + BLOCK_R + radius, size)  # reflected taps fall back inside the same band
    accumulator = tl.zeros((BLOCK_R, BLOCK_L), dtype=tl.float32)
    for start in range(low, high, BLOCK_K):
        index = start + k
        a = tl.load(matrix_ptr + index[None, :], mask=index[None, :] < stride_matrix, other=0.0)
        if SOURCE_UNIT:
            step = index.to(tl.int64)
        else:
            step = tl.load(source_step + index, mask=index < size, other=0)
        there = (line < lines)[:, None] & (index < size)[None, :]
        x = tl.load(at + at_line[:, None] + step[None, :], mask=there, other=0)
        if ENTER:  # a sample that is not there enters as whatever it is: its taps are 0
            x = (x.to(tl.float32) - centre) * factor
        accumulator = tl.dot(a, tl.trans(x.to(a.dtype)), accumulator, input_precision=PRECISION)

    if LEAVE:
        accumulator = accumulator / factor + centre
    if out.dtype.element_ty == tl.uint8:
        # adding and taking away 1.5 * 2^23 rounds half to even
        accumulator = (accumulator + 12582912.0) - 12582912.0
        accumulator = tl.minimum(tl.maximum(accumulator, 0.0), 255.0)
    to_row = tl.multiple_of(tl.load(out_row + row, mask=row < size, other=0), OUT_DIVISOR)
    if OUT_UNIT:
        to_column = line.to(tl.int64)
    else:
        to_column = tl.load(out_column + line, mask=line < lines, other=0)
    to = out + tl.multiple_of(tl.load(out_plane + plane), OUT_DIVISOR) + to_row[:, None] + to_column[None, :]
    tl.store(
        to, narrow(accumulator, out.dtype.element_ty), mask=(row < size)[:, None] & (line < lines)[None, :]
    )


class Addresses(NamedTuple):
    """Element offsets of sample (p, y, x): plane[p] + row[y] + column[x], int64 on the device of the samples."""

    plane: Tensor  # (P,)
    row: Tensor  # (H,)
    column: Tensor  # (W,)
    unit: bool  # column is 0, 1, 2, ...
    divisor: int  # a power of two up to 16 that divides every plane and row


@functools.lru_cache(maxsize=32)
def strided_addresses(shape: tuple[int, ...], strides: tuple[int, ...], device: torch.device) -> Addresses:
    """Addresses of an (L, C, H, W) view. Made on the CPU: a copy from there is finished when it returns, so that calls
    on other streams find it so."""
    ranges = [torch.arange(n, device="cpu") * s for n, s in zip(shape, strides, strict=True)]
    plane = (ranges[0][:, None] + ranges[1]).reshape(-1)
    divisor = math.gcd(16, *strides[:3])
    return Addresses(*(t.to(device) for t in (plane, ranges[2], ranges[3])), strides[3] == 1, divisor)


def patch_addresses(
    grid: tuple[int, int, int],  # temporal, rows, columns of patches: one row of image_grid_thw
    patch: int,
    merge: int,
    channels: int,
    temporal: int,
    first: int,  # index of the picture's first patch in pixel_values
    device: torch.device,
) -> Addresses:
    """Addresses of one picture in Qwen's pixel_values (patches, channels * temporal * patch * patch).

    Patches stand in the order (t, row / merge, column / merge, row % merge, column % merge), and the index splits
    into a sum of a function of the row and one of the column. Planes: t, channel, frame of the temporal patch.
    """
    times, rows, columns = grid
    length = channels * temporal * patch * patch
    y, x = torch.arange(rows * patch, device=device), torch.arange(columns * patch, device=device)
    gy, gx = y // patch, x // patch
    row = (gy // merge * columns * merge + gy % merge * merge) * length + y % patch * patch
    column = (gx // merge * merge * merge + gx % merge) * length + x % patch
    t = torch.arange(times, device=device) * (rows * columns) + first
    frame = torch.arange(channels * temporal, device=device) * patch * patch
    return Addresses((t[:, None] * length + frame).reshape(-1), row, column, unit=False, divisor=1)


def band_matrix(size: int, sigma: float, truncate: float, border: str) -> tuple[Tensor, int]:
    """K (size, size) float64 with the border folded in, and its radius: K[i, edge(i + k)] += g_k."""
    radius = math.ceil(truncate * sigma)
    k = torch.arange(-radius, radius + 1, dtype=torch.float64, device="cpu")
    taps = torch.exp((k / sigma).square() / -2.0) if sigma > 0 else torch.ones_like(k)
    index = torch.arange(size, device="cpu")[:, None] + k.long()
    if border == "replicate" or size == 1:
        index = index.clamp(0, size - 1)
    else:
        index = index.remainder(2 * size - 2)
        index = torch.minimum(index, 2 * size - 2 - index)
    matrix = torch.zeros(size, size, dtype=torch.float64, device="cpu")
    return matrix.scatter_add_(1, index, (taps / taps.sum()).expand(size, -1)), radius


def operators(sigmas, planes: int, size: int, truncate: float, border: str, dtype, device):
    """(matrices (U, size, padded), operator of each plane (planes x L,) int32, radii (U,) int32) on the device.

    sigmas: one per leading image; each distinct one has one matrix. Small sets are kept for the next call.
    """
    distinct = sorted(set(sigmas))
    keep = len(distinct) * size * size * 4 <= CACHED_BYTES
    make = _kept_operators if keep else _kept_operators.__wrapped__
    return make(tuple(sigmas), planes, size, truncate, border, dtype, device)


@functools.lru_cache(maxsize=8)
def _kept_operators(sigmas, planes, size, truncate, border, dtype, device):
    distinct = sorted(set(sigmas))
    bands = [band_matrix(size, sigma, truncate, border) for sigma in distinct]
    matrices = torch.zeros(len(bands), size, cdiv(size, 16) * 16, dtype=dtype, device="cpu")
    for matrix, (band, _) in zip(matrices, bands, strict=True):
        matrix[:, :size] = band
    place = {sigma: i for i, sigma in enumerate(distinct)}
    which = torch.tensor([place[s] for s in sigmas], dtype=torch.int32, device="cpu").repeat_interleave(
        planes
    )
    radii = torch.tensor([radius for _, radius in bands], dtype=torch.int32, device="cpu")
    return matrices.to(device), which.to(device), radii.to(device)


class Samples(NamedTuple):
    """Samples of planes and where they lie; `values` is any tensor that holds them, its data pointer is offset 0."""

    values: Tensor
    at: Addresses

    def planes(self, part: slice) -> Samples:
        return self._replace(at=self.at._replace(plane=self.at.plane[part]))


class Scaling(NamedTuple):
    """(x - centre) * factor of each plane, where a launch reads samples (enter); undone where it writes (leave)."""

    centre: Tensor | None = None  # (P,) float32
    factor: Tensor | None = None  # (P,) float32
    enter: bool = False
    leave: bool = False


def launch_band(
    bands: tuple[Tensor, Tensor, Tensor], source: Samples, out: Samples, scaling: Scaling
) -> None:
    """One product with the banded matrices (`operators`), along the columns of `source`, into the rows of `out`."""
    matrices, which, radii = bands
    lines, size = len(source.at.row), len(source.at.column)

    def run(config):
        row_tiles, line_tiles = cdiv(size, config.block_n), cdiv(lines, config.block_v)
        band_kernel[(row_tiles * line_tiles * len(source.at.plane),)](
            matrices, which, radii, source.values, *source.at[:3], out.values, *out.at[:3], *scaling[:2],
            size, lines, matrices.stride(1), row_tiles, line_tiles,
            BLOCK_R=config.block_n, BLOCK_L=config.block_v, BLOCK_K=config.block_k, ENTER=scaling.enter,
            LEAVE=scaling.leave, SOURCE_UNIT=source.at.unit, OUT_UNIT=out.at.unit,
            SOURCE_DIVISOR=source.at.divisor, OUT_DIVISOR=out.at.divisor,
            PRECISION=compute_precision(matrices), **config.launch_options,
        )  # fmt: skip

    run(blur_config(matrices, size, lines, run))


def blur_at(
    source: Samples,
    out: Samples,  # may be `source`
    gaussian: Gaussian,  # one strength for each leading image: P / (planes of an image)
    value_range: tuple[Tensor, Tensor] | None = None,  # lowest and highest value, (L,) each: "fast" needs it
) -> Tensor:
    """Blur every plane of `source` into `out`, whose tensor is returned."""
    P, H, W = (len(offsets) for offsets in source.at[:3])
    sigma_y, sigma_x, truncate, border, precision = gaussian
    planes, device = P // len(sigma_y), out.values.device
    fast = precision == "fast"
    dtype = torch.float16 if fast else torch.float32
    by_x = operators(sigma_x.tolist(), planes, W, truncate, border, dtype, device)
    by_y = operators(sigma_y.tolist(), planes, H, truncate, border, dtype, device)
    scaling = scaling_of(value_range, planes) if fast else Scaling()
    chunk = max(1, min(P, INTERMEDIATE_BYTES // (H * W * dtype.itemsize)))
    mid = Samples(
        torch.empty(chunk, W, H, dtype=dtype, device=device),
        strided_addresses((chunk, 1, W, H), (W * H, 0, H, 1), device),
    )
    with device_guard(device):
        for first in range(0, P, chunk):
            part = slice(first, min(first + chunk, P))
            x, y = ((matrices, which[part], radii) for matrices, which, radii in (by_x, by_y))
            some = Scaling(scaling.centre[part], scaling.factor[part]) if fast else scaling
            between = mid.planes(slice(part.stop - first))
            launch_band(x, source.planes(part), between, some._replace(enter=fast))
            launch_band(y, between, out.planes(part), some._replace(leave=fast))
    return out.values


def scaling_of(value_range: tuple[Tensor, Tensor], planes: int) -> Scaling:
    """Into [-1, 1], where float16 is at its finest."""
    low, high = (bound.to(torch.float32) for bound in value_range)
    centre = (low + high) / 2
    # and what a mask reads as 0, far from the range as it may be, stays finite in float16
    factor = torch.minimum(2 / (high - low).clamp_min(1e-30), 3e4 / centre.abs().clamp_min(1e-30))
    return Scaling(centre.repeat_interleave(planes), factor.repeat_interleave(planes))


def forward(
    images: Tensor,  # (L, C, H, W), any strides
    gaussian: Gaussian,
    out: Tensor,  # (L, C, H, W) of the same dtype, any strides; may be `images`
) -> Tensor:
    """Fill and return `out`. Extra memory: 16 MiB of intermediate (one plane, where that is more) and the matrices."""
    value_range = None
    if gaussian.precision == "fast":
        if images.dtype == torch.uint8:
            value_range = tuple(images.new_full((images.shape[0],), v, dtype=torch.float32) for v in (0, 255))
        else:
            value_range = images.amin((1, 2, 3)), images.amax((1, 2, 3))
    source, to = (
        Samples(tensor, strided_addresses(tuple(tensor.shape), tensor.stride(), tensor.device))
        for tensor in (images, out)
    )
    return blur_at(source, to, gaussian, value_range)
