"""linear_nll by Triton: the sweep that folds logits away, and the recomputing backward.

The backward is right for any upstream gradient, four GEMMs with the forward's: `fill_block` forms d loss / d y in a
block that fits the memory promise; the vendor's GEMM takes the block to the gradients of hidden and weight, summed
in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vig_kernels.problem import HeadProblem, Needs, Saved, Upstream

from .launch import aligned, as_read, dense, device_guard, silence
from .logit_fold import Partials, combine, fold
from .logit_gradients import Block, accumulate, fill_block, loss_scale_of, padded
from .row_order import RowChunk, compaction_order
from .target_residual import TargetResidual
from .tile_configs import head_config

# of the promised 256 MiB; float32 gradients are summed in place, and leave all of it to the block
EXTRA_BYTES = 240 * 2**20
HIDDEN_BYTES = 160 * 2**20  # float32 sums of a 16-bit hidden gradient, at most
# float32 sums of a vocabulary chunk's weight gradient, more where little else is held; what is then left for the block
WEIGHT_BYTES, BLOCK_BYTES = 48 * 2**20, 64 * 2**20
GATHERED_BYTES = (
    80 * 2**20
)  # kept rows of hidden and their gradient, at most; the float32 sums are as much again


def sweep(
    problem: HeadProblem, stats: tuple[str, ...], hidden_null: Tensor | None = None
) -> list[dict[str, Tensor]]:
    """{"nll": (N,), stat: (N,)} of every pass, from one sweep of the weight: the body of linear_nll and linear_vig.

    With hidden_null (N, D) there is a second pass, which has "vig" too, its nll less the first's. Every row of every
    pass goes through the same kernel with the same tiles, so its bits are the same alone, paired, and in any company.
    """
    problem = as_read(problem)
    target, passes = problem.target, 1 if hidden_null is None else 2
    hidden_null = None if hidden_null is None else aligned(hidden_null)
    V, N = problem.weight.shape[0], target.shape[0]

    def outputs(*names):
        kinds = {"argmax": torch.int64}
        return {name: target.new_empty(N, dtype=kinds.get(name, torch.float32)) for name in names}

    results = [outputs("nll", *stats)]
    if passes == 2:
        results.append(outputs("nll", *stats, "vig"))
    order, count = compaction_order(target, problem.ignore_index)

    def partials_of(rows, config):
        return Partials(rows, passes, V, config, stats, target.device)

    def trial(config):
        chunk = RowChunk(order, count, 0, Partials.chunk_rows(N, passes, V, config, stats))
        fold(problem, hidden_null, chunk, partials_of(chunk.rows, config), config)

    with device_guard(target.device):
        config = head_config("fold", problem.weight, problem.logit_softcap is not None, trial)
        most = Partials.chunk_rows(N, passes, V, config, stats)
        partials = None
        for first in range(0, N, most):
            chunk = RowChunk(order, count, first, min(most, N - first))
            if partials is None or chunk.rows != most:
                partials = None  # freed before its successor is made
                partials = partials_of(chunk.rows, config)
            fold(problem, hidden_null, chunk, partials, config)
            for index, values in enumerate(results):
                combine(problem, chunk, partials, values, index, results[0]["nll"])
    return results


def forward(problem: HeadProblem, stats: tuple[str, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """nll (N,) float32 and the statistics {"lse", "entropy", "lse_lo": (N,) float32, "argmax": (N,) int64}.

    nll = (max z - z[target]) + log sum exp(z - max z). Ignored rows cost no tile and give 0, 0, 0 and -1; a target
    outside [0, V) gives NaN and is never read with. Extra memory: 48 MiB of partials and 16 bytes a row. Nothing is
    read back to the host.
    """
    (values,) = sweep(problem, stats)
    return values.pop("nll"), values


def vocab_chunk(V: int, D: int, taken: int) -> int:
    """Vocabulary entries of a chunk: their float32 weight gradient may take the bytes that are not `taken`."""
    room = max(WEIGHT_BYTES, EXTRA_BYTES - BLOCK_BYTES - taken)
    return min(V, max(128, room // (4 * D) // 128 * 128))


def row_chunk(N: int, D: int, columns: int, dtype: torch.dtype, needs, held: int, silent: bool) -> int:
    """Rows of a block of d loss / d y of so many columns: EXTRA_BYTES less the float32 sums and what is held."""
    free = EXTRA_BYTES - 64 * N - held
    if dtype != torch.float32:
        free -= min(4 * N * D, HIDDEN_BYTES) * needs[0] + 4 * columns * D * needs[1]
    copied = 0 if silent or not needs[1] else D
    return max(1, min(N, free // ((padded(columns) + copied) * dtype.itemsize)))


def backward(
    upstream: Upstream, saved: Saved, problem: HeadProblem, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias in the inputs' dtypes; None, and no work, for what is not needed.

    Where the float32 sums of both a long hidden gradient and the weight gradient would break the memory promise,
    each has a sweep of its own (five GEMMs instead of four). Ignored rows are multiplied as zeros, unless num_kept
    tells how many rows are not ignored and these are few enough to be gathered.
    """
    upstream, saved = Upstream(*dense(*upstream)), Saved(*dense(*saved))
    problem = as_read(problem)
    target = problem.target
    hidden, num_kept = problem.hidden, problem.num_kept
    gathered = 2 * hidden.element_size() * (num_kept or 0) * hidden.shape[1]  # hidden and its gradient
    if num_kept is not None and num_kept < target.shape[0] and gathered <= GATHERED_BYTES:
        return gathered_sweep(upstream, saved, problem, needs, gathered)
    long = hidden.dtype != torch.float32 and 4 * hidden.numel() > HIDDEN_BYTES
    if long and needs.hidden and (needs.weight or needs.bias):
        grad_hidden, _, _ = gradient_sweep(upstream, saved, problem, Needs(True, False, False))
        return grad_hidden, *gradient_sweep(upstream, saved, problem, needs._replace(hidden=False))[1:]
    return gradient_sweep(upstream, saved, problem, needs)


