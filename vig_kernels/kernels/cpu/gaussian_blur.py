"""Separable Gaussian blur in C++: every product in float32, any strides in and out, one sigma per image."""

from __future__ import annotations

import torch
from torch import Tensor

from vig_kernels.kernels.cpu import native
from vig_kernels.problem import Gaussian


def forward(
    images: Tensor,  # (L, C, H, W) uint8 | float32 | bfloat16 | float16, any strides
    gaussian: Gaussian,  # either precision gets the float32 result here
    out: Tensor,  # (L, C, H, W) of the same dtype, any strides
) -> Tensor:
    """Fill `out` with the blurred images and return it: error under 2e-6 of the value range before the final cast.

    The same bits on any number of threads. `out` may share memory with `images`.
    """
    target = torch.empty_like(out) if _overlap(images, out) else out
    native.module().gaussian_blur(
        native.forced_isa(),
        native.dtype_name(images),
        list(images.shape),
        (images.data_ptr(), native.byte_strides(images)),
        (target.data_ptr(), native.byte_strides(target)),
        (gaussian.sigma_y.tolist(), gaussian.sigma_x.tolist()),
        gaussian.truncate,
        gaussian.border == "replicate",
        torch.get_num_threads(),
    )
    return out if target is out else out.copy_(target)


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors may share memory."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
