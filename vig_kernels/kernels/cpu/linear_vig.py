"""Clean and null rows against each packed panel of the weight: one sweep for both, with the bits of linear_nll."""

from __future__ import annotations

import torch
from torch import Tensor

from vig_kernels.kernels.cpu import native
from vig_kernels.problem import HeadProblem, vig_of


def with_stats(
    problem: HeadProblem, hidden_null: Tensor, stats: tuple[str, ...]
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """(vig, nll_image, nll_null, stats), (N,) each, in nats, vig = nll_null - nll_image; ignored rows 0.0 and -1.

    problem.hidden are the rows of the image pass, hidden_null (N, D) those of the null pass. For "kl" a tile of rows
    of each pass meets the packed panel before the next: both logits of an entry are in cache then.
    """
    hidden, target = problem.hidden, problem.target.contiguous()
    both = (2, hidden.shape[0])
    values = {"nll": hidden.new_zeros(both, dtype=torch.float32)}
    for stat in stats:  # one sweep gives a statistic of both passes, which stand one behind the other
        kind = stat.rsplit("_", 1)[0]
        values[kind] = target.new_full(both, -1) if kind == "argmax" else torch.zeros_like(values["nll"])
    described, kept_bias = native.head(problem)
    native.module().linear_nll(
        described,
        [native.rows_view(hidden, target), native.rows_view(hidden_null, target)],
        problem.ignore_index,
        native.outputs(values),
        torch.get_num_threads(),
    )
    del kept_bias  # read until here
    image, null = values["nll"]
    found = {stat: values[stat.rsplit("_", 1)[0]][int(stat.endswith("_null"))].clone() for stat in stats}
    return vig_of(image, null), image.clone(), null.clone(), found
