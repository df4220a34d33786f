"""linear_cross_entropy's custom op: loss and gradients in one forward pass, and what the backward makes of them."""

from __future__ import annotations

import torch
from torch import Tensor

from vig_kernels import backend_table, check, dispatch
from vig_kernels.problem import HEAD_SCHEMA, HeadProblem, Needs, empty_output

STATS = ("nll", *check.STATS)
CAST_BYTES = 8 << 20  # what is cast at a time when a float32 gradient is scaled into its output


def gradient_dtypes(backend: str, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """What a backend forms the gradients of hidden, weight and bias in, for inputs of `dtype`."""
    kept = dtype == torch.bfloat16 and backend_table.BACKENDS[backend].bfloat16_gradients
    stored = dtype if kept else torch.float32
    return stored, stored, torch.float32


def _kept_rows(problem: HeadProblem, needs: Needs, budget: int, backend: str) -> int:
    """Rows of the logits' gradients that are kept for the backward instead of a float32 weight gradient."""
    if not backend_table.BACKENDS[backend].keeps_block:
        return 0
    return dispatch.module("linear_cross_entropy", backend).kept_rows(problem, needs, budget)


@torch.library.custom_op(
    "vig_kernels::linear_cross_entropy",
    mutates_args=(),
    schema=f"({HEAD_SCHEMA}, Tensor? row_weight, float z_loss, bool[] needs, int budget, bool[] wanted, str backend) "
    f"-> ({', '.join(['Tensor'] * (6 + len(STATS)))})",
)
def loss_and_gradients(*args):
    """(loss_sum, gradients of loss_sum as `gradient_dtypes` says, kept block, factors of its rows, STATS); empty where
    not needed or wanted. With a kept block the weight's gradient is empty: `weight_from_block` forms it."""
    problem, (row_weight, z_loss, needs, budget, wanted, backend) = HeadProblem(*args[:8]), args[8:]
    check.target_range(problem)
    check.num_kept(problem)
    if problem.target.numel() == 0:
        return tuple(torch.zeros_like(x) for x in _forward_fake(*args))
    module = dispatch.module("linear_cross_entropy", backend)
    names = [stat for stat, asked in zip(STATS, wanted, strict=True) if asked]
    row, values = backend_table.BACKENDS[backend], {}
    if row.fills_values:
        values = {name: empty_output(problem, name, problem.target.shape[0]) for name in names}
        for name, value in values.items():
            value.fill_(-1 if name == "argmax" else 0)
    more = ((budget,) if row.keeps_block else ()) + ((values,) if values else ())
    with torch.autocast(problem.hidden.device.type, enabled=False):
        loss, *formed = module.forward_backward(problem, row_weight, z_loss, Needs(*needs), *more)
        values = values or _swept_apart(problem, names, backend)
    formed += [None] * (5 - len(formed))
    values = [values[name] if name in values else empty_output(problem, name, 0) for name in STATS]
    return loss, *(loss.new_empty(0) if tensor is None else tensor for tensor in formed), *values


def _swept_apart(problem: HeadProblem, names: list[str], backend: str) -> dict[str, Tensor]:
    if not names:
        return {}
    run = dispatch.module("linear_nll", backend).forward
    nll, values = run(problem, tuple(name for name in names if name != "nll"))
    return {"nll": nll} | values


@loss_and_gradients.register_fake
def _forward_fake(*args):
    problem, (_, _, needs, budget, wanted, backend) = HeadProblem(*args[:8]), args[8:]
    hidden, (V, _) = problem.hidden, problem.weight.shape
    kept = _kept_rows(problem, Needs(*needs), budget, backend)
    formed = Needs(*needs)._replace(weight=needs[1] and not kept)
    grads = [
        hidden.new_empty(x.shape if need else 0, dtype=dtype if need else torch.float32)
        for x, need, dtype in zip(
            (hidden, problem.weight, problem.bias),
            formed,
            gradient_dtypes(backend, hidden.dtype),
            strict=True,
        )
    ]
    if kept:
        padded = dispatch.module("linear_cross_entropy", backend).padded(V)
        block, row_factor = hidden.new_empty(kept, padded), hidden.new_empty(kept, dtype=torch.float32)
    else:
        block, row_factor = (hidden.new_empty(0, dtype=torch.float32) for _ in range(2))
    asked = zip(STATS, wanted, strict=True)
    values = [empty_output(problem, name, problem.target.shape[0] if asks else 0) for name, asks in asked]
    return hidden.new_empty((), dtype=torch.float32), *grads, block, row_factor, *values


def _save(ctx, inputs, output):
    problem, (row_weight, *ctx.rest) = HeadProblem(*inputs[:8]), inputs[8:]
    needs = Needs(*ctx.rest[1])
    _, *grads = output[: -len(STATS)]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.options = problem[4:]
    # held here, not saved: a backward pops them, scales those of float32 in place and hands them out
    ctx.grads = [grads]
    ctx.keeps_block = grads[3].numel() > 0  # of which the weight's gradient is formed
    formed = needs._replace(weight=needs.weight and not ctx.keeps_block)
    ctx.dtypes = [
        x.dtype if need else None
        for x, need in zip((problem.hidden, problem.weight, problem.bias), formed, strict=True)
    ]
    ctx.save_for_backward(*problem[:4], row_weight)  # what a second backward recomputes from


def _backward(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * 14
    sums = _taken(ctx)
    # asked for once at most: a checkpoint that does not re-enter gives what was saved a single time
    saved = ctx.saved_tensors if sums is None or ctx.keeps_block or torch.is_grad_enabled() else ()
    if sums is None:
        sums = _again(ctx, saved)
    *grads, block, row_factor = sums
    grad_hidden, grad_weight, grad_bias = (
        None if dtype is None else _scaled(grad, grad_loss, dtype, saved)
        for grad, dtype in zip(grads, ctx.dtypes, strict=True)
    )
    if ctx.keeps_block:
        grad_weight = _weight_of(ctx, block, row_factor, grad_loss, saved)
    return grad_hidden, grad_weight, None, grad_bias, *(None,) * 10


loss_and_gradients.register_autograd(_backward, setup_context=_save)


def _taken(ctx) -> list[Tensor] | None:
    """The sums for whoever asks first, None for all others: list.pop is atomic, so two threads never share them.

    They are gone even if the backward then fails: what is scaled half is never seen again. Nor does a loss that is
    kept for the log keep them alive.
    """
    try:
        return ctx.grads.pop()
    except IndexError:
        return None


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype, saved) -> Tensor:
    """grad * factor in `dtype`: in place where it may be, else through an op that refuses a second derivative.

    saved: the inputs that the gradient depends on; under create_graph they make it part of the graph.
    """
    if type(grad) is not Tensor:  # the compiler reuses memory itself, and refuses a second derivative itself
        return (grad * factor).to(dtype)
    if dtype == grad.dtype and not torch.is_grad_enabled() and not check.is_batched(factor):
        return grad if grad.device.type == "cpu" and float(factor) == 1.0 else grad.mul_(factor)
    differentiated = [x for x in saved if x is not None and x.requires_grad]
    return scale_gradient(grad, factor, dtype, differentiated[0] if torch.is_grad_enabled() else None)


def _again(ctx, saved) -> list[Tensor]:
    """The sums once more, bit for bit: another backward has taken them."""
    *tensors, row_weight = saved
    z_loss, needs, budget, wanted, backend = ctx.rest
    without = z_loss, needs, budget, [False] * len(wanted), backend
    with torch.no_grad():
        return loss_and_gradients(*tensors, *ctx.options, row_weight, *without)[1 : -len(STATS)]


def _weight_of(ctx, block: Tensor, row_factor: Tensor, factor: Tensor, saved) -> Tensor:
    """The weight's gradient from a kept block; under create_graph part of the graph, as in `_scaled`."""
    hidden, weight, target, *_ = saved
    problem = HeadProblem(hidden, weight, target, None, *ctx.options)
    return weight_from_block(
        block, row_factor, hidden, target, problem.ignore_index, weight, factor, ctx.rest[-1]
    )


@torch.library.custom_op("vig_kernels::linear_cross_entropy_weight", mutates_args=())
def weight_from_block(
    block: Tensor,
    row_factor: Tensor,
    hidden: Tensor,
    target: Tensor,
    ignore_index: int,
    weight: Tensor,
    factor: Tensor,
    backend: str,
) -> Tensor:
    """factor * block.T @ hidden of the kept rows, (V, D) in the weight's type, cast once. It has no gradient of its
    own: `weight`, of which only the shape is read, makes the result part of the graph, and a second differentiation
    raises."""
    run = dispatch.module("linear_cross_entropy", backend).weight_gradient
    with torch.autocast(hidden.device.type, enabled=False):
        return run(block, row_factor, hidden, target, ignore_index, weight.shape[0], factor)


@weight_from_block.register_fake
def _weight_fake(block, row_factor, hidden, target, ignore_index, weight, factor, backend):
    return hidden.new_empty(weight.shape)


@torch.library.custom_op(
    "vig_kernels::scale_gradient",
    mutates_args=(),
    schema="(Tensor gradient, Tensor factor, ScalarType dtype, Tensor? differentiated) -> Tensor",
)
def scale_gradient(gradient, factor, dtype, differentiated):
    """(gradient * factor) in float32, cast once; on a CPU, whose cast is an operation of its own, a few MiB at a time.

    It has no gradient of its own. `differentiated` is an input that the gradient depends on: with it the result
    is part of the graph, and a second differentiation raises instead of leaving this part out.
    """
    out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    if gradient.device.type != "cpu":
        return torch.mul(gradient, factor, out=out)  # one kernel, which casts as it writes
    step = max(1, CAST_BYTES // max(1, 4 * gradient[:1].numel()))
    for at in range(0, gradient.shape[0], step):
        out[at : at + step] = gradient[at : at + step] * factor
    return out


@scale_gradient.register_fake
def _scale_fake(gradient, factor, dtype, differentiated):
    return torch.empty(gradient.shape, dtype=dtype, device=gradient.device)


@weight_from_block.register_vmap
def _weight_vmap(info, in_dims, *args):
    """Of many upstream factors at once: one product each."""
    *others, factor, backend = args
    if in_dims[6] is None or any(dim is not None for dim in in_dims[:6]):
        raise NotImplementedError("only the upstream factor of linear_cross_entropy can be batched")
    return torch.stack([weight_from_block(*others, one, backend) for one in factor.unbind(in_dims[6])]), 0
