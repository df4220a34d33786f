"""The autograd of nll, for the op over a whole head and the one over a shard of it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import compress

from torch import Tensor

from vig_kernels import check
from vig_kernels.ops.registration import Derivative
from vig_kernels.problem import DIFFERENTIABLE, HeadProblem, Needs, Upstream

STATS = (*check.STATS, "lse_lo")  # what a backend's forward may be asked for, besides nll


def derivative(backward_op: Callable, wanted: Callable, between: int = 0) -> Derivative:
    """Of an op whose outputs are [nll, those of STATS that are wanted]: that of nll, lse and entropy by hidden, weight
    and bias.

    The op: (*HeadProblem, ..., backend); the first `between` arguments behind the problem go to `backward_op` too.
    wanted: (arguments) -> which of STATS; lse and lse_lo are, where a gradient may be asked for.
    backward_op: (*HeadProblem, *those, *Upstream, lse, lse_lo, entropy, needs, backend) -> gradients of hidden, weight
        and bias.
    """

    def save(ctx, inputs, output):
        problem = HeadProblem(*inputs[:8])
        values = dict(zip(compress(STATS, wanted(inputs)), output[1:], strict=True))
        ctx.options, ctx.between, ctx.backend = problem[4:], inputs[8 : 8 + between], inputs[-1]
        ctx.save_for_backward(*problem[:4], values["lse"], values["lse_lo"], values.get("entropy"))
        ctx.set_materialize_grads(False)

    def differentiate(ctx, *grads):
        *tensors, lse, lse_lo, entropy = ctx.saved_tensors
        problem = HeadProblem(*tensors, *ctx.options)
        needs = Needs(*ctx.needs_input_grad[1:])
        upstream = Upstream(*grads)
        inputs = problem.hidden, problem.weight, problem.bias
        if not any(needs) or all(grad is None for grad in upstream) or problem.target.shape[0] == 0:
            found = [x.new_zeros(x.shape) if need else None for x, need in zip(inputs, needs, strict=True)]
        else:
            saved = lse, lse_lo, entropy
            found = backward_op(*problem, *ctx.between, *upstream, *saved, list(needs), ctx.backend)
        return tuple(grad if need else None for grad, need in zip(found, needs, strict=True))

    return Derivative(DIFFERENTIABLE, lambda args: 1 + sum(wanted(args)[:2]), save, differentiate)


def fake_gradients(*args) -> tuple[Tensor, ...]:
    """The fake of a `backward_op`."""
    problem, needs = HeadProblem(*args[:8]), args[-2]
    inputs = problem.hidden, problem.weight, problem.bias
    return tuple(
        x.new_empty(x.shape) if need else problem.hidden.new_empty(0)
        for x, need in zip(inputs, needs, strict=True)
    )
