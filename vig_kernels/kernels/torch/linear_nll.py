"""linear_nll in chunked PyTorch: any device, no compiler.

Logits exist one tile at a time, (rows, columns) of at most 8 MiB in float32. A tile's products are summed in
blocks of 256 steps, always in float32: 16-bit chunks are upcast first, which is exact. Tiles are folded into a
running (max, sum, target logit) a row. Device memory beyond inputs and outputs stays below 64 MiB (scoring)
and 256 MiB (gradients) for any N and V.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vig_kernels.kernels.torch.precision import float32_products
from vig_kernels.kernels.torch.tiles import (
    chunks,
    compact,
    finite_or_zero,
    gather_rows,
    logits_tile,
    rounding_of_sum,
    tile_shape,
)
from vig_kernels.problem import HeadProblem, Needs, Saved, Upstream

BUFFER_BYTES = 128 << 20  # one float32 gradient that cannot be accumulated in its output


class RunningRows:
    """Per-row state of the sweep over the vocabulary: max, sum exp(z - max) and the statistics asked for."""

    def __init__(self, target: Tensor, stats: tuple[str, ...]):
        size = target.shape[0]
        like = {"dtype": torch.float32, "device": target.device}
        self.target = target
        self.top = torch.full((size,), float("-inf"), **like)
        self.total = torch.zeros(size, **like)
        self.target_logit = torch.full(
            (size,), float("nan"), **like
        )  # stays NaN where target is out of range
        self.spread = torch.zeros(size, **like) if "entropy" in stats else None  # sum exp(z - max) (z - max)
        # sum exp(z - max) (z - other), other: the logits of the second pass
        self.difference = torch.zeros(size, **like) if "kl" in stats else None
        self.best = torch.zeros(size, dtype=torch.int64, device=target.device) if "argmax" in stats else None

    def fold(self, z: Tensor, first: int, above: Tensor | None = None) -> None:
        """Take in the logits z (n, v) of columns first, first + 1, ...; z is overwritten.

        above: how far z is above the second pass's logits, where the divergence from that is wanted; overwritten.
        """
        width = z.shape[1]
        local = self.target - first
        inside = (local >= 0) & (local < width)
        picked = z.gather(1, local.clamp(0, width - 1).unsqueeze(1)).squeeze(1)
        self.target_logit = torch.where(inside, picked, self.target_logit)
        tile_top = z.amax(1)
        if self.best is not None:
            self.best = torch.where(tile_top > self.top, z.argmax(1) + first, self.best)
        top = torch.maximum(self.top, tile_top)
        base = finite_or_zero(top)
        shrink = torch.exp(self.top - base)
        z.sub_(base.unsqueeze(1))
        if self.spread is not None:
            lowered = torch.where(self.top == float("-inf"), 0.0, self.top - base)
            e = z.exp()
            self.spread = (self.spread + self.total * lowered) * shrink + z.clamp_(min=-1e30).mul_(e).sum(1)
            self.total = self.total * shrink + e.sum(1)
        else:
            e = z.exp_()
            self.total = self.total * shrink + e.sum(1)
        if above is not None:  # where e is 0, both logits may be -inf
            above.mul_(e).masked_fill_(e == 0, 0.0)
            shrunk = (self.difference * shrink).masked_fill_(shrink == 0, 0.0)
            self.difference = shrunk + above.sum(1)
        self.top = top

    def results(self) -> dict[str, Tensor]:
        log_total = self.total.log()
        # max - logit first: both may be large, their difference is small where it matters
        lse = self.top + log_total
        values = {"nll": (self.top - self.target_logit) + log_total, "lse": lse}
        values["lse_lo"] = rounding_of_sum(self.top, log_total, lse)
        if self.spread is not None:
            values["entropy"] = (log_total - self.spread / self.total).clamp_(min=0.0)
        if self.best is not None:
            values["argmax"] = self.best
        return values

    def divergence(self, other: RunningRows) -> Tensor:
        """KL of this softmax from that of the second pass, nats: sum_v p_v (z_v - z'_v) - lse + lse'."""
        change = (self.top - other.top) + (self.total.log() - other.total.log())
        return (self.difference / self.total - change).clamp_(min=0.0)


def sweep(
    problem: HeadProblem, hiddens: tuple[Tensor, ...], stats: tuple[str, ...]
) -> list[dict[str, Tensor]]:
    """Values of every row for each of `hiddens`, each weight tile being read (and upcast) once for all of them.

    "kl" is the divergence of the first of two passes from the second; it stands among the values of the first.
    """
    target, (size, width) = problem.target, problem.hidden.shape
    wanted = ("nll", *stats)
    empty = {"argmax": -1}
    outputs = [
        {
            name: torch.full(
                (size,),
                empty.get(name, 0),
                dtype=torch.int64 if name == "argmax" else torch.float32,
                device=target.device,
            )
            for name in wanted
        }
        for _ in hiddens
    ]
    kept = compact(problem._replace(num_kept=None))  # which a forward does not rely on
    live = target if kept is None else target[kept]
    tile_rows, tile_columns = tile_shape(width)
    with float32_products(problem.weight.dtype):
        for rows in chunks(live.shape[0], tile_rows):
            upcast = [gather_rows(hidden, kept, rows) for hidden in hiddens]
            states = [RunningRows(live[rows], stats) for _ in hiddens]
            for columns in chunks(problem.weight.shape[0], tile_columns):
                weight = problem.weight[columns].float()
                if "kl" in stats:
                    image, null = (logits_tile(hidden, weight, columns, problem) for hidden in upcast)
                    above = image - null
                    states[1].fold(null, columns.start)
                    del null
                    states[0].fold(image, columns.start, above)
                else:
                    for hidden, state in zip(upcast, states, strict=True):
                        state.fold(logits_tile(hidden, weight, columns, problem), columns.start)
            ignored = live[rows] == problem.ignore_index
            for output, state in zip(outputs, states, strict=True):
                values = state.results()
                if "kl" in stats:
                    values["kl"] = states[0].divergence(states[1])
                for name in wanted:
                    value = values[name].masked_fill_(ignored, empty.get(name, 0))
                    if kept is None:
                        output[name][rows] = value
                    else:
                        output[name][kept[rows]] = value
    return outputs


def forward(problem: HeadProblem, stats: tuple[str, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """(nll (N,) float32, {stat: (N,) tensor}); ignored rows cost no products on a CPU."""
    (values,) = sweep(problem, (problem.hidden,), stats)
    return values.pop("nll"), values


class GradientSum:
    """Float32 sums of one gradient, cast once at the store.

    `whole`: every tile stays open until `finish` (a float32 buffer unless the output itself can hold the sums).
    Otherwise only the tile in hand is open, and asking for another one stores it.
    """

    def __init__(self, like: Tensor, kept: Tensor | None, whole: bool):
        self.out = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
        self.kept = kept
        self.whole = whole
        self.part, self.open = None, None
        self.size = like.shape[0] if kept is None else kept.shape[0]
        self.direct = like.dtype == torch.float32 and kept is None
        if whole:
            self.buffer = self.out if self.direct else self._zeros(self.size)

    def _zeros(self, size: int) -> Tensor:
        return torch.zeros(size, self.out.shape[1], dtype=torch.float32, device=self.out.device)

    def tile(self, part: slice) -> Tensor:
        if self.whole:
            return self.buffer[part]
        if self.direct:
            return self.out[part]
        if part != self.part:
            self._close()
            self.part, self.open = part, self._zeros(part.stop - part.start)
        return self.open

    def _close(self) -> None:
        if self.open is not None:
            self._store(self.part, self.open)

    def _store(self, part: slice, values: Tensor) -> None:
        if self.kept is None:
            self.out[part] = values
        else:
            self.out[self.kept[part]] = values.to(self.out.dtype)

    def finish(self) -> Tensor:
        if self.whole and not self.direct:
            for part in chunks(self.size, tile_shape(self.out.shape[1])[0]):
                self._store(part, self.buffer[part])
        self._close()
        return self.out


class RowGradients(NamedTuple):
    """What each row contributes to d loss / d z_v = p_v (a - e (log p_v + entropy)) - [v = target] t."""

    target: Tensor  # (N,) int64
    lse: Tensor  # (N,)
    probability: Tensor  # (N,) a = grad_nll + grad_lse
    onehot: Tensor  # (N,) t = grad_nll
    entropy: Tensor | None  # (N,) e = grad_entropy
    entropy_value: Tensor | None  # (N,)

    def rows(self, part: slice) -> RowGradients:
        return RowGradients(*(None if value is None else value[part] for value in self))


def row_gradients(
    problem: HeadProblem, upstream: Upstream, saved: Saved, kept: Tensor | None
) -> tuple[RowGradients, Tensor]:
    """RowGradients of the kept rows; rows without a valid target get no gradient, whatever they hold."""
    target, lse = problem.target, saved.lse
    parts = [grad for grad in upstream[:2] if grad is not None]
    zero = torch.zeros_like(lse)
    dead = (target == problem.ignore_index) | (target < 0) | (target >= problem.weight.shape[0])
    values = [
        target.masked_fill(dead, -1),
        lse.masked_fill(dead, float("inf")),  # p = exp(z - inf) = 0
        sum(parts, zero).masked_fill(dead, 0.0),
        (zero if upstream.nll is None else upstream.nll).masked_fill(dead, 0.0),
        None if upstream.entropy is None else upstream.entropy.masked_fill(dead, 0.0),
        None if upstream.entropy is None else saved.entropy,
    ]
    return RowGradients(*(v if v is None or kept is None else v[kept] for v in values)), dead


def product_gradient(z: Tensor, first: int, problem: HeadProblem, rows: RowGradients) -> Tensor:
    """d loss / d (h weight^T + bias) of a tile of logits z (n, v), which is overwritten."""
    slope = None if problem.logit_softcap is None else 1.0 - (z / problem.logit_softcap).square_()
    z.sub_(rows.lse.unsqueeze(1))
    if rows.entropy is None:
        z.exp_().mul_(rows.probability.unsqueeze(1))
    else:
        p = z.exp()
        z.clamp_(min=-1e30).add_(rows.entropy_value.unsqueeze(1)).mul_(rows.entropy.unsqueeze(1))
        z.neg_().add_(rows.probability.unsqueeze(1)).mul_(p)
    local = rows.target - first
    inside = (local >= 0) & (local < z.shape[1])
    at = local.clamp(0, z.shape[1] - 1).unsqueeze(1)
    z.scatter_add_(1, at, torch.where(inside, -rows.onehot, 0.0).unsqueeze(1))
    if slope is not None:
        z.mul_(slope)
    return z if problem.logit_scale == 1.0 else z.mul_(problem.logit_scale)


def backward(
    upstream: Upstream, saved: Saved, problem: HeadProblem, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for any upstream, the logits being formed again: three products, five where neither float32 sum fits.

    Sums go into the output where that is float32. For 16-bit inputs the smaller of the (N, D) and the (V, D) sum
    is buffered in float32 when it fits 128 MiB; else hidden and weight take a sweep each.
    """
    kept = compact(problem)
    rows, dead = row_gradients(problem, upstream, saved, kept)
    dead = dead if kept is None else None

    def sweep_for(needs: Needs, rows_outside: bool):
        return _gradient_sweep(problem, rows, kept, dead, needs, rows_outside)

    weight, width = problem.weight, 4 * problem.hidden.shape[1]
    if not needs.weight or weight.dtype == torch.float32 or width * weight.shape[0] <= BUFFER_BYTES:
        return sweep_for(needs, rows_outside=True)
    if not needs.hidden or width * rows.target.shape[0] <= BUFFER_BYTES:
        return sweep_for(needs, rows_outside=False)
    grad_hidden, _, _ = sweep_for(Needs(True, False, False), rows_outside=True)
    _, grad_weight, grad_bias = sweep_for(needs._replace(hidden=False), rows_outside=False)
    return grad_hidden, grad_weight, grad_bias


def _gradient_sweep(problem: HeadProblem, rows: RowGradients, kept, dead, needs: Needs, rows_outside: bool):
    """One sweep over the tiles; the gradient whose chunks are outside is finished chunk by chunk."""
    weight = problem.weight
    hidden_sum = GradientSum(problem.hidden, kept, whole=not rows_outside) if needs.hidden else None
    weight_sum = GradientSum(weight, None, whole=rows_outside) if needs.weight else None
    bias_sum = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device) if needs.bias else None
    with float32_products(weight.dtype):
        for row_part, column_part, h, w in _tiles(problem, rows.target.shape[0], kept, dead, rows_outside):
            z = logits_tile(h, w, column_part, problem)
            z = product_gradient(z, column_part.start, problem, rows.rows(row_part))
            if needs.hidden:
                hidden_sum.tile(row_part).addmm_(z, w)
            if needs.weight:
                weight_sum.tile(column_part).addmm_(z.T, h)
            if needs.bias:
                bias_sum[column_part] += z.sum(0)
    return (
        hidden_sum.finish() if needs.hidden else None,
        weight_sum.finish() if needs.weight else None,
        bias_sum.to(problem.bias.dtype) if needs.bias else None,
    )


def _tiles(problem: HeadProblem, size: int, kept, dead, rows_outside: bool):
    """(rows, columns, float32 hidden, float32 weight) of every tile of `size` rows, in the order asked for."""
    hidden, weight = problem.hidden, problem.weight
    tile_rows, tile_columns = tile_shape(hidden.shape[1])

    def hidden_tile(part):
        h = gather_rows(hidden, kept, part)
        return h if dead is None else h.masked_fill_(dead[part].unsqueeze(1), 0.0)

    if rows_outside:
        for row_part in chunks(size, tile_rows):
            h = hidden_tile(row_part)
            for column_part in chunks(weight.shape[0], tile_columns):
                yield row_part, column_part, h, weight[column_part].float()
    else:
        for column_part in chunks(weight.shape[0], tile_columns):
            w = weight[column_part].float()
            for row_part in chunks(size, tile_rows):
                yield row_part, column_part, hidden_tile(row_part), w
