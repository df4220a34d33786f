"""Logits folded away: a tile kernel that reduces them, and a kernel that joins the tiles of a row.

`fold_kernel` reduces each tile of BLOCK_N rows x BLOCK_V vocabulary entries to one (max, sum of exp) a row, with
the statistics asked for; `combine_kernel` joins them in the order of the vocabulary. No locks, no atomics: the bits of
a row depend on nothing but the row. Rows run in chunks whose partials stay under 48 MiB.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vig_kernels.problem import HeadProblem

from .launch import cdiv, operand
from .logit_tiles import LOG2_E, dot_tile, exp2, halves, logits, narrow, row_offsets, slopes, tile_position
from .row_order import RowChunk
from .tile_configs import TileConfig, head_options

PARTIALS_BYTES = 48 * 2**20
# a program of `combine_kernel`: few rows, so that few rows fill a GPU, and many parts a step. Fixed: the order in which
# a row's parts are summed must not depend on N
COMBINE_ROWS, COMBINE_PARTS = 8, 128


@triton.jit
def fold_part(
    dot,  # (BLOCK_N, PART)
    bias,
    part,  # index of the part in the vocabulary
    wanted,  # (BLOCK_N,) int64, target of each row, or -1
    local,  # (BLOCK_N,) row within the chunk
    slot,  # (BLOCK_N,) row within the partials
    live,  # (BLOCK_N,)
    partial_max,
    partial_sum,
    partial_dot,
    partial_arg,
    partial_stride,
    target_logit,
    block,
    stride_block,
    V,
    logit_scale,
    logit_softcap,
    PART: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FOLDED: tl.constexpr,
    FAST_EXP2: tl.constexpr,
):
    """Reduce one part of a tile to a partial a row, and store the statistics that are asked for.

    z * unit are the logits: where nothing stands between, the scale waits until there is one number a row, and goes
    into the exponent's factor. The difference to the maximum is taken before that factor, so that the maximum adds
    exactly 1 and logits may be as large as float32 holds.
    """
    lane = tl.arange(0, PART)
    first = part * PART
    column = first + lane
    live = live & (local * 0 + first < V)  # the right half of the last tile may lie wholly beyond V
    if FOLDED:
        z = dot
        unit = logit_scale
    else:
        z = logits(dot, bias, column, V, logit_scale, logit_softcap, SOFTCAP)
        unit = 1.0
    if first + PART > V:  # the last tile
        z = tl.where(column[None, :] < V, z, -float("inf"))

    position = tl.where((wanted >= 0) & (wanted < V), wanted - first, -1).to(tl.int32)
    hit = live & (position >= 0) & (position < PART)
    hits = tl.sum(hit.to(tl.int32), axis=0)
    if hits > 0:
        picked = tl.sum(tl.where(lane[None, :] == position[:, None], z, 0.0), axis=1)
        tl.store(target_logit + slot, picked * unit, mask=hit)

    top = tl.max(z, axis=1)
    top_safe = tl.where(top == -float("inf"), 0.0, top)  # a part of nothing but -inf logits sums to 0
    at = part.to(tl.int64) * partial_stride + slot
    tl.store(partial_max + at, top * unit, mask=live)
    if partial_arg is not None:
        first_top = tl.min(tl.where(z == top[:, None], lane[None, :], PART - 1), axis=1)
        tl.store(partial_arg + at, first_top, mask=live)
    below = z - top_safe[:, None]
    e = exp2(below * (unit * LOG2_E), FAST_EXP2)
    tl.store(partial_sum + at, tl.sum(e, axis=1), mask=live)
    if partial_dot is not None:
        tl.store(partial_dot + at, tl.sum(tl.where(e > 0, e * below, 0.0), axis=1) * unit, mask=live)
    if block is not None:
        if SOFTCAP:
            slope = slopes(dot, bias, column, V, logit_scale, logit_softcap)
            e = tl.where(e > 0, e * slope, 0.0)
            if hits > 0:
                target_slope = tl.sum(tl.where(lane[None, :] == position[:, None], slope, 0.0), axis=1)
                tl.store(target_logit + partial_stride + slot, target_slope, mask=hit)
        to = block + local.to(tl.int64)[:, None] * stride_block + column[None, :]
        tl.store(to, narrow(e, block.dtype.element_ty), mask=live[:, None] & (column[None, :] < V))


@triton.jit(
    do_not_specialize=["first_row", "rows", "row_tiles", "passes", "vocab_tiles", "V"],
    do_not_specialize_on_alignment=["target", "order", "count"],
)
def fold_kernel(
    hidden,  # (N, D): the first pass, and the only one of linear_nll
    hidden_second,  # (N, D): the second pass of linear_vig; the same pointer as `hidden` otherwise
    weight,  # (V, D), pointer or descriptor
    bias,  # (V,) or None
    target,  # (N,) int64
    order,  # (N,) int64: kept rows first
    count,  # () int64: how many rows are kept
    partial_max,  # (parts of the vocabulary, rows of the chunk x passes) float32
    partial_sum,  # the same: sum of exp(z - partial_max)
    partial_dot,  # the same or None: sum of exp(z - partial_max) * (z - partial_max), for the entropy
    partial_arg,  # the same, int32, or None: first column of the maximum within the part
    target_logit,  # (2, rows of the chunk x passes) float32: z of the target, and with `block` its dz/dy
    block,  # (rows of the chunk, V) or None: exp(z - partial_max) * dz/dy, for linear_cross_entropy
    stride_hidden,
    stride_hidden_second,
    stride_weight,
    stride_block,
    first_row,  # position in `order` of the chunk's first row
    rows,  # rows of the chunk in one pass
    row_tiles,  # row tiles of one pass
    passes,
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
    FOLDED: tl.constexpr,  # no bias, no cap, a scale > 0: it goes into the exponent
    FAST_EXP2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Reduce one tile to a partial a row. Grid: row_tiles x passes x vocab_tiles, one-dimensional."""
    row_tile, vocab_tile = tile_position(tl.program_id(0), row_tiles * passes, vocab_tiles, GROUP)
    second = row_tile >= row_tiles
    tile_start = (row_tile % row_tiles) * BLOCK_N
    kept = tl.load(count) - first_row
    if tile_start >= kept:
        return  # nothing but ignored rows from here on
    local = tile_start + tl.arange(0, BLOCK_N)
    live = (local < rows) & (local < kept)
    row = tl.load(order + first_row + local, mask=live, other=0)
    base = tl.where(second, hidden_second, hidden)
    row_offset = row_offsets(row, tl.where(second, stride_hidden_second, stride_hidden), UNIT)
    dot = dot_tile(
        base, row_offset, weight, stride_weight, vocab_tile * BLOCK_V, V, D,
        BLOCK_N, BLOCK_V, BLOCK_K, EVEN_K, DESCRIPTOR, UNIT, PRECISION,
    )  # fmt: skip
    slot = local + second.to(tl.int32) * rows
    wanted = tl.load(target + row, mask=live, other=-1)
    if PARTS == 1:
        fold_part(
            dot, bias, vocab_tile, wanted, local, slot, live,
            partial_max, partial_sum, partial_dot, partial_arg, rows * passes, target_logit, block, stride_block,
            V, logit_scale, logit_softcap, BLOCK_V, SOFTCAP, FOLDED, FAST_EXP2,
        )  # fmt: skip
    else:
        left, right = halves(dot, BLOCK_N, BLOCK_V)
        for half in tl.static_range(2):
            fold_part(
                left if half == 0 else right, bias, vocab_tile * 2 + half, wanted, local, slot, live,
                partial_max, partial_sum, partial_dot, partial_arg, rows * passes, target_logit, block, stride_block,
                V, logit_scale, logit_softcap, BLOCK_V // 2, SOFTCAP, FOLDED, FAST_EXP2,
            )  # fmt: skip


