"""Gradients of the logits: `gradient_kernel` makes each tile once more and turns it into a block of d loss / d y.

The vendor's GEMM takes a block to the gradients of hidden and weight, summed in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vig_kernels.kernels.torch.precision import FLOAT32_SUMS, WIDE_SUMS, float32_products
from vig_kernels.problem import HeadProblem, Saved, Upstream

from .launch import cdiv, operand
from .logit_tiles import LOG2_E, dot_tile, exp2, halves, logits, narrow, row_offsets, slopes, tile_position
from .target_residual import TargetResidual
from .tile_configs import head_config, head_options


@triton.jit
def stored_scale(loss_scale, logit_scale):
    """What a block of d loss / d y is stored multiplied by, as `loss_scale_of` says."""
    scale = logit_scale
    if loss_scale is not None:
        scale = tl.load(loss_scale)
    return scale


@triton.jit
def gradient_part(
    dot,  # (BLOCK_N, PART)
    bias,
    part,  # index of the part in the chunk of the vocabulary
    wanted,  # (BLOCK_N,) int64, target of each row, or -1
    lse,  # (BLOCK_N,) float32, like the next four
    up,  # d loss / d nll + d loss / d lse
    up_nll,
    up_entropy,
    entropy,
    live,  # (BLOCK_N,): a row that is not ignored
    inside,  # (BLOCK_N,): a row of the chunk
    place,  # (BLOCK_N,): row of `block`
    row_tile,
    loss_scale,
    block,
    partial_bias,
    residual_at,  # (BLOCK_N,) pointers or None
    stride_block,
    first_vocab,
    columns,
    V,
    logit_scale,
    logit_softcap,
    ENTROPY: tl.constexpr,
    PART: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FAST_EXP2: tl.constexpr,
):
    """Write d loss / d y of one part of a tile."""
    column = part * PART + tl.arange(0, PART)
    z = logits(dot, bias, first_vocab + column, V, logit_scale, logit_softcap, SOFTCAP)
    log_p = z - lse[:, None]
    p = exp2(log_p * LOG2_E, FAST_EXP2)  # what stands in columns >= V is masked with g
    g = p * up[:, None]
    if ENTROPY:
        g -= tl.where(p > 0, p * (log_p + entropy[:, None]), 0.0) * up_entropy[:, None]
    position = tl.where((wanted >= 0) & (wanted < V), wanted - first_vocab, -1)
    g -= tl.where(column[None, :] == position[:, None], up_nll[:, None], 0.0)
    if SOFTCAP:
        g *= slopes(dot, bias, first_vocab + column, V, logit_scale, logit_softcap)
    g = tl.where(live[:, None] & (column < columns)[None, :], g, 0.0)
    if partial_bias is not None:
        tl.store(
            partial_bias + row_tile.to(tl.int64) * columns + column, tl.sum(g, axis=0), mask=column < columns
        )
    g *= stored_scale(loss_scale, logit_scale)
    stored = narrow(g, block.dtype.element_ty)
    at = block + place[:, None] * stride_block + column[None, :]
    tl.store(at, stored, mask=inside[:, None] & (column < columns)[None, :])
    if residual_at is not None:
        lost = tl.where(column[None, :] == position[:, None], g - stored.to(tl.float32), 0.0)
        here = (position >= part * PART) & (position < part * PART + PART) & (position < columns)
        tl.store(residual_at, tl.sum(lost, axis=1), mask=live & here)


@triton.jit(
    do_not_specialize=["first_row", "rows", "row_tiles", "first_vocab", "columns", "vocab_tiles", "V"],
    do_not_specialize_on_alignment=[
        "target",
        "order",
        "count",
        "lse",
        "entropy",
        "grad_nll",
        "grad_lse",
        "grad_entropy",
        "loss_scale",
        "residual",
    ],
)
def gradient_kernel(
    hidden,  # (N, D)
    weight,  # (V, D), pointer or descriptor
    bias,
    target,  # (N,) int64
    order,
    count,
    lse,  # (N,) float32
    entropy,  # (N,) float32 or None
    grad_nll,  # (N,) float32 or None
    grad_lse,  # (N,) float32 or None
    grad_entropy,  # (N,) float32 or None
    loss_scale,  # () float32, or None: logit_scale; the block is stored multiplied by it
    block,  # (rows of the chunk, columns of the chunk): d loss / d y, at the rows' original places
    partial_bias,  # (row_tiles, columns of the chunk) float32 or None: sums over the tile's rows
    residual,  # (N,) float32 or None: what `block` loses at the target (target_residual.py)
    stride_hidden,
    stride_weight,
    stride_block,
    first_row,
    rows,
    row_tiles,
    first_vocab,  # first vocabulary entry of the chunk
    columns,
    vocab_tiles,
    V,
    D,
    logit_scale,
    logit_softcap,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,  # 1, or 2: the tile is folded in halves, which needs fewer registers
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    UNIT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FAST_EXP2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d loss / d y of one recomputed tile, y the logits before the cap. Ignored rows are written as zeros.

    With p = exp(z - lse): d nll/dz = p - [v = target], d lse/dz = p, d entropy/dz = -p (z - lse + entropy),
    dz/dy = 1 - (z / logit_softcap)^2.
    """
    row_tile, vocab_tile = tile_position(tl.program_id(0), row_tiles, vocab_tiles, GROUP)
    local = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    kept = tl.load(count)
    inside = local < rows
    live = inside & (local < kept)
    place = tl.load(order + local, mask=inside, other=0)  # row within the chunk
    row = first_row + place
    column = vocab_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    at = block + place[:, None] * stride_block + column[None, :]
    writable = inside[:, None] & (column < columns)[None, :]
    if row_tile * BLOCK_N >= kept:
        tl.store(at, tl.zeros((BLOCK_N, BLOCK_V), dtype=block.dtype.element_ty), mask=writable)
        if partial_bias is not None:
            empty = partial_bias + row_tile.to(tl.int64) * columns + column
            tl.store(empty, tl.zeros((BLOCK_V,), dtype=tl.float32), mask=column < columns)
        return
    dot = dot_tile(
        hidden, row_offsets(row, stride_hidden, UNIT), weight, stride_weight, first_vocab + vocab_tile * BLOCK_V, V, D,
        BLOCK_N, BLOCK_V, BLOCK_K, EVEN_K, DESCRIPTOR, UNIT, PRECISION,
    )  # fmt: skip
    up = tl.zeros((BLOCK_N,), dtype=tl.float32)  # upstream of the softmax term
    up_nll = up
    up_entropy = up
    h = up
    if grad_nll is not None:
        up_nll = tl.load(grad_nll + row, mask=live, other=0.0)
        up += up_nll
    if grad_lse is not None:
        up += tl.load(grad_lse + row, mask=live, other=0.0)
    if grad_entropy is not None:
        up_entropy = tl.load(grad_entropy + row, mask=live, other=0.0)
        h = tl.load(entropy + row, mask=live, other=0.0)
    wanted = tl.load(target + row, mask=live, other=-1)
    row_lse = tl.load(lse + row, mask=live, other=0.0)
    residual_at = residual
    if residual is not None:
        residual_at = residual + row
    if PARTS == 1:
        gradient_part(
            dot, bias, vocab_tile, wanted, row_lse, up, up_nll, up_entropy, h, live, inside, place, row_tile,
            loss_scale, block, partial_bias, residual_at, stride_block, first_vocab, columns, V, logit_scale,
            logit_softcap, grad_entropy is not None, BLOCK_V, SOFTCAP, FAST_EXP2,
        )  # fmt: skip
    else:
        left, right = halves(dot, BLOCK_N, BLOCK_V)
        for half in tl.static_range(2):
            gradient_part(
                left if half == 0 else right, bias, vocab_tile * 2 + half, wanted, row_lse, up, up_nll, up_entropy, h,
                live, inside, place, row_tile, loss_scale, block, partial_bias, residual_at, stride_block, first_vocab,
                columns, V, logit_scale, logit_softcap, grad_entropy is not None, BLOCK_V // 2, SOFTCAP, FAST_EXP2,
            )  # fmt: skip


