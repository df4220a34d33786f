"""gaussian_blur in PyTorch: two products with banded matrices, the border folded into the matrix.

Row i of the vertical matrix holds the taps of output row i, each added at the sample that stands there once the
border is resolved, so a pass is exact for any radius. Output rows are taken in blocks, and a block is multiplied
only by the input rows that its taps reach: small sigma costs little on large images.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from vig_kernels.kernels.torch.precision import float32_products
from vig_kernels.kernels.torch.tiles import chunks
from vig_kernels.problem import Gaussian

BLOCK = 64  # output rows that share one dense piece of the band
CHUNK_BYTES = 12 << 20  # one float32 copy of the planes in work


def forward(images: Tensor, gaussian: Gaussian, out: Tensor) -> Tensor:
    """Fill and return out (L, C, H, W). `fast` is served by the exact products."""
    channels, height, width = images.shape[1:]
    sigma_y, sigma_x, truncate, border, _ = gaussian
    together = max(1, CHUNK_BYTES // (4 * channels * height * width))
    with float32_products(torch.float32):
        for first, last in _runs(sigma_y.tolist(), sigma_x.tolist(), together):
            image = images[first:last].float()
            for axis, sigma in ((-1, float(sigma_x[first])), (-2, float(sigma_y[first]))):
                if math.ceil(truncate * sigma) > 0:
                    image = _blur_axis(image, axis, sigma, truncate, border)
            out[first:last] = image.round().clamp_(0, 255) if out.dtype == torch.uint8 else image
    return out


def _runs(sigma_y: list[float], sigma_x: list[float], most: int):
    """(first, last) of neighbouring images with equal sigmas, at most `most` of them."""
    first = 0
    for at in range(1, len(sigma_y) + 1):
        full = at == len(sigma_y) or at - first == most
        if full or (sigma_y[at], sigma_x[at]) != (sigma_y[first], sigma_x[first]):
            yield first, at
            first = at


def _blur_axis(image: Tensor, axis: int, sigma: float, truncate: float, border: str) -> Tensor:
    result = torch.empty(image.shape, dtype=torch.float32, device=image.device)
    for part in chunks(image.shape[axis], BLOCK):
        low, band = _band(part.start, part.stop, image.shape[axis], sigma, truncate, border)
        band = band.to(image.device, non_blocking=True)
        if axis == -1:
            result[..., part] = image[..., low : low + band.shape[1]] @ band.T
        else:
            result[..., part, :] = band @ image[..., low : low + band.shape[1], :]
    return result


@functools.lru_cache(maxsize=256)
def _band(start: int, stop: int, size: int, sigma: float, truncate: float, border: str) -> tuple[int, Tensor]:
    """(low, float32 (stop - start, n)): weights of input rows low ... low + n - 1 in output rows start ... stop - 1."""
    radius = math.ceil(truncate * sigma)
    offsets = torch.arange(-radius, radius + 1, device="cpu")
    taps = torch.exp((offsets.double() / sigma).square() / -2.0)
    source = _edge(torch.arange(start, stop, device="cpu").unsqueeze(1) + offsets, size, border)
    low = int(source.min())
    band = torch.zeros(stop - start, int(source.max()) - low + 1, dtype=torch.float64, device="cpu")
    band.scatter_add_(1, source - low, (taps / taps.sum()).expand(stop - start, -1))
    return low, band.float()


def _edge(index: Tensor, size: int, border: str) -> Tensor:
    """The sample that stands at each index: replicated, or reflected without repeating the edge."""
    if border == "replicate" or size == 1:
        return index.clamp(0, size - 1)
    index = index % (2 * size - 2)
    return torch.minimum(index, 2 * size - 2 - index)
