"""Inputs of the LM-head suites, their float64 truth on some rows, and the rules by which outputs are judged.

Rules: "promise" is the bound that vig_kernels documents, 1e-5 + 1e-6 A with A = max_v sum_d |h_d w_vd| of the row.
"own" is what a peer can be expected to hold that works in the precision of its inputs: 1e-5 (1 + A) with float32
inputs, and with 16-bit inputs, whose logits it rounds to 16 bits, eps (1 + max_v |logit_v| + nll).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness import Check, Contender
from benchmarks.shapes import Shape

CHECKED_ROWS = 16
CHECKED_WORDS = 48
CHUNK = 8192  # vocabulary rows in float64 at a time
IGNORED = 0.7  # share of rows in `sparse_target`


@dataclass
class HeadInputs:
    shape: Shape
    hidden: Tensor  # (N, D)
    hidden_null: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    target: Tensor  # (N,)
    sparse_target: Tensor  # (N,) with 70 % of the rows ignored

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def leaves(self, frozen: bool = False) -> tuple[Tensor, Tensor]:
        """hidden and weight as leaves of a graph; a frozen weight needs no gradient."""
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_(not frozen)


def make_inputs(shape: Shape, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> HeadInputs:
    """Hidden states of unit variance and weights of variance 1 / D: logits of unit variance."""
    draw = torch.Generator(device).manual_seed(seed)

    def uniform(rows: int, variance: float) -> Tensor:
        edge = math.sqrt(3 * variance)
        filled = torch.empty(rows, shape.D, device=device).uniform_(-edge, edge, generator=draw)
        return filled.to(dtype)

    target = torch.randint(0, shape.V, (shape.N,), generator=draw, device=device)
    sparse = target.clone()
    order = torch.randperm(shape.N, generator=draw, device=device)
    sparse[order[: round(IGNORED * shape.N)]] = -100
    weight = uniform(shape.V, 1 / shape.D)
    return HeadInputs(shape, uniform(shape.N, 1), uniform(shape.N, 1), weight, target, sparse)


@dataclass
class RowTruth:
    """float64 facts of some rows."""

    rows: Tensor  # (R,) which
    nll: Tensor
    lse: Tensor
    largest: Tensor  # max_v |logit_v|
    products: Tensor  # A


def row_truth(hidden: Tensor, weight: Tensor, target: Tensor, rows: Tensor, bounds: bool = True) -> RowTruth:
    """In chunks of the vocabulary. Without `bounds`, `largest` and `products` stay 0."""
    picked = hidden[rows].double()
    lse = picked.new_full((len(rows),), -math.inf)
    largest, products = picked.new_zeros(len(rows)), picked.new_zeros(len(rows))
    for start in range(0, weight.shape[0], CHUNK):
        block = weight[start : start + CHUNK].double()
        logits = picked @ block.T
        lse = torch.logaddexp(lse, logits.logsumexp(1))
        if bounds:
            largest = torch.maximum(largest, logits.abs().amax(1))
            products = torch.maximum(products, (picked.abs() @ block.T.abs_()).amax(1))
    chosen = (picked * weight[target[rows]].double()).sum(1)
    return RowTruth(rows, lse - chosen, lse, largest, products)


def spread(count: int, wanted: int, device) -> Tensor:
    """`wanted` indices from first to last of `count`."""
    return torch.linspace(0, count - 1, min(wanted, count), device=device).round().long().unique()


def allowed_rows(truth: RowTruth, inputs: HeadInputs, exactness: str) -> Tensor:
    """(R,) allowed error of nll or of a logit."""
    if exactness == "promise":
        cores = 2e-9 * inputs.shape.D if inputs.weight.is_cuda else 0.0
        return 1e-5 + (1e-6 + cores) * truth.products
    if inputs.dtype == torch.float32:
        return 1e-5 * (1 + truth.products)
    return torch.finfo(inputs.dtype).eps * (1 + truth.largest + truth.nll.abs())


def compare(found: Tensor, truth: Tensor, allowed: Tensor) -> Check:
    """Elementwise; a value that is not finite has used all that is allowed and more."""
    error = (found.double() - truth).abs().nan_to_num(math.inf, math.inf, math.inf)
    return Check(float(error.max()), float((error / allowed).max()))


def worst(*checks: Check) -> Check:
    return Check(max(c.error for c in checks), max(c.used for c in checks))


class ScoreJudge:
    """Judges the outputs "logits" (N, V), "nll" (N,), "sparse" (N,) and "pair" (clean and null, (N,) each)."""

    def __init__(self, inputs: HeadInputs):
        self.inputs = inputs
        rows = spread(inputs.shape.N, CHECKED_ROWS, inputs.weight.device)
        self.clean = row_truth(inputs.hidden, inputs.weight, inputs.target, rows)
        self.null = row_truth(inputs.hidden_null, inputs.weight, inputs.target, rows)
        self.words = spread(inputs.shape.V, CHECKED_WORDS, inputs.weight.device)

    def __call__(self, contender: Contender, output) -> Check:
        allowed = allowed_rows(self.clean, self.inputs, contender.exactness)
        if contender.output == "logits":
            picked = self.inputs.hidden[self.clean.rows].double() @ self.inputs.weight[self.words].double().T
            return compare(output[self.clean.rows][:, self.words], picked, allowed[:, None])
        if contender.output == "pair":
            null_allowed = allowed_rows(self.null, self.inputs, contender.exactness)
            return worst(
                compare(output[0][self.clean.rows], self.clean.nll, allowed),
                compare(output[1][self.null.rows], self.null.nll, null_allowed),
            )
        if contender.output == "sparse":
            kept = self.inputs.sparse_target[self.clean.rows] != -100
            truth = torch.where(kept, self.clean.nll, 0.0)
            return compare(output[self.clean.rows], truth, torch.where(kept, allowed, 1e-30))
        return compare(output[self.clean.rows], self.clean.nll, allowed)


@dataclass
class GradientTruth:
    """float64 mean loss over all rows, and some rows of both gradients."""

    loss: float
    hidden_rows: Tensor
    grad_hidden: Tensor  # (R, D)
    words: Tensor
    grad_weight: Tensor  # (W, D)


class TrainJudge:
    """Judges "loss" (loss, grad_hidden, grad_weight or None) and the three bare products.

    Gradients are compared norm-wise with float64 on some rows. "promise": at most twice the error of eager PyTorch
    in the same dtype. "own": relative error 1e-4 with float32 inputs, 4 eps with 16-bit ones.
    """

    def __init__(self, inputs: HeadInputs, upstream: Tensor):
        self.inputs, self.upstream = inputs, upstream
        self.truth = _gradient_truth(inputs)
        hidden, weight = inputs.leaves()
        logits = torch.nn.functional.linear(hidden, weight)
        loss = torch.nn.functional.cross_entropy(logits.float(), inputs.target)
        self.eager = self._errors(torch.autograd.grad(loss, (hidden, weight)))

    def __call__(self, contender: Contender, output) -> Check:
        coarse = 1e-4 if self.inputs.dtype == torch.float32 else 4 * torch.finfo(self.inputs.dtype).eps
        if contender.output != "loss":
            found, truth = self._product(contender.output, output)
            error = _relative(found, truth)
            return Check(error, error / coarse)
        loss, *gradients = output
        errors = self._errors(gradients)
        promised = (
            [2 * e + 1e-7 for e in self.eager] if contender.exactness == "promise" else [coarse, coarse]
        )
        loss_error = abs(float(loss) - self.truth.loss)
        loss_allowed = 1e-4 if contender.exactness == "promise" else coarse * self.truth.loss
        used = [loss_error / loss_allowed] + [e / a for e, a in zip(errors, promised, strict=True)]
        return Check(max(errors), max(math.inf if math.isnan(u) else u for u in used))

    def _errors(self, gradients) -> list[float]:
        grad_hidden, grad_weight = gradients
        return [
            _relative(grad_hidden[self.truth.hidden_rows], self.truth.grad_hidden),
            0.0 if grad_weight is None else _relative(grad_weight[self.truth.words], self.truth.grad_weight),
        ]

    def _product(self, which: str, output: Tensor) -> tuple[Tensor, Tensor]:
        rows, words = self.truth.hidden_rows, self.truth.words
        hidden, weight, upstream = self.inputs.hidden, self.inputs.weight, self.upstream
        if which == "logits":
            return output[rows][:, words], hidden[rows].double() @ weight[words].double().T
        if which == "hidden":
            blocks = zip(upstream[rows].split(CHUNK, 1), weight.split(CHUNK), strict=True)
            return output[rows], sum(u.double() @ w.double() for u, w in blocks)
        return output[words], upstream[:, words].double().T @ hidden.double()


def _relative(found: Tensor, truth: Tensor) -> float:
    error = float((found.double() - truth).norm() / truth.norm())
    return math.inf if math.isnan(error) else error


def _gradient_truth(inputs: HeadInputs) -> GradientTruth:
    device = inputs.weight.device
    rows = spread(inputs.shape.N, CHECKED_ROWS, device)
    words = torch.cat([inputs.target[rows], spread(inputs.shape.V, CHECKED_WORDS, device)]).unique()
    everything = row_truth(
        inputs.hidden, inputs.weight, inputs.target, torch.arange(inputs.shape.N, device=device), bounds=False
    )
    hidden, scale = inputs.hidden.double(), 1 / inputs.shape.N
    grad_hidden = -inputs.weight[inputs.target[rows]].double()
    for block in inputs.weight.split(CHUNK):
        block = block.double()
        grad_hidden += (hidden[rows] @ block.T - everything.lse[rows, None]).exp() @ block
    share = (hidden @ inputs.weight[words].double().T - everything.lse[:, None]).exp()
    share -= (inputs.target[:, None] == words).double()
    grad_weight = share.T @ hidden * scale
    return GradientTruth(float(everything.nll.mean()), rows, grad_hidden * scale, words, grad_weight)
