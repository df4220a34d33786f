"""The gradients of a bfloat16 problem whose block of d loss / d y was kept from the forward.

    grad_hidden[order] = factor * row_factor * (block @ weight)
    grad_weight = block.T @ (factor * row_factor * hidden)[order]        the upstream factor goes into the gathered rows

Two products by the vendor's GEMM, and one kernel between them: it scales, casts and puts in place the rows of the
hidden gradient, and gathers, scales and rounds those of hidden. The second product sums in float32 and casts once: no
float32 buffer of (V, D), no pass over its gradient.

At the target the gradient of the logits is near -1 and its rounding, 2^-9, is by far the largest of the row. What is
lost cannot be added to a sum that is rounded already: it is less than half of its last place. So `finish_kernel`
divides each row by row_factor = exact / rounded(exact / sqrt 2) of that one entry, which then is a bfloat16 number,
exactly, and the factor goes back in where it costs one number a row: into the gathered rows and the hidden gradient's
sums. (Without the sqrt 2 the factor is so near 1 that a row of hidden rounds back to itself.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, device_guard, interpreted
from .logit_gradients import accumulate, columns_of, product
from .logit_tiles import narrow

ROW_COLUMNS = 1024


@triton.jit(do_not_specialize=["N", "rows"], do_not_specialize_on_alignment=["visit", "factor", "row_factor"])
def rows_kernel(
    hidden,  # (N, D)
    total,  # (rows, D) contiguous float32: block @ weight, or None: no hidden gradient
    visit,  # (N + 1,) int64: the rows, kept ones first, and how many are kept
    factor,  # () float32
    row_factor,  # (rows,) float32
    gathered,  # (rows, D) contiguous, the type of hidden
    grad_hidden,  # (N, D) contiguous, the type of hidden, or None
    stride_hidden,
    scale,
    N,
    rows,
    D,
    BLOCK_D: tl.constexpr,
):
    """gathered[i] = s hidden[order[i]] and grad_hidden[order[i]] = s total[i] with s = factor * scale * row_factor[i],
    both 0 for a row that is ignored: what hidden holds there may be NaN. Grid: (N, blocks of D)."""
    place = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside, chosen = column < D, column * 0 + place < rows
    live = inside & chosen & (column * 0 + place < tl.load(visit + N))
    row = tl.load(visit + place)
    of_row = tl.load(row_factor + tl.minimum(place, rows - 1))
    upstream = tl.load(factor) * scale
    x = tl.load(hidden + row * stride_hidden + column, mask=live, other=0.0).to(tl.float32)
    x = tl.where(live, x * (upstream * of_row), 0.0)
    tl.store(gathered + place * D + column, narrow(x, gathered.dtype.element_ty), mask=inside & chosen)
    if grad_hidden is not None:
        g = tl.load(total + place * D + column, mask=live, other=0.0)
        g = tl.where(live, (g * of_row) * upstream, 0.0)
        tl.store(grad_hidden + row * D + column, narrow(g, grad_hidden.dtype.element_ty), mask=inside)


def block_gradients(
    kept: tuple[Tensor, Tensor, Tensor],
    hidden: Tensor,
    weight: Tensor,
    factor: Tensor,
    scale: float,
    needs_hidden: bool,
) -> tuple[Tensor | None, Tensor]:
    """d loss / d hidden (N, D), if it is needed, and d loss / d weight (V, D), bfloat16. Nothing is read back.

    Args:
        kept: (rows, padded V) bfloat16: logit_scale * d loss / d y of the kept rows, over row_factor; (rows,) float32:
            row_factor; (N + 1,) int64: the order of the rows, and how many are kept.
        hidden: (N, D) bfloat16, and weight (V, D).
        factor, scale: () float32 and a number, whose product is the upstream factor of the loss.
    """
    block, row_factor, visit = kept
    (N, D), rows, V = hidden.shape, block.shape[0], weight.shape[0]
    block, total, grad_hidden = columns_of(block, V), None, None
    with device_guard(hidden.device):
        if needs_hidden:
            total = hidden.new_empty(rows, D, dtype=torch.float32)
            accumulate(total, block, weight, first=True)
            grad_hidden = hidden.new_empty(N, D)
        gathered = hidden.new_empty(rows, D)
        columns = triton.next_power_of_2(D) if interpreted() else ROW_COLUMNS
        rows_kernel[(N, cdiv(D, columns))](
            hidden, total, visit, factor.float(), row_factor, gathered, grad_hidden, hidden.stride(0),
            scale, N, rows, D, BLOCK_D=columns, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        total = None  # freed before the weight's gradient is made
        grad_weight = hidden.new_empty(V, D)
        product(grad_weight, block.t(), gathered)
    return grad_hidden, grad_weight
