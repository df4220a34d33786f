"""linear_cross_entropy by Triton: the scalar loss with its gradients in three GEMMs.

Row chunk by row chunk: `fold_kernel` of linear_nll leaves exp(z - part max) in a float16 (float32) block, and
its partials; once they are joined the block becomes d loss / d y in place, and the vendor's GEMM takes it to the
gradients of hidden and weight. A chunk is as long as the budget allows, because every chunk reads and writes the
float32 weight gradient once. Where one chunk holds all rows, the block of a bfloat16 problem is kept instead, and
the backward forms both gradients from it (kept_block.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vig_kernels.problem import HeadProblem, Needs

from .kept_block import block_gradients  # noqa: F401  (the op's backward asks this module for it)
from .launch import as_read, cdiv, dense, device_guard, silence
from .linear_nll import sweep
from .logit_fold import Partials, combine, fold
from .logit_gradients import accumulate, columns_of, loss_scale_of, padded, stored_scale
from .logit_tiles import narrow
from .loss_sum import loss_of
from .row_order import RowChunk, order_in_one
from .target_residual import TargetResidual
from .tile_configs import TileConfig, head_config

MIB = 2**20
SPARE_BYTES = 16 * MIB  # of a budget: for what is not counted here
NARROWEST_PART = 64  # columns of a part under any tile of the table
FINISH_ROWS = 16  # rows of a program of `finish_kernel`, hence of a partial of the bias gradient
LSE_MARGIN = 100.0  # what |lse| is taken to be where float16's range is set; 64 times more still fits
# a kept row is stored times this: were it 1, a row of hidden times a factor within 2^-8 of 1 would round back to itself
ROW_SCALE = tl.constexpr(0.70710678)


@triton.jit(
    do_not_specialize=["first_row", "rows", "parts", "V"],
    do_not_specialize_on_alignment=[
        "target_slope", "nll", "lse", "lse_lo", "row_weight", "target", "order", "count", "loss_scale", "residual",
        "row_factor",
    ],
)  # fmt: skip
def finish_kernel(
    weights,  # (rows, V): exp(z - partial_max) * dz/dy, float32 or float16
    block,  # the same memory, in the type of hidden: loss_scale * d loss / d y
    partial_max,  # (parts, rows) float32
    target_slope,  # (rows,) float32: dz/dy of the target, or None: no cap
    nll,  # (N,) float32
    lse,  # (N,) float32
    lse_lo,  # (N,) float32: what float32 cannot hold of lse
    row_weight,  # (N,) float32 or None
    target,  # (N,) int64
    order,  # (N,) int64
    count,  # () int64
    loss_scale,  # () float32, or None: logit_scale
    partial_bias,  # (row tiles, V) float32 or None: sums of d loss / d y over the tile's rows
    residual,  # (rows,) float32 or None: what `block` loses at the target (target_residual.py)
    row_factor,  # (rows,) float32 or None: what a row of `block` is still to be multiplied by (kept_block.py)
    logit_scale,
    stride_block,
    first_row,
    rows,
    parts,
    V,
    z_loss,
    PART: tl.constexpr,  # columns of a part, as in the fold
    BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """d/dy of w (nll + z_loss lse^2) = w (p (1 + 2 z_loss lse) - [v = target]) dz/dy. Grid: row tiles x parts."""
    part = tl.program_id(0) % parts
    row_tile = tl.program_id(0) // parts
    local = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    column = part * PART + tl.arange(0, PART)
    inside = local < rows
    live = inside & (local < tl.load(count) - first_row)
    row = tl.load(order + first_row + local, mask=live, other=0)
    w = live.to(tl.float32)
    if row_weight is not None:
        w = tl.load(row_weight + row, mask=live, other=0.0)
    row_lse = tl.load(lse + row, mask=live, other=0.0)
    row_lse_lo = tl.load(lse_lo + row, mask=live, other=0.0)
    slope = w * (1.0 + 2.0 * z_loss * row_lse)  # d loss / d log-sum-exp
    top = tl.load(partial_max + part.to(tl.int64) * rows + local, mask=live, other=0.0)
    at = local.to(tl.int64)[:, None] * stride_block + column[None, :]
    writable = inside[:, None] & (column < V)[None, :]
    e = tl.load(weights + at, mask=live[:, None] & (column < V)[None, :], other=0.0).to(tl.float32)
    g = e * (tl.exp((top - row_lse) - row_lse_lo) * slope)[:, None]

    # at the target from nll, not from a weight that may have been rounded to 16 bits: w (p (1 + 2 z_loss lse) - 1)
    wanted = tl.load(target + row, mask=live, other=-1)
    known = live & (wanted >= 0) & (wanted < V)
    pull = tl.exp(-tl.load(nll + row, mask=known, other=0.0)) * slope - w
    if SOFTCAP:
        pull *= tl.load(target_slope + local, mask=known, other=0.0)
    hit = (column[None, :] == wanted[:, None]) & known[:, None]
    g = tl.where(hit, pull[:, None], g)
    g = tl.where(
        live[:, None], g, 0.0
    )  # also where a row that is not there holds what an old block left behind
    if partial_bias is not None:
        sums = row_tile.to(tl.int64) * V + column
        tl.store(partial_bias + sums, tl.sum(g, axis=0), mask=column < V)
    scale = stored_scale(loss_scale, logit_scale)
    g *= scale
    if row_factor is not None:  # every part forms it from the same numbers
        exact = tl.where(known, pull * scale, 0.0)
        rounded = narrow(exact * ROW_SCALE, block.dtype.element_ty).to(tl.float32)
        ratio = tl.where(tl.abs(rounded) > 1e-30, exact / rounded, 1.0)
        g /= ratio[:, None]
        tl.store(row_factor + local, ratio, mask=inside & (local * 0 + part == 0))
    stored = narrow(g, block.dtype.element_ty)
    tl.store(block + at, stored, mask=writable)
    if residual is not None:
        lost = tl.sum(tl.where(hit, g - stored.to(tl.float32), 0.0), axis=1)
        here = known & (wanted >= part * PART) & (wanted < part * PART + PART)
        tl.store(residual + local, lost, mask=here)


class LossTerms(NamedTuple):
    """What makes the loss of the rows' values, and what its gradients are stored multiplied by."""

    row_weight: Tensor | None  # (N,) float32
    z_loss: float
    loss_scale: Tensor | None  # () float32, or None: logit_scale


