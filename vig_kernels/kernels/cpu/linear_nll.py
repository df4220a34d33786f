"""Per-token negative log-likelihood in C++: logit tiles are folded in registers and cache, never stored."""

from __future__ import annotations

import torch
from torch import Tensor

from vig_kernels.kernels.cpu import native
from vig_kernels.problem import HeadProblem, Needs, Saved, Upstream


def forward(problem: HeadProblem, stats: tuple[str, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """(nll (N,) float32 in nats, {"lse", "lse_lo", "entropy", "argmax": (N,) as asked}); ignored rows 0.0 and -1.

    Ignored rows are left out before any work. The bits of a row depend on neither threads nor other rows.
    """
    hidden, target = problem.hidden, problem.target.contiguous()
    rows = hidden.shape[0]
    values = {
        name: target.new_full((rows,), -1)
        if name == "argmax"
        else hidden.new_zeros(rows, dtype=torch.float32)
        for name in ("nll", *stats)
    }
    described, kept_bias = native.head(problem)
    native.module().linear_nll(
        described,
        [native.rows_view(hidden, target)],
        problem.ignore_index,
        native.outputs(values),
        torch.get_num_threads(),
    )
    del kept_bias  # read until here
    return values.pop("nll"), values


def backward(
    upstream: Upstream, saved: Saved, problem: HeadProblem, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of any upstream in the inputs' dtypes, with the logits formed anew, block by block of the vocabulary.

    dlogit = p * (g_nll + g_lse - g_entropy * (logit - lse + entropy)) - [v = target] * g_nll, sums in float32.
    """
    grads = native.gradients(problem, needs, problem.weight.dtype)
    described, kept_bias = native.head(problem)
    upstream, saved = (
        [None if x is None else x.float().contiguous() for x in values] for values in (upstream, saved)
    )
    target = problem.target.contiguous()
    native.module().linear_nll_backward(
        described,
        native.rows_view(problem.hidden, target),
        problem.ignore_index,
        *([native.address(x) for x in values] for values in (upstream, saved, grads)),
        torch.get_num_threads(),
    )
    del kept_bias  # read until here
    grad_hidden, grad_weight, grad_bias = grads
    return grad_hidden, grad_weight, None if grad_bias is None else grad_bias.to(problem.bias.dtype)
