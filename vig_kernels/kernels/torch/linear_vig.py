"""linear_vig in chunked PyTorch: each weight tile is read and upcast once for both passes."""

from __future__ import annotations

from torch import Tensor

from vig_kernels.kernels.torch.linear_nll import sweep
from vig_kernels.problem import HeadProblem


def forward(problem: HeadProblem, hidden_null: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(vig, nll_image, nll_null), (N,) float32 each: the tiles of linear_nll, hence its bits."""
    image, null = sweep(problem, (problem.hidden, hidden_null), ())
    return null["nll"] - image["nll"], image["nll"], null["nll"]