class Formed(NamedTuple):
    """The loss of the rows and what its gradients are made of; None where nothing is needed."""

    loss: Tensor  # () float32
    # float32, not normalised; of hidden (N, D) and weight (V, D) None too where a block is kept instead
    grad_hidden: Tensor | None
    grad_weight: Tensor | None
    grad_bias: Tensor | None  # (V,)
    block: Tensor | None = None  # (rows, padded(V)) bfloat16: logit_scale * d loss / d y of the kept rows
    # (rows,) float32: what the rows of `block` are still to be multiplied by
    row_factor: Tensor | None = None
    visit: Tensor | None = None  # (N + 1,) int64: the order of the rows, and how many are kept


def kept_rows(problem: HeadProblem, needs: Needs, budget: int) -> int:
    """Rows of the block that is kept for the backward; 0 where the gradients are formed in the forward.

    A function of sizes alone, not of a tile: the fake op asks it too. float16 gradients need their own scale, and
    float32 sums are the gradient itself.
    """
    if not needs[1] or problem.hidden.dtype != torch.bfloat16:
        return 0
    (N, D), V = problem.hidden.shape, problem.weight.shape[0]
    kept = N if problem.num_kept is None else min(N, problem.num_kept)
    fits = kept and chunk_rows(kept, N, D, V, problem.hidden.dtype, needs, NARROWEST_PART, budget) == kept
    return kept if fits else 0


