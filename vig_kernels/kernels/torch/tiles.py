"""Tiles of logits, (rows, columns) of at most 8 MiB in float32, and the rows that they are formed of.

A tile's products are summed in blocks of 256 steps, always in float32: 16-bit chunks are upcast first, which is exact.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vig_kernels.problem import HeadProblem

BLOCK = 256  # steps of a float32 sum over D; longer ones miss the accuracy promise
TILE_BYTES = 8 << 20  # one float32 tile of hidden, of weight or of logits


def chunks(size: int, step: int) -> Iterator[slice]:
    return (slice(at, min(at + step, size)) for at in range(0, size, step))


def tile_shape(width: int) -> tuple[int, int]:
    """(rows, columns) of a tile: a function of D alone, so that a row's tiles do not depend on other rows."""
    fit = max(16, TILE_BYTES // (4 * width))
    return min(1024, fit), min(2048, fit)


def compact(problem: HeadProblem) -> Tensor | None:
    """Indices of the rows to work on; None for all of them (on a GPU without num_kept, counting would stall)."""
    target, ignore_index, num_kept = problem.target, problem.ignore_index, problem.num_kept
    if target.device.type == "cpu":
        kept = (target != ignore_index).nonzero().squeeze(1)
        return None if kept.numel() == target.numel() else kept
    if num_kept is None or num_kept >= target.numel():
        return None
    # a stable sort puts the kept rows first, in order; nothing is read back to the host
    return torch.argsort((target == ignore_index).byte(), stable=True)[:num_kept]


def gather_rows(matrix: Tensor, kept: Tensor | None, part: slice) -> Tensor:
    """A float32 copy of rows `part` (of the kept rows): always fresh memory, so bits do not vary with alignment."""
    taken = matrix[part] if kept is None else matrix.index_select(0, kept[part])
    return taken.to(torch.float32, copy=kept is None)


def logits_tile(
    hidden: Tensor, weight: Tensor, columns: slice, problem: HeadProblem, out: Tensor | None = None
) -> Tensor:
    """Float32 logits of a tile of a problem; hidden (n, D) and weight (v, D) are the tile's, in float32."""
    if out is None:
        out = hidden.new_empty(hidden.shape[0], weight.shape[0])
    for part in chunks(hidden.shape[1], BLOCK):
        out.addmm_(hidden[:, part], weight[:, part].T, beta=1 if part.start else 0)
    if problem.bias is not None:
        out.add_(problem.bias[columns].float())
    if problem.logit_scale != 1.0:
        out.mul_(problem.logit_scale)
    if problem.logit_softcap is not None:
        out.div_(problem.logit_softcap).tanh_().mul_(problem.logit_softcap)
    return out


def finite_or_zero(top: Tensor) -> Tensor:
    """A row maximum that can be subtracted: rows whose logits are all -inf so far have none."""
    return torch.where(top == float("-inf"), 0.0, top)


def rounding_of_sum(a: Tensor, b: Tensor, total: Tensor) -> Tensor:
    """a + b - total for total = a + b as float32 rounds it, exactly (Knuth); 0 where total is not finite."""
    b_part = total - a
    low = (a - (total - b_part)) + (b - b_part)
    return torch.where(total.isfinite(), low, 0.0)
