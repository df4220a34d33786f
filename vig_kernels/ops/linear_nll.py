"""Per-token negative log-likelihood of an LM head, without the (N, V) logits."""

from __future__ import annotations

import torch
from torch import Tensor

from vig_kernels import check, dispatch, reference

OUTPUTS = (*check.STATS, "lse_lo")  # what a backend's forward may be asked for beside nll


def linear_nll(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (...)
    *,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    stats: tuple[str, ...] = (),
    backend: str = "auto",
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """nll = log sum_v exp(z_v) - z_target, in nats, with z = softcap(logit_scale * (hidden weight^T + bias)).

    Args:
        hidden: (..., D) float32, bfloat16 or float16; any strides. Rows that do not lie at one distance, such as those
            of hidden[:, :-1], are copied: to shift by one, shift the target and end its rows with `ignore_index`.
        weight: (V, D), same dtype: `nn.Linear.weight` of the LM head. Rows may lie any distance apart; elements of a
            row must be neighbours, or every call copies the weight (a transposed one).
        target: (...) int64 or int32. Rows with `ignore_index` return 0.0 and get no gradient.
        bias: (V,) or None.
        logit_scale: logits are multiplied by it (Cohere, Granite; a temperature is its inverse).
        logit_softcap: cap * tanh(logits / cap), applied after the scale (Gemma 2).
        stats: any of "lse" (log sum exp), "entropy" (nats) and "argmax" (int64, the first maximum): further
            results of the same sweep; 0.0, 0.0 and -1 on ignored rows.
        backend: "auto", "triton", "cpu", "torch" or "reference"; see `vig_kernels.backends()`.

    Returns:
        (...) float32; with `stats` a pair (nll, {name: (...) tensor}).

    nll, lse and entropy are differentiable in hidden, weight and bias for any upstream gradient; the backward
    forms the logits again. Values err by at most 1e-5 + 1e-6 max_v(sum_d |h_d w_vd| |scale| + |bias_v|) against
    float64, also for 16-bit inputs. Under autocast inputs are cast as F.linear casts them.

    Raises:
        ValueError, TypeError: with the offending value (target indices count the flattened rows).
        BackendUnavailable: a named backend that cannot run here.
    """
    stats = _stats(stats)
    scale = check.number("logit_scale", logit_scale)
    softcap, ignore_index = check.softcap(logit_softcap), check.integer("ignore_index", ignore_index)
    flat = check.linear({"hidden": hidden}, weight, target, bias)
    name = dispatch.resolve("linear_nll", backend, flat.weight.device)
    values = nll_values(flat, scale, softcap, ignore_index, stats, name)
    shape = hidden.shape[:-1]
    nll = values["nll"].reshape(shape)
    return (nll, {stat: values[stat].reshape(shape) for stat in stats}) if stats else nll


def _stats(stats) -> tuple[str, ...]:
    if isinstance(stats, str):
        raise TypeError(f"expected stats to be a tuple such as ({stats!r},), got the string {stats!r}")
    if not isinstance(stats, (tuple, list)):
        raise TypeError(
            f"expected stats to be a tuple such as ('lse',), got {type(stats).__name__} {stats!r:.80}"
        )
    for stat in stats:
        check.flag("stats", stat, check.STATS)
    return tuple(stats)


def nll_values(
    flat: check.Flat, scale, softcap, ignore_index, stats, backend, num_kept=None
) -> dict[str, Tensor]:
    """{"nll": (N,), stat: (N,)} of checked, flat arguments, attached to the graph.

    num_kept: how many rows are not ignored, if known: the backward's products on a GPU are then of those alone.
    """
    (hidden,), weight, target, bias = flat
    if backend == "reference":
        check.target_range(target, weight.shape[0], ignore_index)
        options = {"bias": bias, "logit_scale": scale, "logit_softcap": softcap, "ignore_index": ignore_index}
        nll, values = reference.linear_nll(hidden, weight, target, **options, stats=("lse", *stats))
        return {"nll": nll.float()} | {k: v if k == "argmax" else v.float() for k, v in values.items()}
    check.forward_mode(hidden, weight, bias)
    grad = torch.is_grad_enabled() and any(map(check.wants_grad, (hidden, weight, bias)))
    nll, lse, entropy, argmax, _ = nll_forward_op(
        hidden,
        weight,
        target,
        bias,
        scale,
        softcap,
        ignore_index,
        grad or "lse" in stats,
        "entropy" in stats,
        "argmax" in stats,
        backend,
        num_kept,
    )
    return {"nll": nll, "lse": lse, "entropy": entropy, "argmax": argmax}


def check_num_kept(num_kept: int | None, target: Tensor, ignore_index: int) -> None:
    """ValueError for a wrong number of kept rows, where looking costs no wait for a GPU."""
    if num_kept is None or target.device.type != "cpu":
        return
    found = int((target != ignore_index).sum())
    if num_kept != found:
        raise ValueError(f"num_kept={num_kept}, but target has {found} rows that are not ignored")


@torch.library.custom_op(
    "vig_kernels::linear_nll",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, float scale, float? softcap, "
    "int ignore_index, bool with_lse, bool with_entropy, bool with_argmax, str backend, SymInt? num_kept=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def nll_forward_op(
    hidden, weight, target, bias, scale, softcap, ignore_index, with_lse, with_entropy, with_argmax, backend,
    num_kept=None,
):  # fmt: skip
    """(nll, lse, entropy, argmax, lse_lo); the ones not asked for have no elements: ops cannot return None.

    lse + lse_lo is the log-sum-exp beyond float32's precision: at lse = 200 float32 rounds by 8e-6, and every
    p = exp(z - lse) of the row by as much.
    """
    check.target_range(target, weight.shape[0], ignore_index)
    check_num_kept(num_kept, target, ignore_index)
    outputs = _forward_fake(
        hidden,
        weight,
        target,
        bias,
        scale,
        softcap,
        ignore_index,
        with_lse,
        with_entropy,
        with_argmax,
        backend,
    )
    if target.numel() == 0:
        return outputs
    asked = zip(OUTPUTS, (with_lse, with_entropy, with_argmax, with_lse), strict=True)
    stats = tuple(stat for stat, wanted in asked if wanted)
    run = dispatch.module("linear_nll", backend).forward
    with torch.autocast(hidden.device.type, enabled=False):
        nll, values = run(hidden, weight, target, bias, scale, softcap, ignore_index, stats)
    return nll, *(values.get(stat, empty) for stat, empty in zip(OUTPUTS, outputs[1:], strict=True))


@nll_forward_op.register_fake
def _forward_fake(
    hidden, weight, target, bias, scale, softcap, ignore_index, with_lse, with_entropy, with_argmax, backend,
    num_kept=None,
):  # fmt: skip
    size = target.shape[0]
    nll = target.new_empty(size, dtype=torch.float32)
    lse = target.new_empty(size if with_lse else 0, dtype=torch.float32)
    entropy = target.new_empty(size if with_entropy else 0, dtype=torch.float32)
    argmax = target.new_empty(size if with_argmax else 0)
    return nll, lse, entropy, argmax, torch.empty_like(lse)


def _save(ctx, inputs, output):
    hidden, weight, target, bias, ctx.scale, ctx.softcap, ctx.ignore_index, *_, ctx.backend, ctx.num_kept = (
        inputs
    )
    _, lse, entropy, argmax, lse_lo = output
    ctx.save_for_backward(hidden, weight, target, bias, lse, entropy, lse_lo)
    ctx.mark_non_differentiable(argmax, lse_lo)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_nll, grad_lse, grad_entropy, *_):
    hidden, weight, target, bias, lse, entropy, lse_lo = ctx.saved_tensors
    needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
    grads = [
        grad if grad is not None and grad.numel() else None for grad in (grad_nll, grad_lse, grad_entropy)
    ]
    if not any(needs) or not any(grad is not None for grad in grads) or target.shape[0] == 0:
        zeros = [
            x.new_zeros(x.shape) if need else None
            for x, need in zip((hidden, weight, bias), needs, strict=True)
        ]
        grad_hidden, grad_weight, grad_bias = zeros
    else:
        found = nll_backward_op(
            *grads,
            lse,
            lse_lo,
            entropy,
            hidden,
            weight,
            target,
            bias,
            ctx.scale,
            ctx.softcap,
            ctx.ignore_index,
            needs,
            ctx.backend,
            ctx.num_kept,
        )
        grad_hidden, grad_weight, grad_bias = (
            g if need else None for g, need in zip(found, needs, strict=True)
        )
    return grad_hidden, grad_weight, None, grad_bias, *(None,) * 8


