"""Clean and null rows against each packed panel of the weight: one sweep for both, with the bits of linear_nll."""

from __future__ import annotations

import torch
from torch import Tensor

from vig_kernels.kernels.cpu import native


def why_not(device: torch.device) -> str | None:
    """None when this backend runs on tensors of `device`, else the reason and the cure."""
    return native.why_not(device)


def forward(
    hidden_image: Tensor,  # (N, D) float32 | bfloat16 | float16, any row stride
    hidden_null: Tensor,  # (N, D) same dtype
    weight: Tensor,  # (V, D) same dtype
    target: Tensor,  # (N,) int64
    bias: Tensor | None,  # (V,) same dtype or float32
    logit_scale: float,
    logit_softcap: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(vig, nll_image, nll_null), each (N,) float32 in nats, vig = nll_null - nll_image; ignored rows 0.0."""
    rows = hidden_image.shape[0]
    nll = hidden_image.new_zeros((2, rows), dtype=torch.float32)
    described, kept_bias = native.head(hidden_image, weight, bias, logit_scale, logit_softcap)
    target = target.contiguous()
    native.module().linear_nll(
        described,
        [native.rows_view(hidden_image, target), native.rows_view(hidden_null, target)],
        ignore_index,
        [nll.data_ptr(), 0, 0, 0, 0],
        torch.get_num_threads(),
    )
    del kept_bias  # read until here
    return nll[1] - nll[0], nll[0].clone(), nll[1].clone()
