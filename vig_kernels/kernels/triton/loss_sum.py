"""The loss of all rows in one launch: weights, z_loss, divisor and the check of num_kept go into one sum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vig_kernels.problem import HeadProblem

from .launch import device_guard

SUM_BLOCK, SUM_WARPS = 4096, 8  # rows that the one program reads at a time


@triton.jit(
    do_not_specialize=["N", "num_kept", "ignore_index"],
    do_not_specialize_on_alignment=["nll", "lse", "row_weight", "target", "count", "reciprocal", "loss"],
)
def loss_kernel(
    nll,  # (N,) float32, 0 for an ignored row
    lse,  # (N,) float32, likewise, or None: no z_loss
    row_weight,  # (N,) float32 or None
    target,  # (N,) int64
    count,  # () int64, how many rows are kept, or None: they need no check
    reciprocal,  # () float32 or None
    loss,  # () float32
    N,
    num_kept,
    ignore_index,
    z_loss,
    scale,
    BLOCK: tl.constexpr,
):
    """loss = scale reciprocal sum_n w_n (nll_n + z_loss lse_n^2), 0 where a factor is 0, NaN where more than num_kept
    rows are kept. One program."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, N, BLOCK):
        row = start + lane
        inside = row < N
        term = tl.load(nll + row, mask=inside, other=0.0)
        if lse is not None:
            row_lse = tl.load(lse + row, mask=inside, other=0.0)
            term += z_loss * row_lse * row_lse
        if row_weight is not None:
            w = tl.load(row_weight + row, mask=inside, other=0.0)
            words = tl.load(target + row, mask=inside, other=ignore_index)
            term = tl.where((words != ignore_index) & (w != 0.0), term * w, 0.0)
        total += term
    found = tl.sum(total, axis=0)
    if count is not None:
        found = tl.where(tl.load(count) > num_kept, float("nan"), found)
    factor = scale
    if reciprocal is not None:
        factor = factor * tl.load(reciprocal)
    tl.store(loss, tl.where(factor == 0.0, 0.0, found * factor))


def loss_of(
    problem: HeadProblem,
    row_weight: Tensor | None,  # (N,) float32
    z_loss: float,
    values: dict[str, Tensor],  # nll and lse, (N,) float32
    count: Tensor | None,  # () int64 where more rows may be kept than the problem's num_kept
    divisor: tuple[float, Tensor | None],  # (scale, reciprocal)
) -> Tensor:
    """() float32, the loss of `loss_kernel`."""
    scale, reciprocal = divisor
    loss = problem.target.new_empty((), dtype=torch.float32)
    with device_guard(loss.device):
        loss_kernel[(1,)](
            values["nll"], values["lse"] if z_loss else None, row_weight, problem.target, count, reciprocal, loss,
            problem.target.shape[0], problem.num_kept or 0, problem.ignore_index, z_loss, scale,
            BLOCK=SUM_BLOCK, num_warps=SUM_WARPS,
        )  # fmt: skip
    return loss
