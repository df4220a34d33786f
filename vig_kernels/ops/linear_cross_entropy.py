"""Masked, weighted cross-entropy of an LM head, without the (N, V) logits."""

from __future__ import annotations

from itertools import compress

import torch
from torch import Tensor

from vig_kernels import check, dispatch
from vig_kernels.ops import vocab_shards
from vig_kernels.ops.linear_nll import nll_values
from vig_kernels.ops.loss_gradients import STATS, divided, gradient_dtypes, loss_and_gradients
from vig_kernels.problem import HeadProblem, Needs

MIB = 1 << 20
LEAST_MIB = 256  # what memory="low" takes at most, and a number must allow; "fast" on a CPU too
GPU_MIB = 2816  # what memory="fast" takes on a GPU
# of a float32 copy of a 16-bit hidden gradient that the fast path may hold on a CPU, where logits stand beside it
CPU_HIDDEN_BUFFER_BYTES = 96 << 20


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
    memory: str | int = "fast",
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
        memory: "fast", "low", or the MiB, at least 256, that "fast" may take on a GPU instead of its fixed 2816.
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
    inputs they are buffers, freed by the backward: 4 V D bytes for the weight, and for hidden 4 N D bytes, at most half
    of the budget (on a CPU 96 MiB). Beyond that, and with memory="low" or reduction="none", gradients are recomputed
    in the backward: four products, no buffer. On a GPU, where the gradients of the logits of all kept rows fit the
    budget, those of bfloat16 inputs are kept instead (8192 rows of 151936 words do), and the backward forms
    both gradients from them: no buffer of 4 V D bytes, and one cast. The compiled CPU kernels round the gradients of
    bfloat16 inputs as they form them, for the weight where the logits of all kept rows fit 160 MiB (else through the
    same 4 V D bytes): an upstream factor that is not a power of two then rounds a second time.
    A second backward (`retain_graph=True`), or one in another thread at the same time, forms them again, and so does
    one after a backward under `create_graph`. Gradients for many upstream factors at once (`is_grads_batched=True`,
    torch.func.vmap of torch.autograd.grad) work; differentiating twice and torch.func.grad, vjp and jacrev raise. What
    does not require grad costs no product.

    Raises:
        ValueError, TypeError, BackendUnavailable: as `linear_nll`.
    """
    check.flag("reduction", reduction, ("mean", "sum", "none"))
    _check_memory(memory)
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
    if num_kept is not None:
        problem = HeadProblem(*problem[:-1], num_kept)

    name = dispatch.resolve("linear_cross_entropy", backend, problem.weight.device)
    budget = _budget(memory, problem.weight.device)
    needs = _needs(problem)
    fast = given.shard is None and memory != "low" and reduction != "none"
    fast = fast and _fast(problem, needs, row_weight, name, budget)
    if not fast:
        name = dispatch.resolve("linear_nll", backend, problem.weight.device)
    if row_weight is not None and not check.wants_grad(row_weight):
        problem = problem._replace(
            target=problem.target.masked_fill(row_weight == 0, problem.ignore_index),
            num_kept=None if check.on_cpu(problem.target) else num_kept,  # elsewhere it may be too high
        )
    if num_items is None and reduction == "mean":
        valid = problem.target != problem.ignore_index if row_weight is None else _valid(problem, row_weight)
        num_items = valid.sum()
    if fast and name != "reference":
        divisor = _factors(num_items, problem.weight.device)
        if num_items is not None and _takes_divisor(problem.weight):  # gradients then come out ready
            if row_weight is None:
                row_weight = problem.weight.new_ones(problem.target.shape, dtype=torch.float32)
            scale, reciprocal = divisor
            row_weight, divisor = row_weight * (scale if reciprocal is None else reciprocal), (1.0, None)
        check.transforms(problem.hidden, problem.weight, problem.bias)
        check.forward_mode(row_weight)
        wanted = [stat in stats for stat in STATS]
        found = loss_and_gradients(*problem, row_weight, z_loss, list(needs), budget, wanted, *divisor, name)
        loss, first = found[0], len(found) - sum(wanted)
        values = dict(zip(compress(STATS, wanted), found[first:], strict=True))
    else:
        values = nll_values(problem, ("lse", *stats) if z_loss else stats, name, given.shard)
        losses = values["nll"] + z_loss * values["lse"].square() if z_loss else values["nll"]
        if row_weight is not None:
            losses = losses * _valid(problem, row_weight)
        if reduction == "none":
            loss = losses.reshape(hidden.shape[:-1])
        else:
            loss = divided(losses.sum(), *_factors(num_items, losses.device))
    return (loss, {s: values[s].detach().reshape(hidden.shape[:-1]) for s in stats}) if stats else loss


def _check_memory(memory: str | int) -> None:
    if isinstance(memory, str):
        check.flag("memory", memory, ("fast", "low"))
    elif check.integer("memory", memory) < LEAST_MIB:
        raise ValueError(f"memory={memory} MiB is less than {LEAST_MIB}, which every path may need")


def _budget(memory: str | int, device: torch.device) -> int:
    """Bytes that forming gradients may take on a device, the float32 sums of a weight's gradient apart."""
    return memory * MIB if not isinstance(memory, str) else _fast_budget(device)


