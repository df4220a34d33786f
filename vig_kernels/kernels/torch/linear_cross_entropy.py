"""linear_cross_entropy in chunked PyTorch: loss and gradients in one pass over the rows, three products in all.

Rows come in chunks whose float32 logits fill at most 96 MiB; they are turned into the logits' gradient in place.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vig_kernels.kernels.torch.precision import float32_products
from vig_kernels.kernels.torch.tiles import (
    chunks,
    compact,
    finite_or_zero,
    gather_rows,
    logits_tile,
    tile_shape,
)
from vig_kernels.problem import HeadProblem, Needs

LOGITS_BYTES = 96 << 20


def forward_backward(
    problem: HeadProblem,
    row_weight: Tensor | None,
    z_loss: float,
    needs: Needs,
    values: dict[str, Tensor] | None = None,  # (N,) tensors to fill: any of nll, lse, entropy, argmax
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """loss_sum = sum_n w_n (nll_n + z_loss lse_n^2) and its float32 gradients (None where not needed).

    Rows that are ignored keep what stands in `values`.
    """
    hidden, weight, target = problem[:3]
    size, width = hidden.shape
    kept = compact(problem)
    live = target if kept is None else target[kept]
    dead = (live == problem.ignore_index) | (live < 0) | (live >= weight.shape[0])
    if row_weight is None:
        live_weight = torch.ones(live.shape[0], dtype=torch.float32, device=live.device)
    else:
        live_weight = row_weight if kept is None else row_weight[kept]
    live_weight = live_weight.masked_fill(dead, 0.0)

    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    sums = [
        torch.zeros(shape, dtype=torch.float32, device=hidden.device) if need else None
        for need, shape in zip(needs, ((size, width), weight.shape, weight.shape[:1]), strict=True)
    ]
    step = max(1, min(tile_shape(width)[0], LOGITS_BYTES // (4 * weight.shape[0])))
    with float32_products(weight.dtype):
        for part in chunks(live.shape[0], step):
            h = gather_rows(hidden, kept, part).masked_fill_(dead[part].unsqueeze(1), 0.0)
            rows = slice(part.start, part.stop) if kept is None else kept[part]
            chunk = LiveRows(rows, live[part], dead[part], live_weight[part])
            loss += _chunk(problem, h, chunk, z_loss, sums, values or {})
    return (loss, *sums)


def _spread(e: Tensor, columns: list[slice]) -> Tensor:
    """(n,) sum of e log e: of exp(z - base) times z - base."""
    return sum(torch.xlogy(e[:, part], e[:, part]).sum(1) for part in columns)


class LiveRows(NamedTuple):
    """What is known of each row of a chunk."""

    rows: slice | Tensor  # of the problem
    target: Tensor  # (n,)
    dead: Tensor  # (n,) bool: without a valid target
    weight: Tensor  # (n,) 0 for dead ones


def _chunk(problem: HeadProblem, h: Tensor, chunk: LiveRows, z_loss: float, sums, values) -> Tensor:
    """Loss of one chunk of rows; its gradients are added to `sums`, its values stored."""
    rows, target, dead, row_weight = chunk
    vocabulary, width = problem.weight.shape
    columns = list(chunks(vocabulary, tile_shape(width)[1]))
    z = h.new_empty(h.shape[0], vocabulary)
    for part in columns:
        logits_tile(h, problem.weight[part].float(), part, problem, out=z[:, part])
    at = target.masked_fill(dead, 0).unsqueeze(1)
    target_logit = z.gather(1, at).squeeze(1)
    top = z.amax(1)
    base = finite_or_zero(top)
    argmax = z.argmax(1) if "argmax" in values else None
    total = z.sub_(base.unsqueeze(1)).exp_().sum(1)
    log_total = total.log()
    lse = base + log_total
    nll = (base - target_logit) + log_total
    loss = row_weight * (nll + z_loss * lse.square())
    found = {"nll": nll, "lse": lse, "argmax": argmax}
    if "entropy" in values:
        found["entropy"] = (log_total - _spread(z, columns) / total).clamp_(min=0.0)
    for name, value in values.items():
        value[rows] = torch.where(dead, value[rows], found[name])

    grad_hidden, grad_weight, grad_bias = sums
    if any(grad is not None for grad in sums):
        if problem.logit_softcap is not None:
            for part in columns:  # d softcap / d x = 1 - (z / cap)^2, with z = base + log of what stands here
                cell = z[:, part]
                cell.mul_(
                    (1.0 - ((cell.log() + base.unsqueeze(1)) / problem.logit_softcap).square_()).clamp_(
                        min=0.0
                    )
                )
        z.mul_((row_weight * (1.0 + 2.0 * z_loss * lse) / total).unsqueeze(1))
        slope = (
            1.0 if problem.logit_softcap is None else 1.0 - (target_logit / problem.logit_softcap).square()
        )
        z.scatter_add_(1, at, -(row_weight * slope).unsqueeze(1))
        if problem.logit_scale != 1.0:
            z.mul_(problem.logit_scale)
    chunk_hidden = torch.zeros_like(h) if grad_hidden is not None else None
    for part in columns:
        if chunk_hidden is not None:
            chunk_hidden.addmm_(z[:, part], problem.weight[part].float())
        if grad_weight is not None:
            grad_weight[part].addmm_(z[:, part].T, h)
        if grad_bias is not None:
            grad_bias[part] += z[:, part].sum(0)
    if chunk_hidden is not None:
        grad_hidden[rows] = chunk_hidden
    return torch.where(dead | (row_weight == 0), 0.0, loss).sum()
