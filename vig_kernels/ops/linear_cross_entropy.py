"""Masked, weighted cross-entropy of an LM head, without the (N, V) logits."""

from __future__ import annotations

import torch
from torch import Tensor

from vig_kernels import check, dispatch
from vig_kernels.ops import vocab_shards
from vig_kernels.ops.linear_nll import nll_values
from vig_kernels.problem import HEAD_SCHEMA, HeadProblem, Needs, empty_output

# The largest float32 copy of a 16-bit hidden gradient that the fast path may hold; on a CPU logits stand beside it.
HIDDEN_BUFFER_BYTES, CPU_HIDDEN_BUFFER_BYTES = 240 << 20, 96 << 20
STATS = ("nll", *check.STATS)
NO_STATS_IN_TRAINING = ("triton",)  # backends whose training sweep has none; that of linear_nll does
CAST_BYTES = 8 << 20  # what is cast at a time when a float32 gradient is scaled into its output


def linear_cross_entropy(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (...)
    *,
    token_weight: Tensor | None = None,  # (...)
    reduction: str = "mean",
    num_items: int | float | Tensor | None = None,
    z_loss: float = 0.0,
    num_kept: int | None = None,
    memory: str = "fast",
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    stats: tuple[str, ...] = (),
    vocab_shard: tuple | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """loss = sum_n w_n (nll_n + z_loss lse_n^2) / divisor, over the rows whose target is not `ignore_index`.

    Args:
        hidden, weight, target, bias, logit_scale, logit_softcap, ignore_index, backend: as in `linear_nll`.
        token_weight: (...) w_n, 1 where None. Rows of weight 0 count as ignored: they cost nothing, whatever they
            hold. Where it requires grad, the recomputing path is taken, and all rows count.
        reduction: "mean", "sum" (divisor 1 unless num_items is given) or "none" ((...) float32, no divisor).
        num_items: the divisor of "mean" and "sum", e.g. the tokens of a whole accumulated batch: int, float or
            0-d tensor on any device, never read back from a GPU (nor checked there). Without it "mean" divides by the
            number of valid rows, or by the sum of their weights. A zero divisor gives loss 0.0 and zero gradients.
        z_loss: weight of lse^2, which keeps the logits' normaliser near 1.
        num_kept: number of rows that are not ignored, if the caller knows it: a GPU then leaves the others out of its
            products without stalling to count them.
        memory: "fast" or "low".
        stats: any of "nll", "lse", "entropy" (nats) and "argmax" (int64): what is known of each row, detached. 0.0, and
            -1 for argmax, on rows that are ignored or of weight 0.
        vocab_shard: (first_row, process group) of a head whose rows are spread over processes, as in `linear_nll`. The
            log-sum-exp is known only when all ranks have swept: gradients are recomputed whatever `memory` says.

    Returns:
        0-d float32, or (...) float32 for reduction="none" (0.0 on ignored rows); with `stats` a pair
        (loss, {name: (...) tensor}). Loss and gradients have the same bits with and without. Statistics come from the
        loss's own sweep; only the triton backend's "fast" losses form the logits once more for them.

    "fast" scalar losses form their gradients in the forward pass (three matrix products). They stay float32 until
    backward, where the upstream factor (on a GPU and for float16 the divisor too) is applied and the result is cast
    once. For float32 inputs these sums are themselves scaled in place and handed out as the gradients. For 16-bit
    inputs they are buffers, freed by the backward: 4 V D bytes for the weight, and at most 240 MiB (on a CPU 96) for
    hidden (beyond that, and with memory="low" or reduction="none", gradients are recomputed in the backward: four
    products, no buffer). The compiled CPU kernels round the gradients of bfloat16 inputs as they form them, for the
    weight where the logits of all kept rows fit 160 MiB (else through the same 4 V D bytes): an upstream factor that
    is not a power of two then rounds a second time.
    A second backward (`retain_graph=True`), or one in another thread at the same time, forms them again, and so does
    one after a backward under `create_graph`. Gradients for many upstream factors at once (`is_grads_batched=True`,
    torch.func.vmap of torch.autograd.grad) work; differentiating twice and torch.func.grad, vjp and jacrev raise. What
    does not require grad costs no product.

    Raises:
        ValueError, TypeError, BackendUnavailable: as `linear_nll`.
    """
    check.flag("reduction", reduction, ("mean", "sum", "none"))
    check.flag("memory", memory, ("fast", "low"))
    stats = check.stats(stats, STATS)
    z_loss = check.number("z_loss", z_loss)
    given = vocab_shards.local_arguments({"hidden": hidden}, weight, target, bias, vocab_shard, token_weight)
    (problem,) = check.linear(
        given.hiddens,
        given.weight,
        given.target,
        bias=given.bias,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        ignore_index=ignore_index,
        least_rows=given.least_rows,
    )
    row_weight = _row_weight(given.token_weight, given.target)
    num_items = _num_items(num_items)
    num_kept = None if num_kept is None else check.integer("num_kept", num_kept)
    rows = problem.target.shape[0]
    if num_kept is not None and not 0 <= num_kept <= rows:
        raise ValueError(f"num_kept={num_kept} is not in [0, {rows}], the number of rows")
    problem = problem._replace(num_kept=num_kept)

    name = dispatch.resolve("linear_cross_entropy", backend, problem.weight.device)
    fast = (
        given.shard is None and memory == "fast" and reduction != "none" and _fast(problem, row_weight, name)
    )
    if not fast:
        name = dispatch.resolve("linear_nll", backend, problem.weight.device)
    if row_weight is not None and not check.wants_grad(row_weight):
        problem = problem._replace(
            target=problem.target.masked_fill(row_weight == 0, problem.ignore_index),
            num_kept=None
            if problem.target.device.type == "cpu"
            else num_kept,  # elsewhere it may be too high
        )
    valid = problem.target != problem.ignore_index
    if num_items is None and reduction == "mean":
        num_items = valid.sum() if row_weight is None else torch.where(valid, row_weight, 0.0).sum()
    if fast and name != "reference":
        if num_items is not None and _takes_divisor(problem.weight):  # gradients then come out ready
            if row_weight is None:
                row_weight = problem.weight.new_ones(problem.target.shape, dtype=torch.float32)
            row_weight, num_items = row_weight * _reciprocal(num_items, row_weight.device), None
        check.transforms(problem.hidden, problem.weight, problem.bias)
        wanted = [stat in stats for stat in STATS]
        loss, *found = _forward_op(*problem, row_weight, z_loss, list(_needs(problem)), wanted, name)
        values = dict(zip(STATS, found[-len(STATS) :], strict=True))
    else:
        values = nll_values(problem, ("lse", *stats) if z_loss else stats, name, given.shard)
        losses = values["nll"] + z_loss * values["lse"].square() if z_loss else values["nll"]
        if row_weight is not None:
            losses = losses * torch.where(valid, row_weight, 0.0)
        loss = losses.reshape(hidden.shape[:-1]) if reduction == "none" else losses.sum()
    if num_items is not None and reduction != "none":
        loss = _divided(loss, num_items)
    return (loss, {s: values[s].detach().reshape(hidden.shape[:-1]) for s in stats}) if stats else loss


def _takes_divisor(weight: Tensor) -> bool:
    """Whether the divisor may scale the rows: not where a 16-bit logit gradient could underflow."""
    return weight.device.type == "cpu" and weight.dtype != torch.float16


def _row_weight(token_weight, target) -> Tensor | None:
    if token_weight is None:
        return None
    check.tensor("token_weight", token_weight, (*check.FLOATS, torch.float64))
    if token_weight.shape != target.shape:
        raise ValueError(
            f"expected token_weight {tuple(target.shape)} as target, got {tuple(token_weight.shape)}"
        )
    if token_weight.device != target.device:
        raise ValueError(f"expected token_weight on {target.device} with target, got {token_weight.device}")
    return token_weight.reshape(-1).float()


def _num_items(num_items):
    if isinstance(num_items, Tensor):
        check.require(
            num_items.ndim == 0, ValueError, f"expected num_items 0-d, got {tuple(num_items.shape)}"
        )
        check.require(
            not num_items.is_complex(), TypeError, f"expected a real num_items, got {num_items.dtype}"
        )
        num_items = num_items.detach()
        # elsewhere looking would stall; a compiled graph and torch.vmap cannot branch on values
        if num_items.device.type == "cpu" and type(num_items) is Tensor and not check.is_batched(num_items):
            _positive(float(num_items))
        return num_items
    return None if num_items is None else _positive(num_items)


def _positive(num_items: int | float) -> float:
    if check.number("num_items", num_items) < 0:
        raise ValueError(f"num_items={num_items!r} is negative")
    return float(num_items)


def _divided(loss: Tensor, divisor: float | Tensor) -> Tensor:
    """loss / divisor, and 0 for a divisor of 0, even where the loss is infinite."""
    quotient = loss * _reciprocal(divisor, loss.device)
    if isinstance(divisor, Tensor):
        return quotient.masked_fill(divisor.to(loss.device, non_blocking=True) == 0, 0.0)
    return quotient if divisor else quotient.masked_fill(torch.ones_like(loss, dtype=torch.bool), 0.0)


def _reciprocal(divisor: float | Tensor, device: torch.device) -> float | Tensor:
    """1 / divisor, and 0 for 0; tensors stay on their device."""
    if not isinstance(divisor, Tensor):
        return 1.0 / divisor if divisor else 0.0
    divisor = divisor.to(device, torch.float32, non_blocking=True)
    none = divisor == 0
    return torch.where(none, 0.0, 1.0 / torch.where(none, 1.0, divisor))


def _needs(problem: HeadProblem) -> Needs:
    return Needs(*map(check.wants_grad, (problem.hidden, problem.weight, problem.bias)))


def _fast(problem: HeadProblem, row_weight: Tensor | None, backend: str) -> bool:
    """Whether to form the gradients in the forward: some are wanted, and their float32 sums are affordable."""
    if not torch.is_grad_enabled() or not any(_needs(problem)):
        return False
    if check.wants_grad(row_weight):
        return False
    hidden = problem.hidden
    if not check.wants_grad(hidden) or _grad_dtypes(backend, hidden.dtype)[0] == hidden.dtype:
        return True
    return 4 * hidden.numel() <= (
        CPU_HIDDEN_BUFFER_BYTES if hidden.device.type == "cpu" else HIDDEN_BUFFER_BYTES
    )


def _grad_dtypes(backend: str, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """What a backend forms the gradients of hidden, weight and bias in, for inputs of `dtype`."""
    stored = dtype if (backend, dtype) == ("cpu", torch.bfloat16) else torch.float32
    return stored, stored, torch.float32


@torch.library.custom_op(
    "vig_kernels::linear_cross_entropy",
    mutates_args=(),
    schema=f"({HEAD_SCHEMA}, Tensor? row_weight, float z_loss, bool[] needs, bool[] wanted, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward_op(*args):
    """(loss_sum, gradients of loss_sum as `_grad_dtypes` says, STATS); empty where not needed or wanted."""
    problem, (row_weight, z_loss, needs, wanted, backend) = HeadProblem(*args[:8]), args[8:]
    check.target_range(problem)
    check.num_kept(problem)
    if problem.target.numel() == 0:
        return tuple(torch.zeros_like(x) for x in _forward_fake(*args))
    run = dispatch.module("linear_cross_entropy", backend).forward_backward
    names = [stat for stat, asked in zip(STATS, wanted, strict=True) if asked]
    with torch.autocast(problem.hidden.device.type, enabled=False):
        if names and backend not in NO_STATS_IN_TRAINING:
            values = {name: empty_output(problem, name, problem.target.shape[0]) for name in names}
            for name, value in values.items():
                value.fill_(-1 if name == "argmax" else 0)
            loss, *grads = run(problem, row_weight, z_loss, Needs(*needs), values)
        else:
            loss, *grads = run(problem, row_weight, z_loss, Needs(*needs))
            values = _swept_apart(problem, names, backend)
    values = [values[name] if name in values else empty_output(problem, name, 0) for name in STATS]
    return loss, *(loss.new_empty(0) if grad is None else grad for grad in grads), *values


def _swept_apart(problem: HeadProblem, names: list[str], backend: str) -> dict[str, Tensor]:
    if not names:
        return {}
    run = dispatch.module("linear_nll", backend).forward
    nll, values = run(problem, tuple(name for name in names if name != "nll"))
    return {"nll": nll} | values


@_forward_op.register_fake
def _forward_fake(*args):
    problem, (_, _, needs, wanted, backend) = HeadProblem(*args[:8]), args[8:]
    hidden = problem.hidden
    grads = [
        hidden.new_empty(x.shape if need else 0, dtype=dtype if need else torch.float32)
        for x, need, dtype in zip(
            (hidden, problem.weight, problem.bias), needs, _grad_dtypes(backend, hidden.dtype), strict=True
        )
    ]
    asked = zip(STATS, wanted, strict=True)
    values = [empty_output(problem, name, problem.target.shape[0] if asks else 0) for name, asks in asked]
    return hidden.new_empty((), dtype=torch.float32), *grads, *values


def _save(ctx, inputs, output):
    problem, (row_weight, *ctx.rest) = HeadProblem(*inputs[:8]), inputs[8:]
    needs = Needs(*ctx.rest[1])
    _, *grads = output[: -len(STATS)]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.options = problem[4:]
    # held here, not saved: a backward pops the sums, scales those of float32 in place and hands them out
    ctx.grads = [grads]
    ctx.dtypes = [
        x.dtype if need else None
        for x, need in zip((problem.hidden, problem.weight, problem.bias), needs, strict=True)
    ]
    ctx.save_for_backward(*problem[:4], row_weight)  # what a second backward recomputes from


def _backward(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * 13
    sums = _taken(ctx)
    # asked for once at most: a checkpoint that does not re-enter gives what was saved a single time
    saved = ctx.saved_tensors if sums is None or torch.is_grad_enabled() else ()
    if sums is None:
        sums = _again(ctx, saved)
    grad_hidden, grad_weight, grad_bias = (
        None if dtype is None else _scaled(grad, grad_loss, dtype, saved)
        for grad, dtype in zip(sums, ctx.dtypes, strict=True)
    )
    return grad_hidden, grad_weight, None, grad_bias, *(None,) * 9


_forward_op.register_autograd(_backward, setup_context=_save)


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
    return _scale_op(grad, factor, dtype, differentiated[0] if torch.is_grad_enabled() else None)


def _again(ctx, saved) -> list[Tensor]:
    """The sums once more, bit for bit: another backward has taken them."""
    *tensors, row_weight = saved
    z_loss, needs, wanted, backend = ctx.rest
    without = z_loss, needs, [False] * len(wanted), backend
    with torch.no_grad():
        return _forward_op(*tensors, *ctx.options, row_weight, *without)[1 : -len(STATS)]


@torch.library.custom_op(
    "vig_kernels::scale_gradient",
    mutates_args=(),
    schema="(Tensor gradient, Tensor factor, ScalarType dtype, Tensor? differentiated) -> Tensor",
)
def _scale_op(gradient, factor, dtype, differentiated):
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


@_scale_op.register_fake
def _scale_fake(gradient, factor, dtype, differentiated):
    return torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
