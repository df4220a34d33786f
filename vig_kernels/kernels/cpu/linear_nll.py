"""Per-token negative log-likelihood in C++: logit tiles are folded in registers and cache, never stored."""

from __future__ import annotations

import torch
from torch import Tensor

from vig_kernels.kernels.cpu import native


def why_not(device: torch.device) -> str | None:
    """None when this backend runs on tensors of `device`, else the reason and the cure."""
    return native.why_not(device)


def forward(
    hidden: Tensor,  # (N, D) float32 | bfloat16 | float16, any row stride
    weight: Tensor,  # (V, D) same dtype, any row stride
    target: Tensor,  # (N,) int64
    bias: Tensor | None,  # (V,) same dtype or float32
    logit_scale: float,
    logit_softcap: float | None,
    ignore_index: int,
    stats: tuple[str, ...],
) -> tuple[Tensor, dict[str, Tensor]]:
    """(nll (N,) float32 in nats, {"lse": ..., "entropy": ..., "argmax": ...} as asked); ignored rows 0.0 and -1.

    "lse_lo" is what float32 cannot hold of lse.
    Ignored rows are left out before any work. The bits of a row depend on neither threads nor other rows.
    """
    rows = hidden.shape[0]
    nll = hidden.new_zeros(rows, dtype=torch.float32)
    values = {
        name: target.new_full((rows,), -1) if name == "argmax" else torch.zeros_like(nll) for name in stats
    }
    described, kept_bias = native.head(hidden, weight, bias, logit_scale, logit_softcap)
    target = target.contiguous()
    native.module().linear_nll(
        described,
        [native.rows_view(hidden, target)],
        ignore_index,
        [
            nll.data_ptr(),
            *(native.address(values.get(name)) for name in ("lse", "lse_lo", "entropy", "argmax")),
        ],
        torch.get_num_threads(),
    )
    del kept_bias  # read until here
    return nll, values


def backward(
    grad_nll: Tensor | None,  # (N,) float32
    grad_lse: Tensor | None,  # (N,) float32
    grad_entropy: Tensor | None,  # (N,) float32
    lse: Tensor,  # (N,) float32, of the forward
    entropy: Tensor | None,  # (N,) float32, of the forward; needed with grad_entropy
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) int64
    bias: Tensor | None,  # (V,)
    logit_scale: float,
    logit_softcap: float | None,
    ignore_index: int,
    needs: tuple[bool, bool, bool],  # hidden, weight, bias
    num_kept: int | None = None,  # not needed on a CPU: rows are counted as they are compacted
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of any upstream in the inputs' dtypes, with the logits formed anew, block by block of the vocabulary.

    dlogit = p * (g_nll + g_lse - g_entropy * (logit - lse + entropy)) - [v = target] * g_nll, sums in float32.
    """
    grad_hidden = hidden.new_zeros(hidden.shape) if needs[0] else None
    grad_weight = native.empty_gradient(weight, weight.dtype) if needs[1] else None
    grad_bias = (
        weight.new_empty(weight.shape[0], dtype=torch.float32) if needs[2] and bias is not None else None
    )
    described, kept_bias = native.head(hidden, weight, bias, logit_scale, logit_softcap)
    upstream = [
        None if x is None else x.float().contiguous()
        for x in (grad_nll, grad_lse, grad_entropy, lse, entropy)
    ]
    target = target.contiguous()
    native.module().linear_nll_backward(
        described,
        native.rows_view(hidden, target),
        ignore_index,
        [native.address(x) for x in upstream[:3]],
        [native.address(x) for x in upstream[3:]],
        [native.address(x) for x in (grad_hidden, grad_weight, grad_bias)],
        torch.get_num_threads(),
    )
    del kept_bias  # read until here
    return grad_hidden, grad_weight, grad_bias if grad_bias is None else grad_bias.to(bias.dtype)
