"""Token VIG: what the image adds to the log-probability of each answer token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vig_kernels import check, dispatch, reference
from vig_kernels.problem import HEAD_SCHEMA, HeadProblem


class TokenVIG(NamedTuple):
    vig: Tensor  # (...) float32, nats: nll_null - nll_image
    nll_image: Tensor  # (...) float32
    nll_null: Tensor  # (...) float32


@torch.no_grad()
def linear_vig(
    hidden_image: Tensor,  # (..., D)
    hidden_null: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (...)
    *,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
) -> TokenVIG:
    """VIG_t = NLL(a_t | a_<t, Q, null image) - NLL(a_t | a_<t, Q, image), in nats, in one sweep of the weight.

    Token-level Visual Information Gain of arXiv 2602.17186, section 3; a sample's VIG is the mean over its answer
    tokens. Arguments, accuracy and errors are those of `linear_nll`, for two hidden states of one shape. Ignored
    rows give 0.0 three times; equal hidden states give exactly 0.0. `nll_image` has the bits of `linear_nll`.
    No gradient.
    """
    problem, null = check.linear(
        {"hidden_image": hidden_image, "hidden_null": hidden_null},
        weight,
        target,
        bias=bias,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        ignore_index=ignore_index,
    )
    name = dispatch.resolve("linear_vig", backend, problem.weight.device)
    if name == "reference":
        check.target_range(problem)
        found = reference.linear_vig(
            problem.hidden, null.hidden, *problem[1:3], **problem.reference_options()
        )
        vig, nll_image, nll_null = (x.float() for x in found)
    else:
        check.forward_mode(problem.hidden, null.hidden, problem.weight, problem.bias)
        vig, nll_image, nll_null = _op(*problem, null.hidden, name)
    vig = vig.masked_fill(nll_image == nll_null, 0.0)  # also where both are infinite
    shape = hidden_image.shape[:-1]
    return TokenVIG(vig.reshape(shape), nll_image.reshape(shape), nll_null.reshape(shape))


@torch.library.custom_op(
    "vig_kernels::linear_vig",
    mutates_args=(),
    schema=f"({HEAD_SCHEMA}, Tensor hidden_null, str backend) -> (Tensor, Tensor, Tensor)",
)
def _op(*args):
    """(vig, nll_image, nll_null); the problem's hidden rows are those of the image pass."""
    problem, (hidden_null, backend) = HeadProblem(*args[:8]), args[8:]
    check.target_range(problem)
    if problem.target.numel() == 0:
        return _fake(*args)
    run = dispatch.module("linear_vig", backend).forward
    with torch.autocast(problem.hidden.device.type, enabled=False):
        return run(problem, hidden_null)


@_op.register_fake
def _fake(*args):
    target = HeadProblem(*args[:8]).target
    return tuple(target.new_empty(target.shape, dtype=torch.float32) for _ in range(3))
