"""The order in which rows are visited, the kept ones first, made on the device: nothing is read back."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import device_guard

SMALL_ROWS, ORDER_BLOCK = 32768, 4096  # up to so many rows one program orders them, so many at a time
ORDER_WARPS = 16  # in 4, a block's ranks spill


class RowChunk(NamedTuple):
    """Rows [first, first + rows) of an order. Those at or beyond `count`, which the device alone knows, are ignored."""

    order: Tensor  # (N,) int64: the kept rows first
    count: Tensor  # () int64: how many are kept
    first: int
    rows: int


@triton.jit(do_not_specialize=["N", "ignore_index"], do_not_specialize_on_alignment=["target"])
def order_kernel(
    target,  # (N,) int64
    order,  # (N,) int64
    count,  # () int64
    N,
    ignore_index,
    BLOCK: tl.constexpr,
):
    """order = kept rows, then ignored ones, each group in its own order; count = how many are kept. One program."""
    lane = tl.arange(0, BLOCK)
    kept = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, N, BLOCK):
        words = tl.load(target + start + lane, mask=start + lane < N, other=ignore_index)
        kept += (words != ignore_index).to(tl.int32)
    total = tl.sum(kept, axis=0)
    tl.store(count, total.to(tl.int64))
    before = total * 0  # kept rows of earlier blocks
    for start in range(0, N, BLOCK):
        row = start + lane
        words = tl.load(target + row, mask=row < N, other=ignore_index)
        live = (words != ignore_index).to(tl.int32)
        rank = before + tl.cumsum(live, axis=0)  # kept rows up to and with this one
        place = tl.where(live != 0, rank - 1, total + row - rank)
        tl.store(order + place, row.to(tl.int64), mask=row < N)
        before += tl.sum(live, axis=0)


def compaction_order(target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """order (N,) int64, the kept rows first and each group in its own order, and count () int64, on the device.

    A kernel learns from `count` which of its tiles have nothing to do.
    """
    N = target.shape[0]
    order, count = target.new_empty(N), target.new_empty(())
    _fill(order, count, target.contiguous(), ignore_index)
    return order, count


def order_in_one(target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """`compaction_order`, and the one tensor (N + 1,) in which both stand, one behind the other."""
    N = target.shape[0]
    visit = target.new_empty(N + 1)
    order, count = visit.as_strided((N,), (1,)), visit.as_strided((), (), N)
    _fill(order, count, target.contiguous(), ignore_index)
    return order, count, visit


def _fill(order: Tensor, count: Tensor, target: Tensor, ignore_index: int) -> None:
    N = target.shape[0]
    if N <= SMALL_ROWS:
        with device_guard(target.device):
            order_kernel[(1,)](
                target, order, count, N, ignore_index, BLOCK=ORDER_BLOCK, num_warps=ORDER_WARPS
            )
        return
    kept = target != ignore_index
    rank = torch.cumsum(kept, 0)
    index = torch.arange(N, device=target.device)
    place = torch.where(kept, rank - 1, count.copy_(rank[-1]) + index - rank)
    order.scatter_(0, place, index)