def forward_backward(
    problem: HeadProblem,
    row_weight: Tensor | None,  # (N,) float32
    z_loss: float,
    needs: Needs,
    budget: int,  # bytes
    divisor: tuple[float, Tensor | None] = (1.0, None),  # (scale, reciprocal)
) -> Formed:
    """scale reciprocal loss_sum, () float32, and the gradients of loss_sum = sum_n w_n (nll_n + z_loss lse_n^2) in
    float32.

    With num_kept the GEMMs see the kept rows alone; without it ignored rows are multiplied as zeros, since how
    many there are is known on the device only. More kept rows than num_kept give a NaN loss.
    Extra memory: the budget, the float32 hidden gradient of 16-bit inputs and a kept block included; and the float32
    weight gradient where none is kept.
    """
    problem, (row_weight,) = as_read(problem), dense(row_weight)
    target = problem.target
    (N, D), V, num_kept = problem.hidden.shape, problem.weight.shape[0], problem.num_kept
    order, count, visit = order_in_one(target, problem.ignore_index)
    kept = kept_rows(problem, needs, budget)
    every = RowChunk(order, count, 0, N if num_kept is None else min(N, num_kept))
    wide = {"dtype": torch.float32, "device": target.device}
    fresh = torch.empty if every.rows == N else torch.zeros  # rows that no chunk has are not written
    grads: list[Tensor | None] = [
        fresh(N, D, **wide) if needs.hidden and not kept else None,
        # the first chunk writes it
        (torch.empty if every.rows else torch.zeros)(V, D, **wide) if needs.weight and not kept else None,
        torch.zeros(V, **wide) if needs.bias else None,
    ]
    block = row_factor = None
    if not any(needs):
        (values,) = sweep(problem, ("lse",))
    else:
        values = {name: fresh(N, **wide) for name in ("nll", "lse", "lse_lo")}

        def bound():
            largest = torch.ones_like(values["nll"][:1]) if row_weight is None else row_weight.abs()
            return largest * (1 + 2 * abs(z_loss) * LSE_MARGIN)

        loss_scale, unscale = loss_scale_of(bound, problem)
        terms = LossTerms(row_weight, z_loss, loss_scale)
        with device_guard(target.device):
            if kept:
                block, row_factor = train_whole(problem, terms, every, values, grads)
            elif every.rows:
                train_chunks(problem, terms, every, values, grads, budget)
        for gradient in grads[:2]:
            if gradient is not None and unscale is not None:
                gradient.mul_(unscale)
        if needs.bias:
            grads[2].mul_(problem.logit_scale)
    loss = loss_of(problem, row_weight, z_loss, values, count if every.rows < N else None, divisor)
    return Formed(loss, *grads, *((block, row_factor, visit) if kept else ()))


