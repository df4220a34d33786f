"""linear_vig in chunked PyTorch: each weight tile is read and upcast once for both passes."""

from __future__ import annotations

from torch import Tensor

from vig_kernels.kernels.torch.linear_nll import sweep
from vig_kernels.problem import HeadProblem, vig_of


def with_stats(
    problem: HeadProblem, hidden_null: Tensor, stats: tuple[str, ...]
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """(vig, nll_image, nll_null, stats), (N,) each: the tiles of linear_nll, hence its bits."""
    kinds = tuple(dict.fromkeys(stat.rsplit("_", 1)[0] for stat in stats))
    image, null = sweep(problem, (problem.hidden, hidden_null), kinds)
    found = {stat: (null if stat.endswith("_null") else image)[stat.rsplit("_", 1)[0]] for stat in stats}
    return vig_of(image["nll"], null["nll"]), image["nll"], null["nll"], found
