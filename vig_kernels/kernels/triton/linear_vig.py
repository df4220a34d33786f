"""linear_vig by Triton: linear_nll's kernels, launched once over the rows of both passes.

The row tiles of the image pass and of the null pass stand side by side in one grid, so a weight tile that has been
fetched serves both before it leaves the L2 cache. Nothing else differs from linear_nll, not even the compiled
kernel: nll_image has the bits of linear_nll, and equal hidden states give equal values. The difference is taken
where the second pass is combined.
"""

from __future__ import annotations

from torch import Tensor

from vig_kernels.problem import HeadProblem

from .linear_nll import sweep
from .pair_fold import divergence


def with_stats(
    problem: HeadProblem, hidden_null: Tensor, stats: tuple[str, ...]
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """(vig, nll_image, nll_null, stats), each (N,), as linear_nll defines nll; one sweep of the weight.

    "kl", which needs both logits of an entry, takes a sweep of its own (pair_fold.py), so that all else keeps its bits.
    """
    kinds = tuple(dict.fromkeys(stat.rsplit("_", 1)[0] for stat in stats if stat != "kl"))
    image, null = sweep(problem, kinds, hidden_null)
    found = {
        stat: (null if stat.endswith("_null") else image)[stat.rsplit("_", 1)[0]]
        for stat in stats
        if stat != "kl"
    }
    if "kl" in stats:
        found["kl"] = divergence(problem, hidden_null)
    return null["vig"], image["nll"], null["nll"], found