def accumulate(total: Tensor, a: Tensor, b: Tensor, first: bool = False) -> None:
    """total += a @ b in float32, by the vendor's GEMM: total (M, K) float32, a (M, L), b (L, K).

    first: total = a @ b, whatever `total` holds.
    """
    beta = 0.0 if first else 1.0
    if a.dtype == torch.float32:
        with float32_products(a.dtype):  # never plain TF32, whatever the global setting
            torch.addmm(total, a, b, beta=beta, out=total)
    else:
        with FLOAT32_SUMS.where_needed():
            addmm_16_bit(total, a, b, beta)


def addmm_16_bit(total: Tensor, a: Tensor, b: Tensor, beta: float) -> None:
    """total = beta total + a @ b, total float32, a and b 16-bit."""
    if total.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, beta=beta, out=total)
    else:  # addmm(out_dtype=) is CUDA's and ROCm's alone
        torch.addmm(total, a.float(), b.float(), beta=beta, out=total)


def product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, summed in float32 and cast once, by the vendor's GEMM: bfloat16 out (M, K), a (M, L), b (L, K)."""
    with WIDE_SUMS.where_needed():
        mm_bfloat16(out, a, b)


def mm_bfloat16(out: Tensor, a: Tensor, b: Tensor) -> None:
    if out.is_cpu:
        out.copy_(a.float() @ b.float())
    else:
        torch.mm(a, b, out=out)


