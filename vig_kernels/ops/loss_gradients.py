"""linear_cross_entropy's custom op: loss and gradients in one forward pass, and what the backward makes of them."""

from __future__ import annotations

from itertools import compress

import torch
from torch import Tensor

from vig_kernels import backend_table, check, dispatch
from vig_kernels.ops import registration
from vig_kernels.problem import DIFFERENTIABLE, HEAD_SCHEMA, HeadProblem, Needs, empty_output

STATS = ("nll", *check.STATS)
CAST_BYTES = 8 << 20  # what is cast at a time when a float32 gradient is scaled into its output


def gradient_dtypes(backend: str, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """What a backend forms the gradients of hidden, weight and bias in, for inputs of `dtype`."""
    kept = dtype == torch.bfloat16 and backend_table.BACKENDS[backend].bfloat16_gradients
    stored = dtype if kept else torch.float32
    return stored, stored, torch.float32


def _kept_rows(problem: HeadProblem, needs: Needs, budget: int, backend: str) -> int:
    """Rows of the logits' gradients that are kept for the backward instead of what they give."""
    if not backend_table.BACKENDS[backend].keeps_block:
        return 0
    return dispatch.module("linear_cross_entropy", backend).kept_rows(problem, needs, budget)


def _forward(*args):
    """[scale * reciprocal * loss_sum, what the gradients of loss_sum are made of, those of STATS that are wanted].

    The second are the gradients of loss_sum that are needed, of the dtypes that `gradient_dtypes` says. Where a block
    is kept, those of hidden and weight are not there: `gradients_of_block` forms them of the block and its rows'
    factors and order, which then follow.
    """
    problem, (row_weight, z_loss, needs, budget, wanted, *divisor, backend) = HeadProblem(*args[:8]), args[8:]
    check.target_range(problem)
    check.num_kept(problem)
    if problem.target.numel() == 0:
        return [x.zero_() for x in _forward_fake(*args)]
    module = dispatch.module("linear_cross_entropy", backend)
    names, values = list(compress(STATS, wanted)), {}
    row = backend_table.BACKENDS[backend]
    if names and row.fills_values:
        values = {name: empty_output(problem, name, problem.target.shape[0]) for name in names}
        for name, value in values.items():
            value.fill_(-1 if name == "argmax" else 0)
    more = ((budget, divisor) if row.keeps_block else ()) + ((values,) if values else ())
    with check.no_autocast(problem.hidden.device):
        loss, *formed = module.forward_backward(problem, row_weight, z_loss, Needs(*needs), *more)
        values = values or _swept_apart(problem, names, backend)
    formed = [x for x in formed if x is not None]
    loss = loss if row.keeps_block else divided(loss, *divisor)
    return [loss, *formed, *(values[name] for name in names)]


def divided(loss: Tensor, scale: float, reciprocal: Tensor | None) -> Tensor:
    """loss * scale * reciprocal, and 0 for a factor of 0 (a divisor of 0), even where the loss is infinite."""
    if reciprocal is not None:
        loss = (loss * reciprocal).masked_fill(reciprocal == 0, 0.0)
    if scale == 1.0:
        return loss
    quotient = loss * scale
    return quotient if scale else quotient.masked_fill(torch.ones_like(loss, dtype=torch.bool), 0.0)


def _swept_apart(problem: HeadProblem, names: list[str], backend: str) -> dict[str, Tensor]:
    if not names:
        return {}
    run = dispatch.module("linear_nll", backend).forward
    nll, values = run(problem, tuple(name for name in names if name != "nll"))
    return {"nll": nll} | values


def _forward_fake(*args):
    problem, (_, _, needs, budget, wanted, _, _, backend) = HeadProblem(*args[:8]), args[8:]
    hidden, (V, _) = problem.hidden, problem.weight.shape
    kept = _kept_rows(problem, Needs(*needs), budget, backend)
    inputs = hidden, problem.weight, problem.bias
    dtypes = zip(inputs, gradient_dtypes(backend, hidden.dtype), strict=True)
    shown = needs[0] and not kept, needs[1] and not kept, needs[2]
    formed = [hidden.new_empty(x.shape, dtype=dtype) for x, dtype in compress(dtypes, shown)]
    if kept:
        padded = dispatch.module("linear_cross_entropy", backend).padded(V)
        formed += [hidden.new_empty(kept, padded), hidden.new_empty(kept, dtype=torch.float32)]
        formed.append(problem.target.new_empty(problem.target.shape[0] + 1))
    values = [empty_output(problem, name, problem.target.shape[0]) for name in compress(STATS, wanted)]
    return [hidden.new_empty((), dtype=torch.float32), *formed, *values]


def _formed(results: list[Tensor], wanted: list[bool]) -> list[Tensor]:
    """Those results of the op that gradients are made of."""
    return results[1 : len(results) - sum(wanted)]


def _save(ctx, inputs, output):
    hidden, weight, target, bias, *options = inputs[:8]
    row_weight, *ctx.rest, ctx.scale, ctx.reciprocal, ctx.backend = inputs[8:]
    ctx.set_materialize_grads(False)
    # selective checkpointing keeps the results of ops, by a mode, and watches that nobody changes them
    ctx.is_watched = torch._C._len_torch_dispatch_stack() > 0
    ctx.options = options
    _, needs, _, wanted = ctx.rest
    formed = _formed(output, wanted)
    ctx.grads = [
        formed
    ]  # held here, not saved: a backward pops them, scales those of float32 and hands them out
    ctx.keeps_block = len(formed) > sum(needs)  # of which the gradients of hidden and weight are formed
    ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
    ctx.save_for_backward(hidden, weight, target, bias, row_weight)  # what a second backward recomputes from


def _backward(ctx, grad_loss):
    if grad_loss is None:
        return None, None, None
    sums = _taken(ctx)
    # asked for once at most: a checkpoint that does not re-enter gives what was saved a single time
    saved = ctx.saved_tensors if sums is None or ctx.keeps_block or torch.is_grad_enabled() else ()
    if sums is None:
        sums = _again(ctx, saved)
    factor, needs = grad_loss if ctx.reciprocal is None else grad_loss * ctx.reciprocal, ctx.rest[1]
    found: list[Tensor | None] = [None, None, None]
    if ctx.keeps_block:
        *sums, block, row_factor, visit = sums
        found[:2] = _of_block(ctx, (block, row_factor, visit), factor, saved)
        needs = False, False, needs[2]
    if ctx.scale != 1.0 and sums:
        factor = factor * ctx.scale
    for at, total in zip(compress(range(3), needs), sums, strict=True):
        if ctx.is_watched:
            found[at] = (total * factor).to(ctx.dtypes[at])
        else:
            found[at] = _scaled(total, factor, ctx.dtypes[at], saved)
    return tuple(found)


loss_and_gradients = registration.define(
    "linear_cross_entropy",
    f"({HEAD_SCHEMA}, Tensor? row_weight, float z_loss, bool[] needs, int budget, bool[] wanted, float scale, "
    "Tensor? reciprocal, str backend) "
    "-> Tensor[]",
    _forward,
    _forward_fake,
    registration.Derivative(DIFFERENTIABLE, lambda args: 1, _save, _backward),
)


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
    if _is_plain(grad, factor):
        if dtype != grad.dtype:
            return _scale(grad, factor, dtype, None)
        return grad if check.on_cpu(grad) and float(factor) == 1.0 else grad.mul_(factor)
    differentiated = [x for x in saved if x is not None and x.requires_grad]
    return scale_gradient(grad, factor, dtype, differentiated[0] if torch.is_grad_enabled() else None)


def _again(ctx, saved) -> list[Tensor]:
    """The sums once more, bit for bit: another backward has taken them."""
    *tensors, row_weight = saved
    z_loss, needs, budget, wanted = ctx.rest
    none = [False] * len(wanted)
    arguments = *tensors, *ctx.options, row_weight, z_loss, needs, budget, none, 1.0, None, ctx.backend
    with torch.no_grad():
        return _formed(loss_and_gradients(*arguments), none)


def _of_block(ctx, kept: tuple[Tensor, ...], factor: Tensor, saved) -> list[Tensor | None]:
    """The gradients of hidden and weight from a kept block; under create_graph part of the graph, as in `_scaled`."""
    hidden, weight, *_ = saved
    form = _block_gradients if _is_plain(kept[0], factor) else gradients_of_block
    needs_hidden = ctx.rest[1][0]
    found = form(*kept, hidden, weight, factor, ctx.scale, needs_hidden, ctx.backend)
    return found if needs_hidden else [None, *found]


def _is_plain(formed: Tensor, factor: Tensor) -> bool:
    """Whether a gradient is wanted once and for good, so that it needs no op around what forms it."""
    plain = type(formed) is Tensor and type(factor) is Tensor and not torch.is_grad_enabled()
    return plain and not check.is_batched(factor)


def _block_gradients(*args) -> list[Tensor]:
    """[of hidden, if it is needed, and of weight]: factor * scale times the gradients of loss_sum, each cast once."""
    *kept, hidden, weight, factor, scale, needs_hidden, backend = args
    run = dispatch.module("linear_cross_entropy", backend).block_gradients
    with check.no_autocast(hidden.device):
        grad_hidden, grad_weight = run(kept, hidden, weight, factor, scale, needs_hidden)
    return [grad_hidden, grad_weight] if needs_hidden else [grad_weight]


def _block_gradients_fake(*args) -> list[Tensor]:
    hidden, weight, _, _, needs_hidden, _ = args[3:]
    return [hidden.new_empty(x.shape) for x in ((hidden, weight) if needs_hidden else (weight,))]


gradients_of_block = registration.define(
    "linear_cross_entropy_of_block",
    "(Tensor block, Tensor row_factor, Tensor visit, Tensor hidden, Tensor weight, Tensor factor, float scale, "
    "bool needs_hidden, str backend) -> Tensor[]",
    _block_gradients,
    _block_gradients_fake,
)


def _scale(gradient: Tensor, factor: Tensor, dtype: torch.dtype, differentiated: Tensor | None) -> Tensor:
    """(gradient * factor) in float32, cast once; on a CPU, whose cast is an operation of its own, a few MiB at a time.

    `differentiated` is an input that the gradient depends on: with it the result is part of the graph, and a second
    differentiation raises instead of leaving this part out.
    """
    out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    if not check.on_cpu(gradient):
        return torch.mul(gradient, factor, out=out)  # one kernel, which casts as it writes
    step = max(1, CAST_BYTES // max(1, 4 * gradient[:1].numel()))
    for at in range(0, gradient.shape[0], step):
        out[at : at + step] = gradient[at : at + step] * factor
    return out


def _scale_fake(gradient, factor, dtype, differentiated):
    return torch.empty(gradient.shape, dtype=dtype, device=gradient.device)


scale_gradient = registration.define(
    "scale_gradient",
    "(Tensor gradient, Tensor factor, ScalarType dtype, Tensor? differentiated) -> Tensor",
    _scale,
    _scale_fake,
)
