"""Token VIG: what the image adds to the log-probability of each answer token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vig_kernels import check, dispatch, reference


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
    scale = check.number("logit_scale", logit_scale)
    softcap, ignore_index = check.softcap(logit_softcap), check.integer("ignore_index", ignore_index)
    hiddens = {"hidden_image": hidden_image, "hidden_null": hidden_null}
    (image, null), weight, target, bias = check.linear(hiddens, weight, target, bias)
    name = dispatch.resolve("linear_vig", backend, weight.device)
    if name == "reference":
        check.target_range(target, weight.shape[0], ignore_index)
        options = {"bias": bias, "logit_scale": scale, "logit_softcap": softcap, "ignore_index": ignore_index}
        vig, nll_image, nll_null = (
            x.float() for x in reference.linear_vig(image, null, weight, target, **options)
        )
    else:
        check.forward_mode(image, null, weight, bias)
        vig, nll_image, nll_null = _op(image, null, weight, target, bias, scale, softcap, ignore_index, name)
    vig = vig.masked_fill(nll_image == nll_null, 0.0)  # also where both are infinite
    shape = hidden_image.shape[:-1]
    return TokenVIG(vig.reshape(shape), nll_image.reshape(shape), nll_null.reshape(shape))


@torch.library.custom_op(
    "vig_kernels::linear_vig",
    mutates_args=(),
    schema="(Tensor hidden_image, Tensor hidden_null, Tensor weight, Tensor target, Tensor? bias, float scale, "
    "float? softcap, int ignore_index, str backend) -> (Tensor, Tensor, Tensor)",
)
def _op(hidden_image, hidden_null, weight, target, bias, scale, softcap, ignore_index, backend):
    check.target_range(target, weight.shape[0], ignore_index)
    if target.numel() == 0:
        return _fake(hidden_image, hidden_null, weight, target, bias, scale, softcap, ignore_index, backend)
    run = dispatch.module("linear_vig", backend).forward
    with torch.autocast(weight.device.type, enabled=False):
        return run(hidden_image, hidden_null, weight, target, bias, scale, softcap, ignore_index)


@_op.register_fake
def _fake(hidden_image, hidden_null, weight, target, bias, scale, softcap, ignore_index, backend):
    return tuple(target.new_empty(target.shape, dtype=torch.float32) for _ in range(3))
