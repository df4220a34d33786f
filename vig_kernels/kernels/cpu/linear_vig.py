"""Clean and null rows against each packed panel of the weight: one sweep for both, with the bits of linear_nll."""

from __future__ import annotations

import torch
from torch import Tensor

from vig_kernels.kernels.cpu import native
from vig_kernels.problem import HeadProblem


def forward(problem: HeadProblem, hidden_null: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(vig, nll_image, nll_null), each (N,) float32 in nats, vig = nll_null - nll_image; ignored rows 0.0.

    problem.hidden are the rows of the image pass, hidden_null (N, D) those of the null pass.
    """
    hidden, target = problem.hidden, problem.target.contiguous()
    nll = hidden.new_zeros((2, hidden.shape[0]), dtype=torch.float32)
    described, kept_bias = native.head(problem)
    native.module().linear_nll(
        described,
        [native.rows_view(hidden, target), native.rows_view(hidden_null, target)],
        problem.ignore_index,
        [nll.data_ptr(), 0, 0, 0, 0],
        torch.get_num_threads(),
    )
    del kept_bias  # read until here
    return nll[1] - nll[0], nll[0].clone(), nll[1].clone()
