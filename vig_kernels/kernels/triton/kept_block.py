"""The weight gradient of a bfloat16 problem whose block of d loss / d y was kept from the forward.

    grad_weight = block.T @ (factor * row_factor * hidden)[order]        the upstream factor goes into the gathered rows

One kernel gathers, scales and rounds the rows of hidden; the vendor's GEMM sums in float32 and casts once: no float32
buffer of (V, D), no pass over the gradient.

At the target the gradient of the logits is near -1 and its rounding, 2^-9, is by far the largest of the row. What is
lost cannot be added to a sum that is rounded already: it is less than half of its last place. So `finish_kernel`
divides each row by row_factor = exact / rounded(exact / sqrt 2) of that one entry, which then is a bfloat16 number,
exactly, and the factor goes back in where it costs one number a row: into the gathered rows here, into the hidden
gradient's sums there. (Without the sqrt 2 the factor is so near 1 that a row of hidden rounds back to itself.)
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, device_guard, interpreted
from .logit_gradients import product
from .logit_tiles import narrow
from .row_order import parts_of_order

GATHER_COLUMNS = 1024


@triton.jit(do_not_specialize_on_alignment=["order", "count", "factor", "row_factor"])
def gather_kernel(
    hidden,  # (N, D)
    order,  # (N,) int64: the kept rows first
    count,  # () int64: how many rows are kept
    factor,  # () float32
    row_factor,  # (rows,) float32
    out,  # (rows, D) contiguous, the type of hidden
    stride_hidden,
    D,
    BLOCK_D: tl.constexpr,
):
    """out[i] = factor * row_factor[i] * hidden[order[i]], and 0 for a row that is ignored: what it holds may be NaN.
    Grid: (rows, blocks of D)."""
    place = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    live = (column < D) & (column * 0 + place < tl.load(count))
    row = tl.load(order + place)
    scale = tl.load(factor) * tl.load(row_factor + place)
    x = tl.load(hidden + row * stride_hidden + column, mask=live, other=0.0).to(tl.float32)
    x = tl.where(live, x * scale, 0.0)
    tl.store(out + place * D + column, narrow(x, out.dtype.element_ty), mask=column < D)


def weight_gradient(
    block: Tensor,  # (rows, padded V) bfloat16: logit_scale * d loss / d y of the kept rows, over row_factor
    row_factor: Tensor,  # (rows,) float32
    visit: Tensor,  # (N + 1,) int64: the order of the rows, and how many are kept
    hidden: Tensor,  # (N, D) bfloat16
    V: int,
    factor: Tensor,  # () float32: upstream of the loss
) -> Tensor:
    """d loss / d weight, (V, D) bfloat16, times the upstream factor. Nothing is read back to the host."""
    rows, D = block.shape[0], hidden.shape[1]
    with device_guard(hidden.device):
        order, count = parts_of_order(visit)
        gathered = hidden.new_empty(rows, D)
        columns = triton.next_power_of_2(D) if interpreted() else GATHER_COLUMNS
        gather_kernel[(rows, cdiv(D, columns))](
            hidden, order, count, factor.float(), row_factor, gathered, hidden.stride(0), D, BLOCK_D=columns,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        gradient = hidden.new_empty(V, D)
        product(gradient, block[:, :V].T, gathered)
    return gradient
