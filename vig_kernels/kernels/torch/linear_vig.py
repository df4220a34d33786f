"""linear_vig in chunked PyTorch: each weight tile is read and upcast once for both passes."""

from __future__ import annotations

from vig_kernels.kernels.torch.linear_nll import sweep
from vig_kernels.kernels.torch.tiles import Head, why_not

__all__ = ["forward", "why_not"]


def forward(hidden_image, hidden_null, weight, target, bias, logit_scale, logit_softcap, ignore_index):
    """(vig, nll_image, nll_null), (N,) float32 each: the tiles of linear_nll, hence its bits."""
    head = Head(weight, bias, logit_scale, logit_softcap)
    image, null = sweep([hidden_image, hidden_null], head, target, ignore_index, ())
    return null["nll"] - image["nll"], image["nll"], null["nll"]