def chunk_rows(kept: int, N: int, D: int, V: int, dtype: torch.dtype, needs, part: int, budget: int) -> int:
    """Rows of a chunk, as many as the budget allows: every chunk reads and writes the float32 weight gradient.

    The float32 hidden gradient of 16-bit inputs is held for all rows; that of float32 ones is the gradient itself.
    """
    size = dtype.itemsize
    need_hidden, need_weight, need_bias = map(int, needs)  # symbols take no bool as a factor
    held = 64 * N + (4 * N * D if need_hidden and size == 2 else 0)
    row = size * padded(V) + 8 * -(-V // part) + 64  # block, partials, what is one number a row
    row += max(4 * D * need_hidden, size * D * need_weight)  # sums of a chunk, then its rows gathered
    if need_bias:
        row += 4 * -(-V // FINISH_ROWS)
    rows = (budget - SPARE_BYTES - held) // row
    if kept <= rows:
        return kept
    tile = 128 if rows >= 512 else 64  # whole tiles, where what is cut off is little
    return rows // tile * tile if rows > tile else max(1, rows)


def train_whole(
    problem: HeadProblem,
    terms: LossTerms,
    every: RowChunk,  # all rows to be worked on
    values: dict[str, Tensor],  # nll, lse, lse_lo: filled
    grads: list[Tensor | None],  # of hidden and weight (None), and bias: filled
) -> tuple[Tensor, Tensor]:
    """(block, row_factor) of all rows at once, for the gradients that the backward forms."""
    hidden, V = problem.hidden, problem.weight.shape[0]
    storage = hidden.new_empty(every.rows, padded(V))
    block = columns_of(storage, V)
    if block is not storage:
        storage[:, V:].zero_()

    def trial(config):
        fold_weights(problem, every, config, block)

    config = head_config("store", problem.weight, problem.logit_softcap is not None, trial)
    row_factor = hidden.new_empty(every.rows, dtype=torch.float32)
    train_chunk(problem, terms, every, config, block, values, grads, row_factor)
    return storage, row_factor


def train_chunks(
    problem: HeadProblem,
    terms: LossTerms,
    every: RowChunk,  # all rows to be worked on, at least one
    values: dict[str, Tensor],  # nll, lse, lse_lo: filled
    grads: list[Tensor | None],  # of hidden, weight and bias: filled
    budget: int,
) -> None:
    """The loss's values and gradients, chunk of rows by chunk of rows."""
    hidden, V = problem.hidden, problem.weight.shape[0]
    needs = Needs(*(gradient is not None for gradient in grads))

    def chunk_of(config):
        part = config.block_v // config.parts
        return chunk_rows(every.rows, *hidden.shape, V, hidden.dtype, needs, part, budget)

    def trial(config):
        rows = chunk_of(config)
        fold_weights(problem, every._replace(rows=rows), config, hidden.new_empty(rows, padded(V))[:, :V])

    config = head_config("store", problem.weight, problem.logit_softcap is not None, trial)
    most = chunk_of(config)
    storage = hidden.new_empty(most, padded(V))
    for first in range(0, every.rows, most):
        chunk = every._replace(first=first, rows=min(most, every.rows - first))
        train_chunk(problem, terms, chunk, config, storage[: chunk.rows, :V], values, grads)


def fold_weights(problem: HeadProblem, chunk: RowChunk, config: TileConfig, block: Tensor) -> Partials:
    """The fold of a chunk, which leaves its weights in `block`: in (0, 1] relative to their part's maximum, so that
    float16 holds them with 3 bits more than bfloat16."""
    partials = Partials(chunk.rows, 1, problem.weight.shape[0], config, (), block.device)
    fold(
        problem,
        None,
        chunk,
        partials,
        config,
        block if block.dtype == torch.float32 else block.view(torch.float16),
    )
    return partials


def train_chunk(
    problem: HeadProblem,
    terms: LossTerms,
    chunk: RowChunk,
    config: TileConfig,
    block: Tensor,  # (rows, V): loss_scale * d loss / d y afterwards
    values: dict[str, Tensor],
    grads: list[Tensor | None],
    row_factor: Tensor | None = None,  # (rows,) float32: filled, and the block is kept
) -> None:
    """Values and gradients of one chunk."""
    partials = fold_weights(problem, chunk, config, block)
    combine(problem, chunk, partials, values)
    residual = None
    if row_factor is None:
        picked = chunk.order[chunk.first : chunk.first + chunk.rows]
        if block.dtype != torch.float32:
            residual = TargetResidual(problem.target[picked], problem.ignore_index)
    lost = None if residual is None else residual.lost
    bias_sums = finish(
        problem, terms, chunk, partials, values, block, (lost, row_factor), grads[2] is not None
    )
    partials = None  # freed before the sums are made
    if bias_sums is not None:
        grads[2] += bias_sums
    if row_factor is None:
        add_gradients(problem, block, picked, residual, grads, chunk.first == 0)


def add_gradients(
    problem: HeadProblem,
    block: Tensor,  # (rows, V): loss_scale * d loss / d y
    picked: Tensor,  # (rows,) int64: the rows of the problem
    residual: TargetResidual | None,
    grads: list[Tensor | None],
    first: bool,  # the first chunk writes the weight gradient, the others add to it
) -> None:
    """The products of a block: what it adds to the gradients of hidden and weight."""
    (grad_hidden, grad_weight, _), hidden, weight = grads, problem.hidden, problem.weight
    if grad_hidden is not None:
        total = torch.empty(len(picked), hidden.shape[1], dtype=torch.float32, device=hidden.device)
        accumulate(total, block, weight, first=True)
        if residual is not None:
            residual.correct_hidden(total, weight)
        grad_hidden.index_copy_(0, picked, total)
        del total  # before the rows of hidden are gathered
    if grad_weight is not None:
        some = problem.take(picked)
        accumulate(grad_weight, block.T, silence(some.hidden, some.target, some.ignore_index), first)
        del some
        if residual is not None:
            residual.correct_weight(grad_weight, hidden, picked)


def finish(
    problem: HeadProblem,
    terms: LossTerms,
    chunk: RowChunk,
    partials: Partials,
    values: dict[str, Tensor],
    block: Tensor,  # (rows, V): weights of the fold in, loss_scale * d loss / d y out
    # residual and row_factor, (rows,) float32, of which one is filled
    at_target: tuple[Tensor | None, Tensor | None],
    bias_sums: bool,
) -> Tensor | None:
    """Launch `finish_kernel`; with `bias_sums` the column sums of d loss / d y are returned."""
    (rows, V), softcap = block.shape, problem.logit_softcap is not None
    row_tiles = cdiv(rows, FINISH_ROWS)
    weights = block if block.dtype == torch.float32 else block.view(torch.float16)
    partial = torch.empty(row_tiles, V, dtype=torch.float32, device=block.device) if bias_sums else None
    finish_kernel[(row_tiles * partials.parts,)](
        weights, block, partials.max, partials.target[1] if softcap else None, values["nll"], values["lse"],
        values["lse_lo"], terms.row_weight, problem.target, chunk.order, chunk.count, terms.loss_scale, partial,
        *at_target, problem.logit_scale, block.stride(0), chunk.first, rows, partials.parts, V,
        terms.z_loss, PART=partials.part, BLOCK_N=FINISH_ROWS, SOFTCAP=softcap,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return partial.sum(0) if bias_sums else None
