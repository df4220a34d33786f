"""Makes Triton's interpreter multiply each row of a tile by itself.

It calls numpy's matmul, and OpenBLAS's kernels for CPUs with AVX2 alone add up a row in an order that depends on its
place in the tile. On a GPU, as with the kernels for AVX-512, it does not, and the tests compare bits.
"""

from __future__ import annotations

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

whole_tiles = InterpreterBuilder.create_dot


def create_dot(builder, a, b, total, *options):
    """(M, K) @ (K, N) + (M, N) as M products of (1, K) and (K, N)."""
    found = whole_tiles(builder, _with_axis(a, -2), _with_axis(b, -3), _with_axis(total, -2), *options)
    return TensorHandle(found.data[..., 0, :], found.dtype)


def _with_axis(handle, axis: int):
    return TensorHandle(np.expand_dims(handle.data, axis), handle.dtype)


def install() -> None:
    InterpreterBuilder.create_dot = create_dot