nll_forward_op.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op(
    "vig_kernels::linear_nll_backward",
    mutates_args=(),
    schema="(Tensor? grad_nll, Tensor? grad_lse, Tensor? grad_entropy, Tensor lse, Tensor lse_lo, "
    "Tensor entropy, Tensor hidden, Tensor weight, Tensor target, Tensor? bias, float scale, float? softcap, "
    "int ignore_index, bool[] needs, str backend, SymInt? num_kept=None) -> (Tensor, Tensor, Tensor)",
)
def nll_backward_op(
    grad_nll,
    grad_lse,
    grad_entropy,
    lse,
    lse_lo,
    entropy,
    hidden,
    weight,
    target,
    bias,
    scale,
    softcap,
    ignore_index,
    needs,
    backend,
    num_kept=None,
):
    """Gradients of hidden, weight and bias, empty where not needed. It has no gradient of its own: a second
    differentiation raises instead of being wrong."""
    grads = [None if g is None else g.contiguous() for g in (grad_nll, grad_lse, grad_entropy)]
    grads, entropy = with_lse_lo(grads, entropy, lse_lo)
    run = dispatch.module("linear_nll", backend).backward
    with torch.autocast(hidden.device.type, enabled=False):
        found = run(
            *grads,
            lse,
            entropy,
            hidden,
            weight,
            target,
            bias,
            scale,
            softcap,
            ignore_index,
            tuple(needs),
            num_kept,
        )
    return tuple(hidden.new_empty(0) if g is None else g for g in found)


