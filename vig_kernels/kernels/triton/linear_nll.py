"""linear_nll by Triton: the sweep that folds logits away, and the recomputing backward.

The backward is right for any upstream gradient, four GEMMs with the forward's: `gradient_block` forms d loss / d y
in a block that fits the memory promise; the vendor's GEMM takes the block to the gradients of hidden and weight,
summed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import compaction_order, dense, device_guard, silence, why_not
from .logit_fold import Partials, combine, fold
from .logit_gradients import accumulate, gradient_block, loss_scale_of
from .target_residual import TargetResidual
from .tile_configs import head_config

__all__ = ["backward", "forward", "sweep", "why_not"]

# of the promised 256 MiB; float32 gradients are summed in place, and leave all of it to the block
EXTRA_BYTES = 240 * 2**20
HIDDEN_BYTES = 160 * 2**20  # float32 sums of a 16-bit hidden gradient, at most
# float32 sums of a vocabulary chunk's weight gradient, more where little else is held; what is then left for the block
WEIGHT_BYTES, BLOCK_BYTES = 48 * 2**20, 64 * 2**20
GATHERED_BYTES = (
    80 * 2**20
)  # kept rows of hidden and their gradient, at most; the float32 sums beside them are as much


def sweep(hiddens, weight, target, bias, logit_scale, logit_softcap, ignore_index, stats):
    """(nll, values) of every pass, from one sweep of the weight: the body of linear_nll and of linear_vig.

    The values of a second pass hold "vig", its nll less the first's, beside those of `stats`.

    hiddens: one or two (N, D) tensors that share `target` (N,). Every row of every pass goes through the same
    kernel with the same tiles, so its bits are the same alone, paired, and in any company.
    """
    V, N, passes = weight.shape[0], target.shape[0], len(hiddens)
    target, bias = dense(target, bias)

    def output(name):
        return target.new_empty(N, dtype=torch.int64 if name == "argmax" else torch.float32)

    results = [(output("nll"), {name: output(name) for name in stats}) for _ in hiddens]
    if passes == 2:
        results[1][1]["vig"] = output("vig")
    order, count = compaction_order(target, ignore_index)

    def run(first, rows, partials, config):
        fold(hiddens, weight, target, bias, order, count, first, rows, partials, None,
             logit_scale, logit_softcap, config)  # fmt: skip

    def trial(config):
        rows = Partials.chunk_rows(N, passes, V, config, stats)
        run(0, rows, Partials(rows, passes, V, config, stats, target.device), config)

    with device_guard(target.device):
        config = head_config("fold", weight, logit_softcap is not None, trial)
        chunk = Partials.chunk_rows(N, passes, V, config, stats)
        partials = None
        for first in range(0, N, chunk):
            rows = min(chunk, N - first)
            if partials is None or rows != chunk:
                partials = None  # freed before its successor is made
                partials = Partials(rows, passes, V, config, stats, target.device)
            run(first, rows, partials, config)
            for index, (nll, values) in enumerate(results):
                combine(
                    partials,
                    target,
                    order,
                    count,
                    nll,
                    values,
                    first,
                    rows,
                    index,
                    passes,
                    V,
                    results[0][0],
                )
    return results


def forward(
    hidden: Tensor,  # (N, D), last stride 1
    weight: Tensor,  # (V, D), last stride 1, same dtype
    target: Tensor,  # (N,) int64
    bias: Tensor | None,  # (V,)
    logit_scale: float,
    logit_softcap: float | None,
    ignore_index: int,
    stats: tuple[str, ...],
) -> tuple[Tensor, dict[str, Tensor]]:
    """nll (N,) float32 and the statistics {"lse", "entropy", "lse_lo": (N,) float32, "argmax": (N,) int64}.

    z = softcap(scale * (hidden weight^T + bias)); nll = (max z - z[target]) + log sum exp(z - max z). Ignored rows
    cost no tile and give 0, 0, 0 and -1; a target outside [0, V) gives NaN and is never read with. Extra memory:
    48 MiB of partials and 16 bytes a row. Nothing is read back to the host.
    """
    return sweep((hidden,), weight, target, bias, logit_scale, logit_softcap, ignore_index, stats)[0]


def vocab_chunk(V: int, D: int, taken: int) -> int:
    """Vocabulary entries of a chunk, by the bytes that their float32 weight gradient may take beside those `taken`."""
    room = max(WEIGHT_BYTES, EXTRA_BYTES - BLOCK_BYTES - taken)
    return min(V, max(128, room // (4 * D) // 128 * 128))


def row_chunk(N: int, D: int, columns: int, dtype: torch.dtype, needs, held: int, silent: bool) -> int:
    """Rows of a block of d loss / d y of so many columns: EXTRA_BYTES less the float32 sums and what is held."""
    free = EXTRA_BYTES - 64 * N - held
    if dtype != torch.float32:
        free -= min(4 * N * D, HIDDEN_BYTES) * needs[0] + 4 * columns * D * needs[1]
    copied = 0 if silent or not needs[1] else D
    return max(1, min(N, free // ((columns + copied) * dtype.itemsize)))


def backward(
    grad_nll: Tensor | None,  # (N,) float32, like the next four
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    lse: Tensor,  # from the forward
    entropy: Tensor | None,
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) int64
    bias: Tensor | None,  # (V,)
    logit_scale: float,
    logit_softcap: float | None,
    ignore_index: int,
    needs: tuple[bool, bool, bool],
    num_kept: int | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias in the inputs' dtypes; None, and no work, for what is not needed.

    Where the float32 sums of both a long hidden gradient and the weight gradient would break the memory promise,
    each has a sweep of its own (five GEMMs instead of four). Ignored rows are multiplied as zeros, unless `num_kept`
    tells how many rows are not ignored and these are few enough to be gathered.
    """
    upstream = dense(grad_nll, grad_lse, grad_entropy, lse, entropy)
    target, bias = dense(target, bias)
    options = (bias, logit_scale, logit_softcap, ignore_index)
    gathered = 2 * hidden.element_size() * (num_kept or 0) * hidden.shape[1]  # hidden and its gradient
    if num_kept is not None and num_kept < target.shape[0] and gathered <= GATHERED_BYTES:
        return gathered_sweep(upstream, hidden, weight, target, options, needs, num_kept, gathered)
    long = hidden.dtype != torch.float32 and 4 * hidden.numel() > HIDDEN_BYTES
    if long and needs[0] and (needs[1] or needs[2]):
        grad_hidden, _, _ = gradient_sweep(upstream, hidden, weight, target, *options, (True, False, False))
        rest = gradient_sweep(upstream, hidden, weight, target, *options, (False, *needs[1:]))
        return grad_hidden, *rest[1:]
    return gradient_sweep(upstream, hidden, weight, target, *options, needs)


