"""What travels together through contracts, custom ops and backends: one value each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# the arguments of a custom op that are a HeadProblem, in the order of its fields
HEAD_SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor target, Tensor? bias, float logit_scale, float? logit_softcap, "
    "int ignore_index, SymInt? num_kept"
)
DIFFERENTIABLE = (0, 1, 3)  # of these: hidden, weight and bias


class HeadProblem(NamedTuple):
    """Rows of hidden states and an LM head, checked and flat: z = softcap(logit_scale * (hidden weight^T + bias))."""

    hidden: Tensor  # (N, D) float32 | bfloat16 | float16, last stride 1, any row stride
    weight: Tensor  # (V, D) same dtype, last stride 1, any row stride
    target: Tensor  # (N,) int64
    bias: Tensor | None = None  # (V,) same dtype or float32
    logit_scale: float = 1.0
    logit_softcap: float | None = None  # cap * tanh(logits / cap), after the scale
    ignore_index: int = -100
    # rows that are not ignored, where the caller knows: a GPU need not count them
    num_kept: int | None = None

    def reference_options(self) -> dict:
        """The keyword arguments of the functions of `vig_kernels.reference`."""
        return {
            "bias": self.bias,
            "logit_scale": self.logit_scale,
            "logit_softcap": self.logit_softcap,
            "ignore_index": self.ignore_index,
        }

    def take(self, rows) -> HeadProblem:
        """The problem of some of its rows: a slice, a mask or indices. How many of them are kept is not known."""
        return self._replace(hidden=self.hidden[rows], target=self.target[rows], num_kept=None)


class Upstream(NamedTuple):
    """Gradients of a loss by what linear_nll gives, (N,) float32 each, or None."""

    nll: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None


class Saved(NamedTuple):
    """What the backward of linear_nll needs of its forward, (N,) float32 each."""

    lse: Tensor
    entropy: Tensor | None = None  # needed with Upstream.entropy


class Needs(NamedTuple):
    """Which gradients are wanted; the others are None and cost nothing."""

    hidden: bool = True
    weight: bool = True
    bias: bool = True


class Gaussian(NamedTuple):
    """The filter of gaussian_blur: one strength for each leading image."""

    sigma_y: Tensor  # (L,) float64 on the CPU, pixels
    sigma_x: Tensor  # (L,) float64 on the CPU, pixels
    truncate: float = 3.0  # taps reach ceil(truncate * sigma) pixels
    border: str = "reflect"  # or "replicate"
    precision: str = "float32"  # or "fast": products may be 16-bit


def empty_output(problem: HeadProblem, name: str, rows: int) -> Tensor:
    """An uninitialised (rows,) result: int64 for argmax, else float32."""
    return problem.target.new_empty(rows, dtype=torch.int64 if name.startswith("argmax") else torch.float32)


def vig_of(nll_image: Tensor, nll_null: Tensor) -> Tensor:
    """nll_null - nll_image, and 0 where both are infinite."""
    return (nll_null - nll_image).masked_fill(nll_image == nll_null, 0.0)


def with_lse_lo(upstream: Upstream, saved: Saved, lse_lo: Tensor) -> tuple[Upstream, Saved]:
    """What a backward that knows lse alone must be given: p = exp(z - lse) exp(-lse_lo).

    d loss / d z_v = p_v (g_nll + g_lse - g_entropy (z_v - lse - lse_lo + entropy)) - [v = target] g_nll, so that
    the factor exp(-lse_lo) goes into g_lse and g_entropy, and lse_lo itself into the entropy.
    """
    shrink = torch.expm1(-lse_lo)  # small: what it multiplies keeps its bits where lse_lo is 0
    softmax = [grad for grad in upstream[:2] if grad is not None]
    if softmax:
        change = sum(softmax) * shrink
        upstream = upstream._replace(lse=change if upstream.lse is None else upstream.lse + change)
    if upstream.entropy is None:
        return upstream, Saved(saved.lse)
    upstream = upstream._replace(entropy=upstream.entropy + upstream.entropy * shrink)
    return upstream, Saved(saved.lse, saved.entropy - lse_lo)
