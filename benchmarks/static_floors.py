"""Counted floors: arithmetic and bytes of each op, and the time that a named GPU cannot go below. Not measurements.

A floor is max(arithmetic / peak, bytes / bandwidth), with the dense peaks and bandwidths of the makers' data sheets.
float32 is three TF32 products on NVIDIA (tf32x3) and the float32 matrix rate on MI300X.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vig_kernels.kernels.triton.linear_cross_entropy import chunk_rows
from vig_kernels.kernels.triton.tile_configs import BLUR, HEAD, NARROW
from vig_kernels.ops.linear_cross_entropy import GPU_MIB, MIB


@dataclass(frozen=True)
class GPU:
    name: str
    target: str
    bf16: float  # FLOP/s, dense
    float32: float  # FLOP/s of the float32 path of these kernels
    bandwidth: float  # bytes/s
    processors: int  # multiprocessors, or compute units
    clock: float  # cycles/s at which bf16 and float32 hold


GPUS = (
    GPU("A100 SXM 80 GB", "sm_80", 312e12, 156e12 / 3, 2.039e12, 108, 1.41e9),
    GPU("H100 SXM", "sm_90", 989e12, 495e12 / 3, 3.35e12, 132, 1.83e9),
    GPU("H200 SXM", "sm_90", 989e12, 495e12 / 3, 4.8e12, 132, 1.83e9),
    GPU("B200", "sm_100", 2250e12, 1125e12 / 3, 8.0e12, 148, 1.85e9),
    GPU("MI300X", "gfx942", 1307e12, 163e12, 5.3e12, 304, 2.1e9),
)
# (N, D, V, model)
HEADS = (
    (8192, 4096, 32064, "LLaVA-1.5-7B"),
    (8192, 2048, 151936, "Qwen2.5-VL-3B"),
    (8192, 576, 49280, "SmolVLM-256M"),
    (8192, 2560, 262208, "Gemma 3 4B"),
    (8192, 4096, 151936, "the published H100 comparisons"),
    (256, 4096, 32064, "LLaVA-1.5-7B, one small batch"),
)
# (planes, H, W, sigma)
BLURS = ((3 * 16, 336, 336, 33.6), (3 * 16, 384, 384, 38.4), (3 * 16, 896, 896, 89.6))


def score(N: int, D: int, V: int, target: str, size: int, passes: int = 1) -> tuple[float, float]:
    """(FLOP, bytes) of linear_nll, or with passes = 2 of linear_vig: weight and hidden once, partials out and in."""
    kind = "float32" if size == 4 else "16-bit"
    tile = HEAD["fold", target, kind][D <= NARROW]
    partials = 2 * 8 * passes * N * math.ceil(V / (tile.block_v // tile.parts))
    return 2.0 * passes * N * D * V, float(size * (V * D + passes * N * D) + partials)


def train(N: int, D: int, V: int, target: str, size: int) -> tuple[float, float]:
    """(FLOP, bytes) of linear_cross_entropy: three GEMMs; the block five times, the weight gradient once a chunk."""
    rows = train_rows(N, D, V, target, size)
    chunks = math.ceil(N / rows)
    block = 5 * size * N * V  # written, read and written by the epilogue, read by two GEMMs
    if kept_whole(N, D, V, target, size):  # the backward writes the gradient itself
        weight = 3 * size * V * D
    else:  # the first chunk writes the float32 sums, the others add to them, the backward casts
        weight = chunks * 2 * size * V * D + (8 * chunks - 4) * V * D + (4 + size) * V * D * (size == 2)
    return 6.0 * N * D * V, float(block + weight + 4 * size * N * D)


def train_rows(N: int, D: int, V: int, target: str, size: int) -> int:
    """Rows of a chunk of linear_cross_entropy with memory="fast", all rows kept and told, both gradients wanted."""
    tile = HEAD["store", target, "float32" if size == 4 else "16-bit"][D <= NARROW]
    dtype = torch.float32 if size == 4 else torch.bfloat16
    part = tile.block_v // tile.parts
    return chunk_rows(N, N, D, V, dtype, (True, True, False), part, GPU_MIB * MIB)


def kept_whole(N: int, D: int, V: int, target: str, size: int) -> bool:
    """Whether the block of all rows is kept for the backward (bfloat16 alone)."""
    return size == 2 and train_rows(N, D, V, target, size) == N


def blur(planes: int, H: int, W: int, sigma: float, target: str, size: int) -> tuple[float, float]:
    """(FLOP, bytes) of gaussian_blur with the bands its tiles visit; not the intermediate, which stays in L2."""
    tile = BLUR[target, "float32" if size == 4 else "16-bit"]
    radius = math.ceil(3 * sigma)

    def band(n: int) -> int:
        """Columns visited, summed over the row tiles of an n x n matrix."""
        total = 0
        for first in range(0, n, tile.block_n):
            low = max(0, first - radius) // tile.block_k * tile.block_k
            total += math.ceil((min(n, first + tile.block_n + radius) - low) / tile.block_k) * tile.block_k
        return total * tile.block_n

    return 2.0 * planes * (band(W) * H + band(H) * W), 2.0 * planes * H * W * size


def floors() -> list[dict]:
    """One row an op, shape, dtype and GPU."""
    found = []
    for gpu in GPUS:
        for dtype, size, peak in (("bfloat16", 2, gpu.bf16), ("float32", 4, gpu.float32)):
            for N, D, V, model in HEADS:
                shape = {"N": N, "D": D, "V": V, "model": model}
                found.append(floor("linear_nll", gpu, dtype, peak, shape, *score(N, D, V, gpu.target, size)))
                found.append(
                    floor("linear_vig", gpu, dtype, peak, shape, *score(N, D, V, gpu.target, size, 2))
                )
                found.append(
                    floor("linear_cross_entropy", gpu, dtype, peak, shape, *train(N, D, V, gpu.target, size))
                )
            for planes, H, W, sigma in BLURS:
                shape = {"planes": planes, "H": H, "W": W, "sigma": sigma}
                found.append(
                    floor(
                        "gaussian_blur", gpu, dtype, peak, shape, *blur(planes, H, W, sigma, gpu.target, size)
                    )
                )
    return found


def floor(op: str, gpu: GPU, dtype: str, peak: float, shape: dict, flop: float, moved: float) -> dict:
    by_arithmetic, by_bytes = flop / peak * 1e3, moved / gpu.bandwidth * 1e3
    return {
        "op": op, "gpu": gpu.name, "dtype": dtype, **shape,
        "gflop": round(flop / 1e9, 1), "mib": round(moved / 2**20, 1),
        "arithmetic_ms": float(f"{by_arithmetic:.3g}"), "bytes_ms": float(f"{by_bytes:.3g}"),
        "floor_ms": float(f"{max(by_arithmetic, by_bytes):.3g}"),
    }  # fmt: skip


def lines() -> list[str]:
    """The floors as text."""
    text = ["", "Floors counted from arithmetic and bytes, not measured:"]
    for f in floors():
        shape = " x ".join(str(f[name]) for name in ("N", "D", "V", "planes", "H", "W") if name in f)
        text.append(
            f"  {f['gpu']:15s} {f['op']:21s} {f['dtype']:9s} {shape:24s} arithmetic {f['arithmetic_ms']:8.3g} ms, "
            f"bytes {f['bytes_ms']:8.3g} ms"
        )
    return text