def gathered_sweep(upstream: Upstream, saved: Saved, problem: HeadProblem, needs: Needs, gathered: int):
    """`gradient_sweep` of the rows that are not ignored. More of them than num_kept give NaN, as in the loss."""
    order, count = compaction_order(problem.target, problem.ignore_index)
    picked = order[: problem.num_kept]
    poison = torch.where(count > problem.num_kept, torch.nan, 1.0)
    if not problem.num_kept:
        inputs = (problem.hidden, problem.weight, problem.bias)
        return tuple(
            torch.zeros_like(x).mul_(poison) if need else None for x, need in zip(inputs, needs, strict=True)
        )
    upstream = Upstream(*(None if x is None else x[picked] * poison for x in upstream))
    saved = Saved(*(None if x is None else x[picked] for x in saved))
    hidden, some = problem.hidden, problem.take(picked)
    silence(some.hidden, some.target, some.ignore_index)
    grad_hidden, grad_weight, grad_bias = gradient_sweep(upstream, saved, some, needs, gathered, silent=True)
    if grad_hidden is not None:
        grad_hidden = torch.zeros_like(hidden).index_copy_(0, picked, grad_hidden)
    return grad_hidden, grad_weight, grad_bias


def entry_bound(upstream: Upstream, saved: Saved) -> Tensor:
    """(N,): no entry of d loss / d z of a row is greater."""
    bound = sum((g.abs() for g in upstream[:2] if g is not None), torch.zeros_like(saved.lse))
    return bound if upstream.entropy is None else bound + upstream.entropy.abs() * (1 + saved.entropy)


