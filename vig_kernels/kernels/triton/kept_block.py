"""The weight gradient of a bfloat16 problem whose block of d loss / d y was kept from the forward.

    grad_weight = block.T @ (factor * hidden[order])        the upstream factor goes into the gathered rows

One kernel gathers, scales and rounds the rows of hidden, the vendor's GEMM sums in float32 and casts once, and what
the block lost at the targets comes back row by row: no float32 buffer of (V, D), no pass over the gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import compaction_order, device_guard, interpreted
from .logit_gradients import product
from .logit_tiles import narrow
from .target_residual import TargetResidual

GATHER_COLUMNS = 1024


@triton.jit(do_not_specialize_on_alignment=["count", "factor"])
def gather_kernel(
    hidden,  # (N, D)
    order,  # (N,) int64: the kept rows first
    count,  # () int64: how many rows are kept
    factor,  # () float32
    out,  # (rows, D) contiguous, the type of hidden
    stride_hidden,
    D,
    BLOCK_D: tl.constexpr,
):
    """out[i] = factor * hidden[order[i]], and 0 for a row that is ignored: what it holds may be NaN. Grid: (rows,
    blocks of D)."""
    place = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    live = (column < D) & (column * 0 + place < tl.load(count))
    row = tl.load(order + place)
    x = tl.load(hidden + row * stride_hidden + column, mask=live, other=0.0).to(tl.float32)
    tl.store(out + place * D + column, narrow(x * tl.load(factor), out.dtype.element_ty), mask=column < D)


def weight_gradient(
    block: Tensor,  # (rows, padded V) bfloat16: logit_scale * d loss / d y of the kept rows
    lost: Tensor,  # (rows,) float32: what it loses at the targets
    hidden: Tensor,  # (N, D) bfloat16
    target: Tensor,  # (N,) int64
    ignore_index: int,
    V: int,
    factor: Tensor,  # () float32: upstream of the loss
) -> Tensor:
    """d loss / d weight, (V, D) bfloat16, times the upstream factor. Nothing is read back to the host."""
    rows, D = block.shape[0], hidden.shape[1]
    factor = factor.float()
    with device_guard(hidden.device):
        order, count = compaction_order(target, ignore_index)
        gathered = hidden.new_empty(rows, D)
        columns = triton.next_power_of_2(D) if interpreted() else GATHER_COLUMNS
        gather_kernel[(rows, triton.cdiv(D, columns))](
            hidden, order, count, factor, gathered, hidden.stride(0), D, BLOCK_D=columns, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip
        gradient = hidden.new_empty(V, D)
        product(gradient, block[:, :V].T, gathered)
        del gathered
        picked = order[:rows]
        residual = TargetResidual(target[picked], ignore_index, lost * factor)
        residual.correct_weight(gradient, hidden, picked)
    return gradient