@torch.compiler.assume_constant_result
def _fast_budget(device: torch.device) -> int:
    """Fixed, never a share of what is free: chunks, and with them bits, must not depend on the neighbours."""
    return MIB * (LEAST_MIB if device.type == "cpu" else GPU_MIB)


def _takes_divisor(weight: Tensor) -> bool:
    """Whether the divisor may scale the rows: not where a 16-bit logit gradient could underflow."""
    return check.on_cpu(weight) and weight.dtype != torch.float16


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
        if check.on_cpu(num_items) and type(num_items) is Tensor and not check.is_batched(num_items):
            _positive(float(num_items))
        return num_items
    return None if num_items is None else _positive(num_items)


def _positive(num_items: int | float) -> float:
    if check.number("num_items", num_items) < 0:
        raise ValueError(f"num_items={num_items!r} is negative")
    return float(num_items)


def _factors(num_items: float | Tensor | None, device: torch.device) -> tuple[float, Tensor | None]:
    """(scale, reciprocal) that divide by num_items: a number's reciprocal, or a tensor's, which stays on its device.

    The reciprocal of 0 is 0.
    """
    if num_items is None:
        return 1.0, None
    if not isinstance(num_items, Tensor):
        return (1.0 / num_items if num_items else 0.0), None
    num_items = num_items.to(device, torch.float32, non_blocking=True)
    none = num_items == 0
    return 1.0, torch.where(none, 0.0, 1.0 / torch.where(none, 1.0, num_items))


def _valid(problem: HeadProblem, row_weight: Tensor) -> Tensor:
    """The weights of the rows, 0 where they are ignored."""
    return torch.where(problem.target != problem.ignore_index, row_weight, 0.0)


def _needs(problem: HeadProblem) -> Needs:
    return Needs(*map(check.wants_grad, (problem.hidden, problem.weight, problem.bias)))


def _fast(problem: HeadProblem, needs: Needs, row_weight: Tensor | None, backend: str, budget: int) -> bool:
    """Whether to form the gradients in the forward: some are wanted, and their float32 sums are affordable."""
    if not torch.is_grad_enabled() or not any(needs):
        return False
    if check.wants_grad(row_weight):
        return False
    hidden = problem.hidden
    if not needs.hidden or gradient_dtypes(backend, hidden.dtype)[0] == hidden.dtype:
        return True
    return 4 * hidden.numel() <= (CPU_HIDDEN_BUFFER_BYTES if check.on_cpu(hidden) else budget // 2)