def gradient_sweep(
    upstream: Upstream,
    saved: Saved,
    problem: HeadProblem,
    needs: Needs,
    held: int = 0,  # bytes of the memory promise that are taken already
    silent: bool = False,  # ignored rows of hidden are zeros; else products take a copy in which they are
):
    """One sweep over (vocabulary chunk x row chunk) blocks; what is summed is float32 and cast once."""
    hidden, weight, target = problem[:3]
    (N, D), V, wide = hidden.shape, weight.shape[0], hidden.dtype == torch.float32
    loss_scale, unscale = loss_scale_of(lambda: entry_bound(upstream, saved), problem)
    hidden_sums = 0 if wide or not needs.hidden else min(4 * N * D, HIDDEN_BYTES)
    columns = vocab_chunk(V, D, 64 * N + held + hidden_sums)
    rows = row_chunk(N, D, columns, hidden.dtype, needs, held, silent)
    segment = N if wide or not needs.hidden else max(1, min(N, HIDDEN_BYTES // (4 * D)))
    storage = hidden.new_empty(min(rows, segment), padded(columns))
    residual = None if wide or not any(needs[:2]) else TargetResidual(target, problem.ignore_index)
    grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs.hidden else None
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs.weight else None
    grad_bias = torch.zeros(V, dtype=torch.float32, device=weight.device) if needs.bias else None

    def add_block(chunk, order, vocab, hidden_sum, weight_sum):
        values = storage[: chunk.stop - chunk.start, : vocab.stop - vocab.start]
        block = Block(values, chunk.start, vocab.start, *order, loss_scale, residual)
        bias_sums = fill_block(block, problem, upstream, saved, needs.bias)
        if needs.hidden:
            accumulate(hidden_sum, values, weight[vocab])
        if needs.weight:
            rows_of_chunk = hidden[chunk]
            if not silent:
                rows_of_chunk = silence(rows_of_chunk.clone(), target[chunk], problem.ignore_index)
            accumulate(weight_sum, values.T, rows_of_chunk)
        if needs.bias:
            grad_bias[vocab] += bias_sums

    with device_guard(hidden.device):
        for first in range(0, N, segment):
            last = min(first + segment, N)
            chunks = [slice(r, min(r + len(storage), last)) for r in range(first, last, len(storage))]
            orders = [compaction_order(target[chunk], problem.ignore_index) for chunk in chunks]
            hidden_sum = sums(grad_hidden, slice(first, last))
            for v in range(0, V, columns):
                vocab = slice(v, min(v + columns, V))
                weight_sum = sums(grad_weight, vocab)
                for chunk, order in zip(chunks, orders, strict=True):
                    part = hidden_sum[chunk.start - first : chunk.stop - first] if needs.hidden else None
                    add_block(chunk, order, vocab, part, weight_sum)
                if needs.weight:
                    if residual is not None:
                        residual.correct_weight(weight_sum, hidden, first_vocab=v)
                    settle(grad_weight[vocab], weight_sum, unscale)
                    weight_sum = None  # freed before its successor is made
            if needs.hidden:
                if residual is not None:
                    residual.correct_hidden(hidden_sum, weight, first)
                settle(grad_hidden[first:last], hidden_sum, unscale)
                hidden_sum = part = None
    if needs.bias:
        grad_bias = grad_bias.mul_(problem.logit_scale).to(problem.bias.dtype)
    return grad_hidden, grad_weight, grad_bias


def sums(gradient: Tensor | None, part: slice) -> Tensor | None:
    """Zeroed float32 sums of a part of a gradient: the part itself where it is float32."""
    if gradient is None:
        return None
    part = gradient[part]
    return part.zero_() if part.dtype == torch.float32 else torch.zeros_like(part, dtype=torch.float32)


def settle(gradient: Tensor, total: Tensor, unscale: Tensor | None) -> None:
    """Write float32 sums to their place in the gradient, cast once."""
    if unscale is not None:
        total.mul_(unscale)
    if gradient.dtype != torch.float32:  # float32 sums are the gradient itself
        gradient.copy_(total)
