"""Separable Gaussian blur in C++: every product in float32, any strides in and out, one sigma per image."""

from __future__ import annotations

import torch
from torch import Tensor

from vig_kernels.kernels.cpu import native


def why_not(device: torch.device) -> str | None:
    """None when this backend runs on tensors of `device`, else the reason and the cure."""
    return native.why_not(device)


def forward(
    images: Tensor,  # (L, C, H, W) uint8 | float32 | bfloat16 | float16, any strides
    sigma_y: Tensor,  # (L,) float64, pixels
    sigma_x: Tensor,  # (L,) float64, pixels
    truncate: float,
    border: str,  # "reflect" | "replicate"
    precision: str,  # both values get the float32 result here
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
        (sigma_y.tolist(), sigma_x.tolist()),
        truncate,
        border == "replicate",
        torch.get_num_threads(),
    )
    return out if target is out else out.copy_(target)


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors may share memory."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
