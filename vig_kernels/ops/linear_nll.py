"""Per-token negative log-likelihood of an LM head, without the (N, V) logits."""

from __future__ import annotations

from itertools import compress

import torch
from torch import Tensor

from vig_kernels import check, dispatch, reference
from vig_kernels.ops import registration, sharded_heads, vocab_shards
from vig_kernels.ops.nll_autograd import STATS, derivative, fake_gradients
from vig_kernels.ops.vocab_shards import VocabShard
from vig_kernels.problem import HEAD_SCHEMA, HeadProblem, Needs, Saved, Upstream, empty_output, with_lse_lo


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
    vocab_shard: tuple | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """nll = log sum_v exp(z_v) - z_target, in nats, with z = softcap(logit_scale * (hidden weight^T + bias)).

    Args:
        hidden: (..., D) float32, bfloat16 or float16; any strides. Rows without one common stride, such as those of
            hidden[:, :-1], are copied: to shift by one, shift the target and end its rows with `ignore_index`.
        weight: (V, D), same dtype: `nn.Linear.weight` of the LM head. Rows may lie any distance apart; elements of a
            row must be neighbours, or every call copies the weight (a transposed one).
        target: (...) int64 or int32. Rows with `ignore_index` return 0.0 and get no gradient.
        bias: (V,) or None.
        logit_scale: logits are multiplied by it (Cohere, Granite; a temperature is its inverse).
        logit_softcap: cap * tanh(logits / cap), applied after the scale (Gemma 2).
        stats: any of "lse" (log sum exp), "entropy" (nats) and "argmax" (int64, the first maximum): further
            results of the same sweep; 0.0, 0.0 and -1 on ignored rows.
        vocab_shard: (first_row, process group) where weight (and bias) are this rank's rows of a larger head, from
            row first_row on; group None is the default one. Ranks hold consecutive rows, in order, and pass the same
            hidden and target; target counts over the whole head. A DTensor weight with Shard(0) beside a Replicate
            hidden says so itself. All ranks get the same values, bit for bit, and the whole hidden gradient; the
            weight's gradient is that of the rank's rows. Every rank must make the call, and the backward.
        backend: "auto", the best that can run here, or the name of one; see `vig_kernels.backends()`.

    Returns:
        (...) float32; with `stats` a pair (nll, {name: (...) tensor}).

    nll, lse and entropy are differentiable in hidden, weight and bias for any upstream gradient; the backward
    forms the logits again. Differentiating twice and torch.func.grad, vjp and jacrev raise. Values err by at most
    1e-5 + 1e-6 max_v(sum_d |h_d w_vd| |scale| + |bias_v|) against float64, also for 16-bit inputs. Under autocast
    inputs are cast as F.linear casts them.

    Raises:
        ValueError, TypeError: with the offending value (target indices count the flattened rows).
        BackendUnavailable: a named backend that cannot run here.
    """
    stats = check.stats(stats, check.STATS)
    given = vocab_shards.local_arguments({"hidden": hidden}, weight, target, bias, vocab_shard)
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
    name = dispatch.resolve("linear_nll", backend, problem.weight.device)
    values = nll_values(problem, stats, name, given.shard)
    shape = hidden.shape[:-1]
    nll = check.in_shape(values["nll"], shape)
    return (nll, {stat: check.in_shape(values[stat], shape) for stat in stats}) if stats else nll


def nll_values(
    problem: HeadProblem, stats: tuple[str, ...], backend: str, shard: VocabShard | None = None
) -> dict[str, Tensor]:
    """{"nll": (N,), stat: (N,)} of a problem, attached to the graph; "nll" is there whether asked for or not."""
    if shard is not None:
        return sharded_heads.nll_values(problem, stats, backend, shard)
    hidden, weight, target, bias = problem[:4]
    if backend == "reference":
        check.target_range(problem)
        options = problem.reference_options()
        names = tuple(name for name in ("lse", *stats) if name != "nll")
        nll, values = reference.linear_nll(hidden, weight, target, **options, stats=names)
        return {"nll": nll.float()} | {k: v if k == "argmax" else v.float() for k, v in values.items()}
    check.transforms(hidden, weight, bias)
    grad = torch.is_grad_enabled() and any(map(check.wants_grad, (hidden, weight, bias)))
    wanted = [grad or "lse" in stats, "entropy" in stats, "argmax" in stats, grad]
    call = nll_forward_op if grad else nll_forward_op.without_grad
    nll, *values = call(*problem, wanted, backend)
    return {"nll": nll} | dict(zip(compress(STATS, wanted), values, strict=True))


def _backward(*args):
    """Gradients of hidden, weight and bias, empty where not needed."""
    problem, (lse, lse_lo, entropy, needs, backend) = HeadProblem(*args[:8]), args[11:]
    upstream = Upstream(*(None if grad is None else grad.contiguous() for grad in args[8:11]))
    upstream, saved = with_lse_lo(upstream, Saved(lse, entropy), lse_lo)
    run = dispatch.module("linear_nll", backend).backward
    with check.no_autocast(problem.hidden.device):
        found = run(upstream, saved, problem, Needs(*needs))
    return tuple(problem.hidden.new_empty(0) if grad is None else grad for grad in found)


nll_backward_op = registration.define(
    "linear_nll_backward",
    f"({HEAD_SCHEMA}, Tensor? grad_nll, Tensor? grad_lse, Tensor? grad_entropy, Tensor lse, Tensor lse_lo, "
    "Tensor? entropy, bool[] needs, str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    fake_gradients,
)


def _forward(*args):
    """[nll, those of STATS that are wanted].

    lse + lse_lo is the log-sum-exp beyond float32's precision: at lse = 200 float32 rounds by 8e-6, and every
    p = exp(z - lse) of the row by as much.
    """
    problem, (wanted, backend) = HeadProblem(*args[:8]), args[8:]
    check.target_range(problem)
    check.num_kept(problem)
    if problem.target.numel() == 0:
        return _forward_fake(*args)
    stats = tuple(compress(STATS, wanted))
    run = dispatch.module("linear_nll", backend).forward
    with check.no_autocast(problem.hidden.device):
        nll, values = run(problem, stats)
    return [nll, *(values[stat] for stat in stats)]


def _forward_fake(*args):
    problem, rows = HeadProblem(*args[:8]), args[2].shape[0]
    return [empty_output(problem, name, rows) for name in ("nll", *compress(STATS, args[8]))]


nll_forward_op = registration.define(
    "linear_nll",
    f"({HEAD_SCHEMA}, bool[] wanted, str backend) -> Tensor[]",
    _forward,
    _forward_fake,
    derivative(nll_backward_op, lambda args: args[8]),
)
