"""The masked loss and its gradients in one native sweep: three matrix products, kept logits of a chunk of rows only."""

from __future__ import annotations

import torch
from torch import Tensor

from vig_kernels.kernels.cpu import native
from vig_kernels.problem import HeadProblem, Needs


def forward_backward(
    problem: HeadProblem,
    row_weight: Tensor | None,  # (N,) float32
    z_loss: float,
    needs: Needs,
    values: dict[str, Tensor] | None = None,  # (N,) tensors to fill: any of nll, lse, entropy, argmax
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(loss_sum, grad_hidden, grad_weight, grad_bias), loss_sum = sum_n w_n (nll_n + z_loss lse_n^2).

    Rows that are ignored keep what stands in `values`.

    Gradients are those of loss_sum; what is not needed is None and costs nothing. float32, but those of bfloat16
    inputs are rounded as they are stored (float32 buffers of their size would cost as much as the products; rows of
    several chunks need one for the weight). The range of bfloat16 is that of float32: a later factor loses nothing
    to it.
    bfloat16 inputs multiply bfloat16 softmax gradients where the CPU has the instruction; float16 ones stay float32.
    """
    stored = torch.bfloat16 if problem.weight.dtype == torch.bfloat16 else torch.float32
    grads = native.gradients(problem, needs, stored)
    described, kept_bias = native.head(problem)
    target = problem.target.contiguous()
    row_weight = None if row_weight is None else row_weight.float().contiguous()
    loss = native.module().linear_cross_entropy(
        described,
        native.rows_view(problem.hidden, target),
        problem.ignore_index,
        (native.address(row_weight), z_loss),
        [native.address(x) for x in grads],
        stored == torch.bfloat16,
        native.outputs(values or {}),
        torch.get_num_threads(),
    )
    del kept_bias  # read until here
    return torch.tensor(loss, dtype=torch.float32, device="cpu"), *grads