@triton.jit(
    do_not_specialize=["first_row", "rows", "pass_offset", "partial_stride", "parts", "V"],
    do_not_specialize_on_alignment=[
        "target", "order", "count", "nll", "lse", "entropy", "argmax", "lse_lo", "nll_image", "vig",
    ],
)  # fmt: skip
def combine_kernel(
    partial_max,
    partial_sum,
    partial_dot,
    partial_arg,
    target_logit,
    target,  # (N,) int64
    order,
    count,
    nll,  # (N,) float32, written at the original rows
    lse,  # (N,) float32 or None
    entropy,  # (N,) float32 or None
    argmax,  # (N,) int64 or None
    lse_lo,  # (N,) float32 or None: what float32 cannot hold of lse
    nll_image,  # (N,) float32 or None: nll of the first pass, of which vig is the difference to
    vig,  # (N,) float32 or None
    first_row,
    rows,
    pass_offset,  # 0, or `rows` for the second pass
    partial_stride,  # rows x passes
    parts,  # parts of the vocabulary, each of PART columns
    V,
    PART: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Join a row's partials in the fixed order of the vocabulary. Ignored rows get 0, 0, 0 and -1."""
    local = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = local < rows
    live = inside & (local < tl.load(count) - first_row)
    row = tl.load(order + first_row + local, mask=inside, other=0)
    slot = pass_offset + local
    lane = tl.arange(0, BLOCK_T)

    top = tl.full((BLOCK_T, BLOCK_N), -float("inf"), dtype=tl.float32)
    for start in range(0, parts, BLOCK_T):
        part = start + lane
        at = part.to(tl.int64)[:, None] * partial_stride + slot[None, :]
        mask = (part < parts)[:, None] & live[None, :]
        top = tl.maximum(top, tl.load(partial_max + at, mask=mask, other=-float("inf")))
    m = tl.max(top, axis=0)
    m_safe = tl.where(m == -float("inf"), 0.0, m)

    total = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    dot = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    best = tl.full((BLOCK_T, BLOCK_N), 0x7FFFFFFF, dtype=tl.int32)
    for start in range(0, parts, BLOCK_T):
        part = start + lane
        at = part.to(tl.int64)[:, None] * partial_stride + slot[None, :]
        mask = (part < parts)[:, None] & live[None, :]
        part_max = tl.load(partial_max + at, mask=mask, other=-float("inf"))
        part_sum = tl.load(partial_sum + at, mask=mask, other=0.0)
        shift = part_max - m_safe[None, :]
        rescale = tl.exp(shift)
        total += part_sum * rescale
        if entropy is not None:
            part_dot = tl.load(partial_dot + at, mask=mask, other=0.0)
            dot += tl.where(rescale > 0, rescale * (part_dot + part_sum * shift), 0.0)
        if argmax is not None:
            part_arg = tl.load(partial_arg + at, mask=mask, other=0)
            here = (part_max == m[None, :]) & mask
            best = tl.minimum(best, tl.where(here, part[:, None] * PART + part_arg, 0x7FFFFFFF))
    s = tl.where(live, tl.sum(total, axis=0), 1.0)
    log_s = tl.log(s)

    wanted = tl.load(target + row, mask=live, other=0)
    known = live & (wanted >= 0) & (wanted < V)
    picked = tl.load(target_logit + slot, mask=known, other=0.0)
    loss = tl.where(known, (m - picked) + log_s, float("nan"))  # a target outside [0, V) has no likelihood
    tl.store(nll + row, tl.where(live, loss, 0.0), mask=inside)
    if vig is not None:
        image = tl.load(nll_image + row, mask=live, other=0.0)
        differs = live & (loss != image)  # where both are infinite the difference is 0 too
        tl.store(vig + row, tl.where(differs, loss - image, 0.0), mask=inside)
    whole = m + log_s
    if lse is not None:
        tl.store(lse + row, tl.where(live, whole, 0.0), mask=inside)
    if lse_lo is not None:
        log_part = whole - m
        low = (m - (whole - log_part)) + (log_s - log_part)  # m + log_s - whole, exactly
        tl.store(lse_lo + row, tl.where(live & (tl.abs(whole) < float("inf")), low, 0.0), mask=inside)
    if entropy is not None:
        tl.store(entropy + row, tl.where(live, log_s - tl.sum(dot, axis=0) / s, 0.0), mask=inside)
    if argmax is not None:
        found = tl.min(best, axis=0)
        found = tl.where(found < V, found, 0)  # none is the greatest of NaN logits
        tl.store(argmax + row, tl.where(live, found, -1).to(tl.int64), mask=inside)


class Partials:
    """What one chunk of rows leaves behind for `combine_kernel`."""

    def __init__(self, rows: int, passes: int, V: int, config: TileConfig, stats: tuple[str, ...], device):
        self.passes = passes
        self.part = config.block_v // config.parts
        self.parts = cdiv(V, self.part)
        shape = (self.parts, rows * passes)
        self.max = torch.empty(shape, dtype=torch.float32, device=device)
        self.sum = self.max.new_empty(shape)
        self.dot = self.max.new_empty(shape) if "entropy" in stats else None
        self.arg = self.max.new_empty(shape, dtype=torch.int32) if "argmax" in stats else None
        self.target = self.max.new_empty(2, rows * passes)  # logit and slope

    @staticmethod
    def chunk_rows(N: int, passes: int, V: int, config: TileConfig, stats: tuple[str, ...]) -> int:
        """Rows a chunk whose partials stay under PARTIALS_BYTES; whole tiles where at least one fits."""
        fields = 2 + ("entropy" in stats) + ("argmax" in stats)
        row_bytes = 4 * passes * (fields * cdiv(V, config.block_v // config.parts) + 2)
        rows = max(1, PARTIALS_BYTES // row_bytes)
        return min(N, rows // config.block_n * config.block_n or rows)


def fold(
    problem: HeadProblem,
    hidden_null: Tensor | None,  # (N, D): the second pass of linear_vig
    chunk: RowChunk,
    partials: Partials,
    config: TileConfig,
    block: Tensor | None = None,  # (rows, V): receives exp(z - partial max) * dz/dy, for linear_cross_entropy
) -> None:
    """Launch `fold_kernel` on the rows of a chunk, for one or two passes."""
    weight, passes, rows = problem.weight, partials.passes, chunk.rows
    first, second = problem.hidden, problem.hidden if hidden_null is None else hidden_null
    (V, D), options = weight.shape, head_options(weight, config, first, second)
    row_tiles, vocab_tiles = cdiv(rows, config.block_n), cdiv(V, config.block_v)
    folded = problem.bias is None and problem.logit_softcap is None and problem.logit_scale > 0
    fold_kernel[(row_tiles * passes * vocab_tiles,)](
        first, second, operand(weight, config) if options["DESCRIPTOR"] else weight, problem.bias, problem.target,
        chunk.order, chunk.count, partials.max, partials.sum, partials.dot, partials.arg, partials.target, block,
        first.stride(0), second.stride(0), weight.stride(0), block.stride(0) if block is not None else 0,
        chunk.first, rows, row_tiles, passes, vocab_tiles, V, D, problem.logit_scale, problem.logit_softcap or 0.0,
        SOFTCAP=problem.logit_softcap is not None, FOLDED=folded, **options,
    )  # fmt: skip


def combine(
    problem: HeadProblem,
    chunk: RowChunk,
    partials: Partials,
    values: dict[str, Tensor],  # "nll", and what else is wanted of lse, entropy, argmax, lse_lo and vig
    pass_index: int = 0,
    nll_image: Tensor | None = None,  # of which "vig" is the difference
) -> None:
    """Launch `combine_kernel` for one pass of a chunk; the tensors of `values` are (N,)."""
    rows = chunk.rows
    statistics = (values.get(name) for name in ("lse", "entropy", "argmax", "lse_lo"))
    combine_kernel[(cdiv(rows, COMBINE_ROWS),)](
        partials.max, partials.sum, partials.dot, partials.arg, partials.target, problem.target, chunk.order,
        chunk.count, values["nll"], *statistics, nll_image, values.get("vig"),
        chunk.first, rows, pass_index * rows, rows * partials.passes, partials.parts, problem.weight.shape[0],
        PART=partials.part, BLOCK_N=COMBINE_ROWS, BLOCK_T=COMBINE_PARTS, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
