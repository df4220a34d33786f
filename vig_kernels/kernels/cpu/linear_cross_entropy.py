"""The masked loss and its gradients in one native sweep: three matrix products, kept logits of a chunk of rows only."""

from __future__ import annotations

import torch
from torch import Tensor

from vig_kernels.kernels.cpu import native


def why_not(device: torch.device) -> str | None:
    """None when this backend runs on tensors of `device`, else the reason and the cure."""
    return native.why_not(device)


def forward_backward(
    hidden: Tensor,  # (N, D) float32 | bfloat16 | float16, any row stride
    weight: Tensor,  # (V, D) same dtype
    target: Tensor,  # (N,) int64
    bias: Tensor | None,  # (V,) same dtype or float32
    row_weight: Tensor | None,  # (N,) float32
    logit_scale: float,
    logit_softcap: float | None,
    ignore_index: int,
    z_loss: float,
    num_kept: int | None,  # not needed on a CPU: rows are counted as they are compacted
    needs: tuple[bool, bool, bool],  # hidden, weight, bias
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(loss_sum, grad_hidden, grad_weight, grad_bias), loss_sum = sum_n w_n (nll_n + z_loss lse_n^2).

    Gradients are those of loss_sum; what is not needed is None and costs nothing. float32, but those of bfloat16
    inputs are rounded as they are stored (float32 buffers of their size would cost as much as the products; rows of
    several chunks need one for the weight). The range of bfloat16 is that of float32: a later factor loses nothing
    to it.
    bfloat16 inputs multiply bfloat16 softmax gradients where the CPU has the instruction; float16 ones stay float32.
    """
    stored = torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32
    grad_hidden = hidden.new_zeros(hidden.shape, dtype=stored) if needs[0] else None
    grad_weight = native.empty_gradient(weight, stored) if needs[1] else None
    grad_bias = (
        weight.new_empty(weight.shape[0], dtype=torch.float32) if needs[2] and bias is not None else None
    )
    described, kept_bias = native.head(hidden, weight, bias, logit_scale, logit_softcap)
    target = target.contiguous()
    row_weight = None if row_weight is None else row_weight.float().contiguous()
    loss = native.module().linear_cross_entropy(
        described,
        native.rows_view(hidden, target),
        ignore_index,
        native.address(row_weight),
        z_loss,
        [native.address(x) for x in (grad_hidden, grad_weight, grad_bias)],
        stored == torch.bfloat16,
        torch.get_num_threads(),
    )
    del kept_bias  # read until here
    return torch.tensor(loss, dtype=torch.float32, device="cpu"), grad_hidden, grad_weight, grad_bias
