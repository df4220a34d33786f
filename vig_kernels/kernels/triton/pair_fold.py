"""KL(p_image || p_null) by Triton: both passes of linear_vig in one tile.

KL needs both logits of an entry at once, which the tiles of logit_fold.py, one pass each, never have. Here a program
multiplies each weight tile that it loads with the image rows and with the null rows, into two accumulators, and leaves
five numbers a row and part:

    m = max z    s = sum exp(z - m)    of each pass         d = sum exp(z - m) ((z - m) - (z' - m')),  ' the null pass

`pair_combine_kernel` joins them in the order of the vocabulary, with M = max m and S = sum s exp(m - M):

    KL = sum over parts of exp(m - M) (d + s ((m - M) - (m' - M'))) / S - (log S - log S')

Every difference is taken against a maximum of its own pass: a number added to all logits of a pass, however large,
cancels before anything is summed, and equal passes give exactly 0. No locks, no atomics: the bits of a row depend on
nothing but the row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vig_kernels.problem import HeadProblem

from .launch import aligned, as_read, cdiv, device_guard, operand
from .logit_fold import COMBINE_PARTS, COMBINE_ROWS, PARTIALS_BYTES
from .logit_tiles import (
    LOG2_E,
    exp2,
    halves,
    load_rows,
    load_words,
    logits,
    row_offsets,
    tile_position,
    word_pointers,
)
from .row_order import RowChunk, compaction_order
from .tile_configs import TileConfig, head_config, head_options

# of a row and part: max and sum of the image pass, max and sum of the null pass, sum of the differences
FIELDS = tl.constexpr(5)


@triton.jit
def pair_dots(
    hidden,
    hidden_second,
    offset,  # (BLOCK_N,) int64, element offset of each row of the image pass
    offset_second,  # and of the null pass
    weight,  # pointer to (V, D), or a tensor descriptor of it
    stride_weight,
    first_column,
    V,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`dot_tile` of both passes, each weight tile being loaded once."""
    k = tl.arange(0, BLOCK_K)
    if not EVEN_K:
        D = D // UNIT * UNIT
    image_ptr = hidden + offset[:, None] + k[None, :]
    null_ptr = hidden_second + offset_second[:, None] + k[None, :]
    weight_ptr = weight
    if not DESCRIPTOR:
        weight_ptr = word_pointers(weight, stride_weight, first_column, V, k, BLOCK_V, UNIT)
    image_dot = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    null_dot = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        image = load_rows(image_ptr, k, D - start, EVEN_K)
        null = load_rows(null_ptr, k, D - start, EVEN_K)
        w = load_words(weight, weight_ptr, first_column, start, k, D - start, EVEN_K, DESCRIPTOR)
        image_dot = tl.dot(image, w, image_dot, input_precision=PRECISION)
        null_dot = tl.dot(null, w, null_dot, input_precision=PRECISION)
        image_ptr += BLOCK_K
        null_ptr += BLOCK_K
        if not DESCRIPTOR:
            weight_ptr += BLOCK_K
    return image_dot, null_dot


@triton.jit
def below_maximum(
    dot,
    bias,
    first,  # column 0 of the part
    V,
    logit_scale,
    logit_softcap,
    PART: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FOLDED: tl.constexpr,
):
    """(max z of each row, z less that) of a part of one pass. FOLDED: both in units of the scale."""
    column = first + tl.arange(0, PART)
    z = dot
    if not FOLDED:
        z = logits(dot, bias, column, V, logit_scale, logit_softcap, SOFTCAP)
    if first + PART > V:  # the last tile
        z = tl.where(column[None, :] < V, z, -float("inf"))
    top = tl.max(z, axis=1)
    return top, z - tl.where(top == -float("inf"), 0.0, top)[:, None]


@triton.jit
def fold_pair(
    image_dot,  # (BLOCK_N, PART)
    null_dot,
    bias,
    part,  # index of the part in the vocabulary
    local,  # (BLOCK_N,) row within the chunk
    live,  # (BLOCK_N,)
    partials,
    rows,
    V,
    logit_scale,
    logit_softcap,
    PART: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FOLDED: tl.constexpr,
    FAST_EXP2: tl.constexpr,
):
    """Reduce one part of both tiles to FIELDS numbers a row."""
    first = part * PART
    live = live & (local * 0 + first < V)  # the right half of the last tile may lie wholly beyond V
    unit = logit_scale if FOLDED else 1.0
    top, below = below_maximum(image_dot, bias, first, V, logit_scale, logit_softcap, PART, SOFTCAP, FOLDED)
    e = exp2(below * (unit * LOG2_E), FAST_EXP2)
    null_top, null_below = below_maximum(
        null_dot, bias, first, V, logit_scale, logit_softcap, PART, SOFTCAP, FOLDED
    )
    to = partials + part.to(tl.int64) * FIELDS * rows + local
    tl.store(to, top * unit, mask=live)
    tl.store(to + rows, tl.sum(e, axis=1), mask=live)
    tl.store(to + 2 * rows, null_top * unit, mask=live)
    tl.store(to + 3 * rows, tl.sum(exp2(null_below * (unit * LOG2_E), FAST_EXP2), axis=1), mask=live)
    apart = tl.where(e > 0, e * (below - null_below), 0.0)  # where e is 0, both may be -inf
    tl.store(to + 4 * rows, tl.sum(apart, axis=1) * unit, mask=live)


