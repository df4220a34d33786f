"""linear_nll in chunked PyTorch: any device, no compiler. Also the tile machinery of the other linear ops.

Logits exist one tile at a time, (rows, columns) of at most 8 MiB in float32. A tile's products are summed in
blocks of 256 steps, always in float32: 16-bit chunks are upcast first, which is exact. Tiles are folded into a
running (max, sum, target logit) a row. Device memory beyond inputs and outputs stays below 64 MiB (scoring)
and 256 MiB (gradients) for any N and V.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256  # steps of a float32 sum over D; longer ones miss the accuracy promise
TILE_BYTES = 8 << 20  # one float32 tile of hidden, of weight or of logits
BUFFER_BYTES = 128 << 20  # one float32 gradient that cannot be accumulated in its output


def why_not(device: torch.device) -> str | None:
    return None


class Head(NamedTuple):
    """The LM head and what turns its products into logits: softcap(scale * (h weight^T + bias))."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float | None


def chunks(size: int, step: int) -> Iterator[slice]:
    return (slice(at, min(at + step, size)) for at in range(0, size, step))


def tile_shape(width: int) -> tuple[int, int]:
    """(rows, columns) of a tile: a function of D alone, so that a row's tiles do not depend on other rows."""
    fit = max(16, TILE_BYTES // (4 * width))
    return min(1024, fit), min(2048, fit)


class Held:
    """One of torch's process-wide switches, at `needed` while any thread needs it so; one that is harmless stays."""

    def __init__(self, read: Callable, write: Callable, needed, harmless: tuple):
        self.read, self.write, self.needed, self.harmless = read, write, needed, harmless
        self.lock, self.users, self.before = threading.Lock(), 0, needed

    def __enter__(self):
        with self.lock:
            if self.users == 0:
                self.before = self.read()
                if self.before not in self.harmless:
                    self.write(self.needed)
            self.users += 1

    def __exit__(self, *_):
        with self.lock:
            self.users -= 1
            if self.users == 0 and self.before not in self.harmless:
                self.write(self.before)


def held(switch, name: str, needed, *harmless) -> Held:
    """Of an attribute of torch.backends."""
    read, write = functools.partial(getattr, switch, name), functools.partial(setattr, switch, name)
    return Held(read, write, needed, (needed, *harmless))


CUDA_PRODUCTS = torch.backends.cuda.matmul
if hasattr(CUDA_PRODUCTS, "fp32_precision"):
    EXACT_CUDA = held(CUDA_PRODUCTS, "fp32_precision", "ieee", "none")
    EXACT_CPU = held(torch.backends.mkldnn.matmul, "fp32_precision", "ieee", "none")
else:  # torch 2.8: one switch for all devices
    precision = torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    EXACT_CUDA = EXACT_CPU = Held(*precision, "highest", ("highest",))
FLOAT32_SUMS = held(
    CUDA_PRODUCTS, "allow_fp16_accumulation", False
)  # of float16 products; cuBLAS refuses otherwise


@contextlib.contextmanager
def float32_products(dtype: torch.dtype):
    """Float32 products of float32 inputs, whatever the global TF32 settings, restored on the way out.

    Upcast 16-bit inputs may use TF32 as they come: it holds every bfloat16 and float16 exactly.
    """
    with EXACT_CPU, EXACT_CUDA if dtype == torch.float32 else contextlib.nullcontext():
        yield


def compact(target: Tensor, ignore_index: int, num_kept: int | None = None) -> Tensor | None:
    """Indices of the rows to work on; None for all of them (on a GPU without num_kept, counting would stall)."""
    if target.device.type == "cpu":
        kept = (target != ignore_index).nonzero().squeeze(1)
        return None if kept.numel() == target.numel() else kept
    if num_kept is None or num_kept >= target.numel():
        return None
    # a stable sort puts the kept rows first, in order; nothing is read back to the host
    return torch.argsort((target == ignore_index).byte(), stable=True)[:num_kept]


def gather_rows(matrix: Tensor, kept: Tensor | None, part: slice) -> Tensor:
    """A float32 copy of rows `part` (of the kept rows): always fresh memory, so bits do not vary with alignment."""
    taken = matrix[part] if kept is None else matrix.index_select(0, kept[part])
    return taken.to(torch.float32, copy=kept is None)


def logits_tile(
    hidden: Tensor, weight: Tensor, columns: slice, head: Head, out: Tensor | None = None
) -> Tensor:
    """Float32 logits of a tile; hidden (n, D) and weight (v, D) are float32."""
    if out is None:
        out = hidden.new_empty(hidden.shape[0], weight.shape[0])
    for part in chunks(hidden.shape[1], BLOCK):
        out.addmm_(hidden[:, part], weight[:, part].T, beta=1 if part.start else 0)
    if head.bias is not None:
        out.add_(head.bias[columns].float())
    if head.scale != 1.0:
        out.mul_(head.scale)
    if head.softcap is not None:
        out.div_(head.softcap).tanh_().mul_(head.softcap)
    return out


def finite_or_zero(top: Tensor) -> Tensor:
    """A row maximum that can be subtracted: rows whose logits are all -inf so far have none."""
    return torch.where(top == float("-inf"), 0.0, top)


def rounding_of_sum(a: Tensor, b: Tensor, total: Tensor) -> Tensor:
    """a + b - total for total = a + b as float32 rounds it, exactly (Knuth); 0 where total is not finite."""
    b_part = total - a
    rest = (a - (total - b_part)) + (b - b_part)
    return torch.where(total.isfinite(), rest, 0.0)


class RunningRows:
    """Per-row state of the sweep over the vocabulary: max, sum exp(z - max) and the sinks asked for."""

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
        self.best = torch.zeros(size, dtype=torch.int64, device=target.device) if "argmax" in stats else None

    def fold(self, z: Tensor, first: int) -> None:
        """Take in the logits z (n, v) of columns first, first + 1, ...; z is overwritten."""
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
            self.total = self.total * shrink + z.exp_().sum(1)
        self.top = top

    def results(self) -> dict[str, Tensor]:
        log_total = self.total.log()
        # max - logit first: both may be large, their difference is small where it matters
        lse = self.top + log_total
        values = {"nll": (self.top - self.target_logit) + log_total, "lse": lse}
        values["lse_rest"] = rounding_of_sum(self.top, log_total, lse)
        if self.spread is not None:
            values["entropy"] = (log_total - self.spread / self.total).clamp_(min=0.0)
        if self.best is not None:
            values["argmax"] = self.best
        return values


def sweep(
    hiddens, head: Head, target: Tensor, ignore_index: int, stats: tuple[str, ...]
) -> list[dict[str, Tensor]]:
    """Values of every row for each of `hiddens`, each weight tile being read (and upcast) once for all of them."""
    size, width = hiddens[0].shape
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
    kept = compact(target, ignore_index)
    live = target if kept is None else target[kept]
    tile_rows, tile_columns = tile_shape(width)
    with float32_products(head.weight.dtype):
        for rows in chunks(live.shape[0], tile_rows):
            upcast = [gather_rows(hidden, kept, rows) for hidden in hiddens]
            states = [RunningRows(live[rows], stats) for _ in hiddens]
            for columns in chunks(head.weight.shape[0], tile_columns):
                weight = head.weight[columns].float()
                for hidden, state in zip(upcast, states, strict=True):
                    state.fold(logits_tile(hidden, weight, columns, head), columns.start)
            ignored = live[rows] == ignore_index
            for output, state in zip(outputs, states, strict=True):
                values = state.results()
                for name in wanted:
                    value = values[name].masked_fill_(ignored, empty.get(name, 0))
                    if kept is None:
                        output[name][rows] = value
                    else:
                        output[name][kept[rows]] = value
    return outputs


def forward(hidden, weight, target, bias, logit_scale, logit_softcap, ignore_index, stats):
    """See API: nll (N,) float32 and the sinks in `stats`; ignored rows cost no products on a CPU."""
    head = Head(weight, bias, logit_scale, logit_softcap)
    (values,) = sweep([hidden], head, target, ignore_index, stats)
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


def row_gradients(grad_nll, grad_lse, grad_entropy, lse, entropy, target, vocabulary, ignore_index, kept):
    """RowGradients of the kept rows; rows without a valid target get no gradient, whatever they hold."""
    parts = [grad for grad in (grad_nll, grad_lse) if grad is not None]
    zero = torch.zeros_like(lse)
    dead = (target == ignore_index) | (target < 0) | (target >= vocabulary)
    values = [
        target.masked_fill(dead, -1),
        lse.masked_fill(dead, float("inf")),  # p = exp(z - inf) = 0
        sum(parts, zero).masked_fill(dead, 0.0),
        (zero if grad_nll is None else grad_nll).masked_fill(dead, 0.0),
        None if grad_entropy is None else grad_entropy.masked_fill(dead, 0.0),
        None if grad_entropy is None else entropy,
    ]
    return RowGradients(*(v if v is None or kept is None else v[kept] for v in values)), dead


def product_gradient(z: Tensor, first: int, head: Head, rows: RowGradients) -> Tensor:
    """d loss / d (h weight^T + bias) of a tile of logits z (n, v), which is overwritten."""
    slope = None if head.softcap is None else 1.0 - (z / head.softcap).square_()
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
    return z if head.scale == 1.0 else z.mul_(head.scale)


def backward(
    grad_nll,
    grad_lse,
    grad_entropy,
    lse,
    entropy,
    hidden,
    weight,
    target,
    bias,
    logit_scale,
    logit_softcap,
    ignore_index,
    needs,
    num_kept=None,
):
    """Gradients for any upstream, the logits being formed again: three products, five where neither float32 sum fits.

    Sums go into the output where that is float32. For 16-bit inputs the smaller of the (N, D) and the (V, D) sum
    is buffered in float32 when it fits 128 MiB; else hidden and weight take a sweep each.
    """
    head = Head(weight, bias, logit_scale, logit_softcap)
    kept = compact(target, ignore_index, num_kept)
    rows, dead = row_gradients(
        grad_nll, grad_lse, grad_entropy, lse, entropy, target, weight.shape[0], ignore_index, kept
    )
    dead = dead if kept is None else None
    need_hidden, need_weight, need_bias = needs
    width = 4 * hidden.shape[1]
    if not need_weight or weight.dtype == torch.float32 or width * weight.shape[0] <= BUFFER_BYTES:
        return _gradient_sweep(head, hidden, rows, kept, dead, needs, rows_outside=True)
    if not need_hidden or width * rows.target.shape[0] <= BUFFER_BYTES:
        return _gradient_sweep(head, hidden, rows, kept, dead, needs, rows_outside=False)
    grad_hidden, _, _ = _gradient_sweep(
        head, hidden, rows, kept, dead, (True, False, False), rows_outside=True
    )
    _, grad_weight, grad_bias = _gradient_sweep(
        head, hidden, rows, kept, dead, (False, True, need_bias), rows_outside=False
    )
    return grad_hidden, grad_weight, grad_bias


def _gradient_sweep(head, hidden, rows, kept, dead, needs, rows_outside):
    """One sweep over the tiles; the gradient whose chunks are outside is finished chunk by chunk."""
    need_hidden, need_weight, need_bias = needs
    weight = head.weight
    hidden_sum = GradientSum(hidden, kept, whole=not rows_outside) if need_hidden else None
    weight_sum = GradientSum(weight, None, whole=rows_outside) if need_weight else None
    bias_sum = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device) if need_bias else None
    with float32_products(weight.dtype):
        for row_part, column_part, h, w in _tiles(
            hidden, weight, rows.target.shape[0], kept, dead, rows_outside
        ):
            z = logits_tile(h, w, column_part, head)
            z = product_gradient(z, column_part.start, head, rows.rows(row_part))
            if need_hidden:
                hidden_sum.tile(row_part).addmm_(z, w)
            if need_weight:
                weight_sum.tile(column_part).addmm_(z.T, h)
            if need_bias:
                bias_sum[column_part] += z.sum(0)
    return (
        hidden_sum.finish() if need_hidden else None,
        weight_sum.finish() if need_weight else None,
        bias_sum.to(head.bias.dtype) if need_bias else None,
    )


def _tiles(hidden, weight, size, kept, dead, rows_outside):
    """(rows, columns, float32 hidden, float32 weight) of every tile, in the order asked for."""
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
