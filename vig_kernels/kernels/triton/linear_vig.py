"""linear_vig by Triton: linear_nll's kernels, launched once over the rows of both passes.

The row tiles of the image pass and of the null pass stand side by side in one grid, so a weight tile that has been
fetched serves both before it leaves the L2 cache. Nothing else differs from linear_nll, not even the compiled
kernel: nll_image has the bits of linear_nll, and equal hidden states give equal values. The difference is taken
where the second pass is combined.
"""

from __future__ import annotations

from torch import Tensor

from .launch import why_not
from .linear_nll import sweep

__all__ = ["forward", "why_not"]


def forward(
    hidden_image: Tensor,  # (N, D)
    hidden_null: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) int64
    bias: Tensor | None,  # (V,)
    logit_scale: float,
    logit_softcap: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(vig, nll_image, nll_null), each (N,) float32, as linear_nll defines nll; one sweep of the weight."""
    hiddens = (hidden_image, hidden_null)
    image, null = sweep(hiddens, weight, target, bias, logit_scale, logit_softcap, ignore_index, ())
    return null[1]["vig"], image[0], null[0]