def loss_scale_of(bound: Callable[[], Tensor], problem: HeadProblem) -> tuple[Tensor | None, Tensor | None]:
    """(loss_scale, unscale): what a block of d loss / d y is stored multiplied by, and what its products are to be.

    None, None: by logit_scale alone, the factor between y and hidden @ weight.T. For float16 loss_scale is that times a
    power of two that moves entries of at most `bound()` to 2^10 and leaves the range below to small probabilities;
    unscale takes it back.
    """
    if problem.hidden.dtype != torch.float16:
        return None, None
    _, exponent = torch.frexp(bound().max() * abs(problem.logit_scale))
    power = torch.exp2((10 - exponent).clamp(-100, 100).float())
    return power * problem.logit_scale, 1 / power


def padded(V: int) -> int:
    """Columns of a block: its rows start on 16-byte borders, as the GEMM likes them."""
    return -(-V // 16) * 16


def columns_of(block: Tensor, V: int) -> Tensor:
    """The block without the columns that pad it."""
    return block if block.shape[1] == V else block[:, :V]


class Block(NamedTuple):
    """Where d loss / d y of rows [first_row, ...) x words [first_vocab, ...) goes."""

    values: Tensor  # (rows, columns): loss_scale * d loss / d y
    first_row: int
    first_vocab: int
    order: Tensor  # (rows,) int64, of the block's rows: the kept ones first
    count: Tensor  # () int64: how many of them are kept
    loss_scale: Tensor | None  # () float32, or None: logit_scale
    residual: TargetResidual | None  # receives what `values` loses at the targets


def fill_block(
    block: Block, problem: HeadProblem, upstream: Upstream, saved: Saved, bias_sums: bool
) -> Tensor | None:
    """Launch `gradient_kernel` on a block. With `bias_sums` the column sums of d loss / d y are returned."""
    hidden, weight, softcap = problem.hidden, problem.weight, problem.logit_softcap
    (V, D), (rows, columns) = weight.shape, block.values.shape

    def run(config):
        options = head_options(weight, config, hidden)
        row_tiles, vocab_tiles = cdiv(rows, config.block_n), cdiv(columns, config.block_v)
        partial = hidden.new_empty(row_tiles, columns, dtype=torch.float32) if bias_sums else None
        gradient_kernel[(row_tiles * vocab_tiles,)](
            hidden, operand(weight, config) if options["DESCRIPTOR"] else weight, problem.bias, problem.target,
            block.order, block.count, saved.lse, saved.entropy if upstream.entropy is not None else None, *upstream,
            block.loss_scale, block.values, partial, None if block.residual is None else block.residual.lost,
            hidden.stride(0), weight.stride(0), block.values.stride(0), block.first_row, rows, row_tiles,
            block.first_vocab, columns, vocab_tiles, V, D, problem.logit_scale, softcap or 0.0,
            SOFTCAP=softcap is not None, **options,
        )  # fmt: skip
        return partial.sum(0) if bias_sums else None

    return run(head_config("gradient", weight, softcap is not None, run))
