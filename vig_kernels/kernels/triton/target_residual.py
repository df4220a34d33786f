"""What rounding a block of d loss / d y to 16 bits loses at each row's target, given back in float32.

At the target the gradient is near -1 and its rounding is by far the largest of the row: 2^-9 in bfloat16, while the
other entries, probabilities, are small and so are their roundings. The kernels that write a block leave
residual = exact - rounded of that one entry, and what it owes,

    grad_hidden[n] += residual[n] weight[target[n]]          grad_weight[target[n]] += residual[n] hidden[n],

is N x D work, against N x D x V. Rows of one target are added in their order by one program: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, interpreted


@triton.jit(do_not_specialize=["rows", "V"], do_not_specialize_on_alignment=["residual", "target"])
def correct_hidden_kernel(
    total,  # (rows, D) float32, added to
    weight,  # (V, D)
    residual,  # (rows,) float32
    target,  # (rows,) int64; nothing is owed where it is outside [0, V)
    stride_total,
    stride_weight,
    rows,
    V,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """total[n] += residual[n] weight[target[n]]. Grid: (row tiles, blocks of D)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    word = tl.load(target + row, mask=row < rows, other=-1)
    known = (word >= 0) & (word < V)
    lost = tl.load(residual + row, mask=known, other=0.0)
    mask = known[:, None] & (column < D)[None, :]
    w = tl.load(weight + word[:, None] * stride_weight + column[None, :], mask=mask, other=0.0).to(tl.float32)
    to = total + row[:, None] * stride_total + column[None, :]
    tl.store(to, tl.load(to, mask=mask, other=0.0) + lost[:, None] * w, mask=mask)


@triton.jit(do_not_specialize=["entries", "low", "high"], do_not_specialize_on_alignment=["residual"])
def correct_weight_kernel(
    total,  # (high - low, D) float32, added to
    hidden,  # (N, D)
    residual,  # (entries,) float32, in the order of `target`
    target,  # (entries,) int64, ascending
    row_of,  # (entries,) int64: the row of `hidden`
    stride_total,
    stride_hidden,
    entries,
    low,
    high,
    D,
    ENTRIES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """total[target] += residual hidden[row], for targets in [low, high). Grid: (tiles of ENTRIES, blocks of D).

    A program goes through its few entries; at a target's first one it adds all of them, BLOCK_R at a time, also
    those beyond its own. Where a vocabulary comes in chunks most programs find no entry in the range and return.
    """
    tile = tl.program_id(0) * ENTRIES
    mine = tile + tl.arange(0, ENTRIES)
    words = tl.load(target + mine, mask=mine < entries, other=-1)
    if tl.sum(((words >= low) & (words < high)).to(tl.int32), axis=0) == 0:
        return
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    for first in range(tile, tl.minimum(tile + ENTRIES, entries)):
        word = tl.load(target + first)
        before = tl.load(target + first - 1, mask=first > 0, other=-1)
        start = tl.where((word >= low) & (word < high) & (word != before), first, entries)
        if start < entries:
            sums = tl.zeros((BLOCK_D,), dtype=tl.float32)
            while start < entries:
                entry = start + tl.arange(0, BLOCK_R)
                there = entry < entries
                # three loads, none of which waits for another
                row = tl.load(row_of + entry, mask=there, other=0)
                lost = tl.load(residual + entry, mask=there, other=0.0)
                same = tl.load(target + entry, mask=there, other=-1) == word
                at = hidden + row[:, None] * stride_hidden + column[None, :]
                h = tl.load(at, mask=same[:, None] & (column < D)[None, :], other=0.0).to(tl.float32)
                sums += tl.sum(h * tl.where(same, lost, 0.0)[:, None], axis=0)
                more = tl.sum(same.to(tl.int32), axis=0) == BLOCK_R
                start = tl.where(more, start + BLOCK_R, entries)
            to = total + (word - low) * stride_total + column
            tl.store(to, tl.load(to, mask=column < D, other=0.0) + sums, mask=column < D)


BLOCK_N, BLOCK_D = 16, 256  # of correct_hidden_kernel
ENTRIES, BLOCK_R, BLOCK_W = 4, 16, 512  # of correct_weight_kernel: 3000 rows of one word are 188 steps
WEIGHT_WARPS = 8


def block_of(D: int, most: int = BLOCK_D) -> int:
    """Columns of a program; the interpreter takes a row at once."""
    return triton.next_power_of_2(D) if interpreted() else most


class TargetResidual:
    """The residuals of n rows, and the way back into the gradients of hidden and weight."""

    def __init__(self, target: Tensor, ignore_index: int):
        """target: (n,) int64, of the rows of the block."""
        self.lost = torch.zeros(target.shape[0], dtype=torch.float32, device=target.device)
        self.target = target.masked_fill(target == ignore_index, -1)
        self.sorted, self.order = torch.sort(self.target, stable=True)

    def correct_hidden(self, total: Tensor, weight: Tensor, first: int = 0) -> None:
        """total (m, D), the hidden gradient of rows first, first + 1, ...: += lost weight[target]."""
        (rows, D), V, block = total.shape, weight.shape[0], block_of(total.shape[1])
        correct_hidden_kernel[(cdiv(rows, BLOCK_N), cdiv(D, block))](
            total, weight, self.lost[first:], self.target[first:], total.stride(0), weight.stride(0), rows, V, D,
            BLOCK_N=BLOCK_N, BLOCK_D=block, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip

    def correct_weight(
        self, total: Tensor, hidden: Tensor, rows: Tensor | None = None, first_vocab: int = 0
    ) -> None:
        """total (v, D), the weight gradient of words first_vocab, ...: += lost hidden, over their rows.

        rows: where the rows of the block stand in `hidden`; None where they are its rows.
        """
        (words, D), entries, block = total.shape, self.order.shape[0], block_of(total.shape[1], BLOCK_W)
        lost = self.lost[self.order]
        row_of = self.order if rows is None else rows[self.order]
        correct_weight_kernel[(cdiv(entries, ENTRIES), cdiv(D, block))](
            total, hidden, lost, self.sorted, row_of, total.stride(0), hidden.stride(0), entries,
            first_vocab, first_vocab + words, D, ENTRIES=ENTRIES, BLOCK_R=BLOCK_R, BLOCK_D=block,
            num_warps=WEIGHT_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
