"""linear_cross_entropy by Triton: the scalar loss with its gradients in three GEMMs.

Row chunk by row chunk: `fold_kernel` of linear_nll leaves exp(z - part max) in a float16 (float32) block, and
its partials; once they are joined the block becomes d loss / d y in place, and the vendor's GEMM takes it to the
gradients of hidden and weight. A chunk is as long as the memory promise allows, because every chunk reads and
writes the float32 weight gradient once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import compaction_order, dense, device_guard, silence, why_not
from .linear_nll import sweep
from .logit_fold import Partials, combine, fold
from .logit_gradients import accumulate, loss_scale_of
from .logit_tiles import narrow
from .target_residual import TargetResidual
from .tile_configs import head_config

__all__ = ["forward_backward", "why_not"]

EXTRA_BYTES = 240 * 2**20  # of the promised 256 MiB: all that a chunk takes, and what is held for all rows
FINISH_ROWS = 16  # rows of a program of `finish_kernel`, hence of a partial of the bias gradient
LSE_MARGIN = 100.0  # what |lse| is taken to be where float16's range is set; 64 times more still fits


@triton.jit(do_not_specialize=["first_row", "rows", "parts", "V"])
def finish_kernel(
    weights,  # (rows, V): exp(z - partial_max) * dz/dy, float32 or float16
    block,  # the same memory, in the type of hidden: loss_scale * d loss / d y
    partial_max,  # (parts, rows) float32
    target_slope,  # (rows,) float32: dz/dy of the target
    nll,  # (N,) float32
    lse,  # (N,) float32
    lse_lo,  # (N,) float32: what float32 cannot hold of lse
    row_weight,  # (N,) float32 or None
    target,  # (N,) int64
    order,  # (N,) int64
    count,  # () int64
    loss_scale,  # () float32
    partial_bias,  # (row tiles, V) float32 or None: sums of d loss / d y over the tile's rows
    residual,  # (rows,) float32 or None: what `block` loses at the target (target_residual.py)
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
    g *= tl.load(loss_scale)
    stored = narrow(g, block.dtype.element_ty)
    tl.store(block + at, stored, mask=writable)
    if residual is not None:
        lost = tl.sum(tl.where(hit, g - stored.to(tl.float32), 0.0), axis=1)
        here = known & (wanted >= part * PART) & (wanted < part * PART + PART)
        tl.store(residual + local, lost, mask=here)


def forward_backward(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) int64
    bias: Tensor | None,  # (V,)
    row_weight: Tensor | None,  # (N,) float32
    logit_scale: float,
    logit_softcap: float | None,
    ignore_index: int,
    z_loss: float,
    num_kept: int | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """loss_sum = sum_n w_n (nll_n + z_loss lse_n^2), () float32, and its gradients in float32, not normalised.

    With `num_kept` the GEMMs see the kept rows alone; without it ignored rows are multiplied as zeros, since how
    many there are is known on the device only. More kept rows than `num_kept` give a NaN loss.
    Extra memory: 240 MiB, the float32 hidden gradient of 16-bit inputs included; and the float32 weight gradient.
    """
    N, (V, D) = target.shape[0], weight.shape
    target, bias, row_weight = dense(target, bias, row_weight)
    order, count = compaction_order(target, ignore_index)
    nll, lse, rest = (torch.zeros(N, dtype=torch.float32, device=target.device) for _ in range(3))
    grads = [
        torch.zeros(shape, dtype=torch.float32, device=target.device) if need else None
        for shape, need in zip(((N, D), (V, D), (V,)), needs, strict=True)
    ]
    if not any(needs):
        nll, values = sweep(
            (hidden,), weight, target, bias, logit_scale, logit_softcap, ignore_index, ("lse",)
        )[0]
        lse = values["lse"]
    else:
        bound = torch.ones_like(nll[:1]) if row_weight is None else row_weight.abs()
        bound = bound * (1 + 2 * abs(z_loss) * LSE_MARGIN)
        loss_scale, unscale = loss_scale_of(bound, logit_scale, hidden.dtype)
        options = (bias, row_weight, logit_scale, logit_softcap, ignore_index, z_loss)
        with device_guard(hidden.device):
            kept = N if num_kept is None else min(N, num_kept)
            values = {"nll": nll, "lse": lse, "lse_lo": rest}
            train_chunks(hidden, weight, target, order, count, kept, loss_scale, values, grads, options)
        for gradient in grads[:2]:
            if gradient is not None and unscale is not None:
                gradient.mul_(unscale)
        if needs[2]:
            grads[2].mul_(logit_scale)
    losses = nll + z_loss * lse * lse if z_loss else nll
    if row_weight is not None:
        losses = torch.where((target == ignore_index) | (row_weight == 0), 0.0, losses * row_weight)
    loss = losses.sum()
    if num_kept is not None:
        loss = torch.where(count > num_kept, torch.nan, loss)
    return loss, *grads


def chunk_rows(kept: int, N: int, D: int, V: int, dtype: torch.dtype, needs, part: int) -> int:
    """Rows of a chunk, as many as EXTRA_BYTES allow: every chunk reads and writes the float32 weight gradient.

    For 16-bit inputs the float32 hidden gradient is held, twice the size of the gradient that it becomes; for
    float32 ones it is the gradient.
    """
    size, (need_hidden, need_weight, need_bias) = dtype.itemsize, needs
    held = 64 * N + (2 * N * D if need_hidden and size == 2 else 0)
    row = size * padded(V) + 8 * triton.cdiv(V, part) + 64  # block, partials, what is one number a row
    row += max(4 * D * need_hidden, size * D * need_weight)  # sums of a chunk, then its rows gathered
    if need_bias:
        row += 4 * triton.cdiv(V, FINISH_ROWS)
    rows = max(1, min(kept, (EXTRA_BYTES - held) // row))
    tile = 128 if rows >= 512 else 64  # whole tiles, where what is cut off is little
    return rows // tile * tile if rows > tile else rows


def padded(V: int) -> int:
    """Columns of a block: its rows start on 16-byte borders, as the GEMM likes them."""
    return triton.cdiv(V, 16) * 16


def train_chunks(hidden, weight, target, order, count, kept, loss_scale, values, grads, options):
    """Fill `values` (nll, lse, lse_lo) and add to the gradients, over the first `kept` rows of `order`."""
    bias, row_weight, logit_scale, logit_softcap, ignore_index, z_loss = options
    (V, D), (grad_hidden, grad_weight, grad_bias) = weight.shape, grads
    wide = hidden.dtype == torch.float32
    needs = tuple(gradient is not None for gradient in grads)

    def chunk_of(config):
        return chunk_rows(kept, *hidden.shape, V, hidden.dtype, needs, config.block_v // config.parts)

    def weights_of(storage):
        # a weight in (0, 1] relative to its part's maximum: float16 holds it with 3 bits more than bfloat16
        return storage if wide else storage.view(torch.float16)

    def run(first, rows, config, weights):
        partials = Partials(rows, 1, V, config, (), hidden.device)
        fold(
            (hidden,), weight, target, bias, order, count, first, rows, partials, weights[:rows, :V],
            logit_scale, logit_softcap, config,
        )  # fmt: skip
        return partials

    def trial(config):
        rows = chunk_of(config)
        run(0, rows, config, weights_of(hidden.new_empty(rows, padded(V))))

    if not kept:
        return
    config = head_config("store", weight, logit_softcap is not None, trial)
    chunk = chunk_of(config)
    storage = hidden.new_empty(chunk, padded(V))
    weights = weights_of(storage)
    for first in range(0, kept, chunk):
        rows = min(chunk, kept - first)
        block = storage[:rows, :V]
        partials = run(first, rows, config, weights)
        combine(partials, target, order, count, values["nll"], values, first, rows, 0, 1, V)
        picked = order[first : first + rows]
        residual = None if wide else TargetResidual(target[picked], ignore_index)
        bias_sums = finish(
            weights, block, partials, values, row_weight, target, order, count, loss_scale, first,
            logit_softcap is not None, z_loss, grad_bias is not None, residual,
        )  # fmt: skip
        if grad_hidden is not None:
            total = torch.zeros(rows, D, dtype=torch.float32, device=hidden.device)
            accumulate(total, block, weight)
            if residual is not None:
                residual.correct_hidden(total, weight)
            grad_hidden.index_copy_(0, picked, total)
            del total  # before the rows of hidden are gathered
        if grad_weight is not None:
            rows_of_chunk = silence(hidden.index_select(0, picked), target[picked], ignore_index)
            accumulate(grad_weight, block.T, rows_of_chunk)
            del rows_of_chunk
            if residual is not None:
                residual.correct_weight(grad_weight, hidden, picked)
        if grad_bias is not None:
            grad_bias += bias_sums
        partials = residual = bias_sums = None  # freed before their successors are made


def finish(
    weights, block, partials, values, row_weight, target, order, count, loss_scale, first, softcap, z_loss, bias_sums,
    residual,
):  # fmt: skip
    """Launch `finish_kernel`; returns the column sums of d loss / d y, or None."""
    rows, V = block.shape
    row_tiles = triton.cdiv(rows, FINISH_ROWS)
    partial = torch.empty(row_tiles, V, dtype=torch.float32, device=block.device) if bias_sums else None
    finish_kernel[(row_tiles * partials.parts,)](
        weights, block, partials.max, partials.target[1], values["nll"], values["lse"], values["lse_lo"],
        row_weight, target, order, count, loss_scale, partial, None if residual is None else residual.lost,
        block.stride(0), first, rows, partials.parts, V, z_loss,
        PART=partials.part, BLOCK_N=FINISH_ROWS, SOFTCAP=softcap, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return partial.sum(0) if bias_sums else None