def with_lse_lo(grads, entropy, lse_lo):
    """(gradients, entropy) for a backward that knows lse alone: p = exp(z - lse) exp(-lse_lo).

    d loss / d z_v = p_v (g_nll + g_lse - g_entropy (z_v - lse - lse_lo + entropy)) - [v = target] g_nll, so that
    the factor exp(-lse_lo) goes into g_lse and g_entropy, and lse_lo itself into the entropy.
    """
    grad_nll, grad_lse, grad_entropy = grads
    shrink = torch.expm1(-lse_lo)  # small: what it multiplies keeps its bits where lse_lo is 0
    softmax = [grad for grad in (grad_nll, grad_lse) if grad is not None]
    if softmax:
        change = sum(softmax) * shrink
        grad_lse = change if grad_lse is None else grad_lse + change
    if grad_entropy is None:
        return (grad_nll, grad_lse, None), None
    return (grad_nll, grad_lse, grad_entropy + grad_entropy * shrink), entropy - lse_lo


@nll_backward_op.register_fake
def _backward_fake(
    grad_nll,
    grad_lse,
    grad_entropy,
    lse,
    lse_lo,
    entropy,
    hidden,
    weight,
    target,
    bias,
    scale,
    softcap,
    ignore_index,
    needs,
    backend,
    num_kept=None,
):
    likes = (hidden, weight, bias)
    return tuple(
        x.new_empty(x.shape) if need else hidden.new_empty(0) for x, need in zip(likes, needs, strict=True)
    )