def gathered_sweep(upstream, hidden, weight, target, options, needs, num_kept, gathered):
    """`gradient_sweep` of the rows that are not ignored. More of them than `num_kept` give NaN, as in the loss."""
    bias, *_, ignore_index = options
    order, count = compaction_order(target, ignore_index)
    picked = order[:num_kept]
    poison = torch.where(count > num_kept, torch.nan, 1.0)
    grads, saved = upstream[:3], upstream[3:]
    upstream = [None if x is None else x[picked] * poison for x in grads]
    upstream += [None if x is None else x[picked] for x in saved]
    if not num_kept:
        zeros = (hidden, weight, bias)
        return tuple(
            torch.zeros_like(x).mul_(poison) if need else None for x, need in zip(zeros, needs, strict=True)
        )
    target = target[picked]
    rows = silence(hidden[picked], target, ignore_index)
    grad_hidden, grad_weight, grad_bias = gradient_sweep(
        upstream, rows, weight, target, *options, needs, gathered, silent=True
    )
    if grad_hidden is not None:
        grad_hidden = torch.zeros_like(hidden).index_copy_(0, picked, grad_hidden)
    return grad_hidden, grad_weight, grad_bias


def gradient_sweep(
    upstream,
    hidden,
    weight,
    target,
    bias,
    logit_scale,
    logit_softcap,
    ignore_index,
    needs,
    held=0,
    silent=False,
):
    """One sweep over (vocabulary chunk x row chunk) blocks; what is summed is float32 and cast once.

    held: bytes of the memory promise that are taken already. silent: ignored rows of hidden are zeros; else the
    product with a chunk's rows takes a copy of them in which they are.
    """
    (N, D), V, wide = hidden.shape, weight.shape[0], hidden.dtype == torch.float32
    grad_nll, grad_lse, grad_entropy, lse, entropy = upstream
    bound = sum((g.abs() for g in (grad_nll, grad_lse) if g is not None), torch.zeros_like(lse))
    if grad_entropy is not None:
        bound = bound + grad_entropy.abs() * (1 + entropy)
    loss_scale, unscale = loss_scale_of(bound, logit_scale, hidden.dtype)

    hidden_sums = 0 if wide or not needs[0] else min(4 * N * D, HIDDEN_BYTES)
    columns = vocab_chunk(V, D, 64 * N + held + hidden_sums)
    rows = row_chunk(N, D, columns, hidden.dtype, needs, held, silent)
    segment = N if wide or not needs[0] else max(1, min(N, HIDDEN_BYTES // (4 * D)))
    block = hidden.new_empty(min(rows, segment), columns)
    residual = None if wide or not any(needs[:2]) else TargetResidual(target, ignore_index)
    grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else None
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs[1] else None
    grad_bias = torch.zeros(V, dtype=torch.float32, device=weight.device) if needs[2] else None
    with device_guard(hidden.device):
        for first in range(0, N, segment):
            span = range(first, min(first + segment, N), block.shape[0])
            chunks = [slice(r, min(r + block.shape[0], first + segment, N)) for r in span]
            orders = [compaction_order(target[chunk], ignore_index) for chunk in chunks]
            hidden_sum = sums(grad_hidden, slice(first, min(first + segment, N)))
            for v in range(0, V, columns):
                vocab = slice(v, min(v + columns, V))
                weight_sum = sums(grad_weight, vocab)
                for chunk, order in zip(chunks, orders, strict=True):
                    g = block[: chunk.stop - chunk.start, : vocab.stop - v]
                    bias_sums = gradient_block(
                        g, upstream, hidden, weight, target, bias, order, chunk, vocab, loss_scale,
                        logit_scale, logit_softcap, needs[2], residual,
                    )  # fmt: skip
                    if needs[0]:
                        accumulate(hidden_sum[chunk.start - first : chunk.stop - first], g, weight[vocab])
                    if needs[1]:
                        rows_of_chunk = hidden[chunk]
                        if not silent:
                            rows_of_chunk = silence(rows_of_chunk.clone(), target[chunk], ignore_index)
                        accumulate(weight_sum, g.T, rows_of_chunk)
                        del rows_of_chunk
                    if needs[2]:
                        grad_bias[vocab] += bias_sums
                if needs[1]:
                    if residual is not None:
                        residual.correct_weight(weight_sum, hidden, first_vocab=v)
                    settle(grad_weight[vocab], weight_sum, unscale)
                    weight_sum = None  # freed before its successor is made
            if needs[0]:
                if residual is not None:
                    residual.correct_hidden(hidden_sum, weight, first)
                settle(grad_hidden[first : first + segment], hidden_sum, unscale)
                hidden_sum = None
    return grad_hidden, grad_weight, grad_bias.mul_(logit_scale).to(bias.dtype) if needs[2] else None


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
