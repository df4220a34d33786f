"""Inputs and bounds shared by the tests of all linear ops: cases x dtypes x (backend, device)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vig_kernels import backend_table, dispatch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS_JUDGED = 24  # so many, in draws of the same case, before gradients are compared with eager PyTorch's


@dataclass(frozen=True)
class Case:
    name: str
    N: int = 5
    D: int = 24
    V: int = 67
    scale: float = 1.0  # of the hidden states, hence of the logits
    ignored: str = "some"  # none, some, all
    options: dict = field(default_factory=dict)
    bias: bool = False
    sunk: float = 0.0  # subtracted from the bias, hence from all logits
    strided: bool = False  # rows of hidden and weight lie apart
    twins: bool = False  # vocabulary rows 1 and 5 are equal, and the best

    def __str__(self):
        return self.name


CASES = (
    Case("ragged", N=37, D=129, V=1001),
    Case("one-row", N=1, D=64, V=300, ignored="none"),
    Case("no-rows", N=0),
    Case("one-word", N=3, V=1),
    Case("one-feature", D=1, V=9),
    Case("all-ignored", ignored="all"),
    Case("blocks-of-D", N=6, D=1500, V=40),
    Case("tiles-of-V", N=4, D=8, V=5003),
    Case("tiles-of-N", N=1100, D=8, V=33),
    Case("strided", N=9, D=33, V=130, strided=True),
    Case("peaked", N=8, D=32, V=90, scale=30.0),
    Case("logits-1e4", N=8, D=32, V=90, scale=2000.0),
    Case("twins", N=8, D=32, V=90, twins=True),
    Case("bias", N=8, D=40, V=100, bias=True),
    Case("all-logits-below-minus-100", N=8, D=40, V=100, bias=True, sunk=400.0),
    Case("scale", N=8, D=40, V=100, bias=True, options={"logit_scale": 0.0625}),
    Case("softcap", N=8, D=40, V=100, scale=6.0, options={"logit_softcap": 3.0}),
    Case("softcap-of-peaked", N=8, D=40, V=100, scale=150.0, options={"logit_softcap": 200.0}),
    Case(
        "all-options",
        N=20,
        D=70,
        V=257,
        bias=True,
        scale=3.0,
        options={"logit_scale": 1.7, "logit_softcap": 30.0, "ignore_index": 7},
    ),
)


@dataclass
class Inputs:
    hidden: torch.Tensor
    weight: torch.Tensor
    target: torch.Tensor
    options: dict  # bias and logit options, as the ops take them

    def leaves(self):
        """hidden, weight and (where there is one) bias."""
        return [t for t in (self.hidden, self.weight, self.options.get("bias")) if t is not None]

    def double(self) -> Inputs:
        """The same values as float64 leaves, whose gradients nothing rounds to 16 bits."""
        hidden, weight, *bias = (t.detach().double().requires_grad_() for t in self.leaves())
        options = self.options | ({"bias": bias[0]} if bias else {})
        return Inputs(hidden, weight, self.target, options)


def make(case: Case, dtype: torch.dtype, device="cpu", seed: int = 0, grad: bool = False) -> Inputs:
    """The inputs of a case: the same values for a seed, whatever the backend."""
    draw = torch.Generator().manual_seed(seed)
    gap = 3 if case.strided else 0
    weight = torch.randn(case.V, case.D + gap, generator=draw) * case.D**-0.5
    hidden = torch.randn(case.N, case.D + gap, generator=draw) * case.scale
    if case.twins:
        weight[5] = weight[1] = hidden[:, : case.D + gap].mean(0)
    target = torch.randint(0, case.V, (case.N,), generator=draw)
    ignore_index = case.options.get("ignore_index", -100)
    if case.ignored == "all":
        target[:] = ignore_index
    elif case.ignored == "some":
        target[::3] = ignore_index
        target[1:2] = case.V - 1
    options = dict(case.options)
    if case.bias:
        options["bias"] = torch.randn(case.V, generator=draw).sub(case.sunk).to(device, dtype)
    hidden, weight = hidden.to(device, dtype)[:, : case.D], weight.to(device, dtype)[:, : case.D]
    inputs = Inputs(hidden, weight, target.to(device), options)
    if grad:
        for leaf in inputs.leaves():
            leaf.requires_grad_()
    return inputs


def runners(op: str) -> list:
    """(backend, device) pairs that can run here, the specification itself left out."""
    return [
        (backend, device.type)
        for device in dispatch.devices()
        for backend in backend_table.BACKENDS
        if backend != "reference" and dispatch.why_not(op, backend, device) is None
    ]


def bound(inputs: Inputs, hidden: torch.Tensor | None = None) -> torch.Tensor:
    """(N,) float64: the promised error of a per-token value, 1e-5 + 1e-6 A."""
    hidden = inputs.hidden if hidden is None else hidden
    bias = inputs.options.get("bias")
    products = hidden.detach().double().abs() @ inputs.weight.detach().double().abs().T
    products = products * abs(inputs.options.get("logit_scale", 1.0))
    if bias is not None:
        products = products + bias.detach().double().abs()
    largest = products.amax(1) if products.shape[0] else products.new_zeros(0)
    tensor_cores = 2e-9 * hidden.shape[1] if hidden.is_cuda else 0.0
    return 1e-5 + (1e-6 + tensor_cores) * largest


def eager_logits(inputs: Inputs) -> torch.Tensor:
    """Logits as same-dtype eager PyTorch forms them: the yardstick of gradients."""
    options = inputs.options
    logits = torch.nn.functional.linear(inputs.hidden, inputs.weight, options.get("bias"))
    logits = logits * options.get("logit_scale", 1.0)
    cap = options.get("logit_softcap")
    return (logits if cap is None else cap * torch.tanh(logits / cap)).float()


def draws(case: Case) -> range:
    """Seeds whose gradients are judged together: of a few rows the ratio of two rounding errors is chance."""
    return range(max(2, -(-ROWS_JUDGED // case.N)) if case.N else 1)


def assert_gradients(*draws: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]) -> None:
    """Norm-wise per tensor: at most twice the error of same-dtype eager PyTorch, and of rounding the result.

    draws: gradients found, exact (float64) and eager, of problems of one kind; the norm is over all of them, each
    error as a part of its exact gradient.
    """
    for leaf in zip(*(zip(*draw, strict=True) for draw in draws), strict=True):
        errors, theirs, rounding = torch.stack([_errors(*gradients) for gradients in leaf]).norm(dim=0)
        allowed = 2 * torch.maximum(theirs, rounding) + 1e-7 * len(draws) ** 0.5
        assert errors <= allowed, f"gradient error {errors:.3e} over {allowed:.3e}, of {len(draws)} draws"


def _errors(mine: Tensor, truth: Tensor, theirs: Tensor) -> Tensor:
    """(3,) of ours, of eager PyTorch's and of the rounded exact gradient, as parts of its norm."""
    assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
    truth = truth.double()
    errors = [(found.double() - truth).norm() for found in (mine, theirs, truth.to(mine.dtype))]
    return torch.stack(errors).cpu() / (truth.norm().cpu() + 1e-5)