@triton.jit(
    do_not_specialize=["first_row", "rows", "row_tiles", "vocab_tiles", "V"],
    do_not_specialize_on_alignment=["order", "count"],
)
def pair_kernel(
    hidden,  # (N, D): the image pass
    hidden_second,  # (N, D): the null pass
    weight,  # (V, D), pointer or descriptor
    bias,  # (V,) or None
    order,  # (N,) int64: kept rows first
    count,  # () int64: how many rows are kept
    partials,  # (parts of the vocabulary, FIELDS, rows of the chunk) float32
    stride_hidden,
    stride_hidden_second,
    stride_weight,
    first_row,  # position in `order` of the chunk's first row
    rows,
    row_tiles,
    vocab_tiles,
    V,
    D,
    logit_scale,
    logit_softcap,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    UNIT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FOLDED: tl.constexpr,
    FAST_EXP2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Reduce one tile of both passes. Grid: row_tiles x vocab_tiles, one-dimensional."""
    row_tile, vocab_tile = tile_position(tl.program_id(0), row_tiles, vocab_tiles, GROUP)
    tile_start = row_tile * BLOCK_N
    kept = tl.load(count) - first_row
    if tile_start >= kept:
        return  # nothing but ignored rows from here on
    local = tile_start + tl.arange(0, BLOCK_N)
    live = (local < rows) & (local < kept)
    row = tl.load(order + first_row + local, mask=live, other=0)
    row_offset = row_offsets(row, stride_hidden, UNIT)
    null_offset = row_offsets(row, stride_hidden_second, UNIT)
    image_dot, null_dot = pair_dots(
        hidden, hidden_second, row_offset, null_offset, weight, stride_weight,
        vocab_tile * BLOCK_V, V, D, BLOCK_N, BLOCK_V, BLOCK_K, EVEN_K, DESCRIPTOR, UNIT, PRECISION,
    )  # fmt: skip
    if PARTS == 1:
        fold_pair(
            image_dot, null_dot, bias, vocab_tile, local, live, partials, rows, V, logit_scale, logit_softcap,
            BLOCK_V, SOFTCAP, FOLDED, FAST_EXP2,
        )  # fmt: skip
    else:
        left, right = halves(image_dot, BLOCK_N, BLOCK_V)
        null_left, null_right = halves(null_dot, BLOCK_N, BLOCK_V)
        for half in tl.static_range(2):
            fold_pair(
                left if half == 0 else right, null_left if half == 0 else null_right, bias, vocab_tile * 2 + half,
                local, live, partials, rows, V, logit_scale, logit_softcap,
                BLOCK_V // 2, SOFTCAP, FOLDED, FAST_EXP2,
            )  # fmt: skip


@triton.jit
def field(partials, part, local, number, rows, mask, other):
    """One field of the parts (BLOCK_T,) of the rows (BLOCK_N,); `other` where there is none."""
    at = (part.to(tl.int64) * FIELDS + number)[:, None] * rows + local[None, :]
    return tl.load(partials + at, mask=mask, other=other)


@triton.jit(
    do_not_specialize=["first_row", "rows", "parts"], do_not_specialize_on_alignment=["order", "count", "kl"]
)
def pair_combine_kernel(
    partials,
    order,
    count,
    kl,  # (N,) float32, written at the original rows
    first_row,
    rows,
    parts,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Join a row's parts in the fixed order of the vocabulary. Ignored rows get 0."""
    local = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = local < rows
    live = inside & (local < tl.load(count) - first_row)
    row = tl.load(order + first_row + local, mask=inside, other=0)
    lane = tl.arange(0, BLOCK_T)
    nothing = -float("inf")

    image_top = tl.full((BLOCK_T, BLOCK_N), -float("inf"), dtype=tl.float32)
    null_top = tl.full((BLOCK_T, BLOCK_N), -float("inf"), dtype=tl.float32)
    for start in range(0, parts, BLOCK_T):
        part = start + lane
        mask = (part < parts)[:, None] & live[None, :]
        image_top = tl.maximum(image_top, field(partials, part, local, 0, rows, mask, nothing))
        null_top = tl.maximum(null_top, field(partials, part, local, 2, rows, mask, nothing))
    m = tl.max(image_top, axis=0)
    m = tl.where(m == -float("inf"), 0.0, m)[None, :]
    null_m = tl.max(null_top, axis=0)
    null_m = tl.where(null_m == -float("inf"), 0.0, null_m)[None, :]

    total = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    null_total = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    apart = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for start in range(0, parts, BLOCK_T):
        part = start + lane
        mask = (part < parts)[:, None] & live[None, :]
        shift = field(partials, part, local, 0, rows, mask, nothing) - m
        weight = tl.exp(shift)
        part_sum = field(partials, part, local, 1, rows, mask, 0.0)
        total += part_sum * weight
        null_shift = field(partials, part, local, 2, rows, mask, nothing) - null_m
        null_total += field(partials, part, local, 3, rows, mask, 0.0) * tl.exp(null_shift)
        part_apart = field(partials, part, local, 4, rows, mask, 0.0)
        apart += tl.where(weight > 0, weight * (part_apart + part_sum * (shift - null_shift)), 0.0)
    s = tl.where(live, tl.sum(total, axis=0), 1.0)
    null_s = tl.where(live, tl.sum(null_total, axis=0), 1.0)
    found = tl.sum(apart, axis=0) / s - (tl.log(s) - tl.log(null_s))
    found = tl.where(found < 0, 0.0, found)  # by rounding; NaN stays
    tl.store(kl + row, tl.where(live, found, 0.0), mask=inside)


def chunk_rows(N: int, V: int, config: TileConfig) -> int:
    """Rows a chunk whose partials stay under PARTIALS_BYTES; whole tiles where at least one fits."""
    rows = max(1, PARTIALS_BYTES // (4 * FIELDS.value * vocab_parts(V, config)))
    return min(N, rows // config.block_n * config.block_n or rows)


def vocab_parts(V: int, config: TileConfig) -> int:
    return cdiv(V, config.block_v // config.parts)


def fold(
    problem: HeadProblem, hidden_null: Tensor, chunk: RowChunk, partials: Tensor, config: TileConfig
) -> None:
    """Launch `pair_kernel` on the rows of a chunk."""
    hidden, weight, rows = problem.hidden, problem.weight, chunk.rows
    (V, D), options = weight.shape, head_options(weight, config, hidden, hidden_null)
    row_tiles, vocab_tiles = cdiv(rows, config.block_n), cdiv(V, config.block_v)
    folded = problem.bias is None and problem.logit_softcap is None and problem.logit_scale > 0
    pair_kernel[(row_tiles * vocab_tiles,)](
        hidden, hidden_null, operand(weight, config) if options["DESCRIPTOR"] else weight, problem.bias,
        chunk.order, chunk.count, partials, hidden.stride(0), hidden_null.stride(0), weight.stride(0),
        chunk.first, rows, row_tiles, vocab_tiles, V, D, problem.logit_scale, problem.logit_softcap or 0.0,
        SOFTCAP=problem.logit_softcap is not None, FOLDED=folded, **options,
    )  # fmt: skip


def divergence(problem: HeadProblem, hidden_null: Tensor) -> Tensor:
    """KL(p_image || p_null) of every row, (N,) float32, nats, at least 0; ignored rows give 0 and cost no tile.

    One product of each pass. Extra memory: 48 MiB of partials and 8 bytes a row.
    """
    problem = as_read(problem)
    target = problem.target
    hidden_null, V, N = aligned(hidden_null), problem.weight.shape[0], target.shape[0]
    kl = target.new_empty(N, dtype=torch.float32)
    order, count = compaction_order(target, problem.ignore_index)

    def partials_of(rows, config):
        return kl.new_empty(vocab_parts(V, config), FIELDS.value, rows)

    def trial(config):
        chunk = RowChunk(order, count, 0, chunk_rows(N, V, config))
        fold(problem, hidden_null, chunk, partials_of(chunk.rows, config), config)

    with device_guard(target.device):
        config = head_config("pair", problem.weight, problem.logit_softcap is not None, trial)
        most = chunk_rows(N, V, config)
        partials = partials_of(most, config)  # a short last chunk takes the beginning of it
        for first in range(0, N, most):
            chunk = RowChunk(order, count, first, min(most, N - first))
            fold(problem, hidden_null, chunk, partials, config)
            pair_combine_kernel[(cdiv(chunk.rows, COMBINE_ROWS),)](
                partials, order, count, kl, first, chunk.rows, len(partials),
                BLOCK_N=COMBINE_ROWS, BLOCK_T=COMBINE_PARTS, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return kl
