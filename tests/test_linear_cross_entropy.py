"""linear_cross_entropy against float64: options, reductions, gradients formed early or late."""

import numpy as np
import pytest
import torch
from cases import CASES, DTYPES, Case, assert_gradients, bound, draws, eager_logits, make, runners
from torch.utils._python_dispatch import TorchDispatchMode

from vig_kernels import linear_cross_entropy, reference
from vig_kernels.kernels.torch import linear_cross_entropy as linear_cross_entropy_torch
from vig_kernels.kernels.torch import linear_nll as linear_nll_torch
from vig_kernels.problem import HeadProblem, Needs, Saved, Upstream

every = pytest.mark.parametrize(("backend", "device"), runners("linear_cross_entropy"))
PLAIN = Case("plain", N=9, D=16, V=50, bias=True)


def losses(inputs, options, backend):
    args = (inputs.hidden, inputs.weight, inputs.target)
    return linear_cross_entropy(*args, **inputs.options, **options, backend=backend), exact_loss(
        inputs, options
    )


def exact_loss(inputs, options):
    options = {k: v for k, v in options.items() if k not in ("memory", "num_kept")}
    return reference.linear_cross_entropy(
        inputs.hidden, inputs.weight, inputs.target, **inputs.options, **options
    )


def eager_loss(inputs, token_weight, z_loss, reduction):
    """Same-dtype eager PyTorch: the yardstick of the gradients' error."""
    log_z = eager_logits(inputs)
    lse = log_z.logsumexp(-1)
    ignore_index = inputs.options.get("ignore_index", -100)
    valid = inputs.target != ignore_index
    nll = torch.nn.functional.cross_entropy(log_z, inputs.target, ignore_index=ignore_index, reduction="none")
    weight = token_weight.masked_fill(~valid, 0.0)
    total = (weight * (nll + z_loss * lse.square())).sum()
    divisor = weight.sum() if reduction == "mean" else torch.tensor(1.0)
    return total / divisor if divisor else total * 0.0


@every
@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.name != "logits-1e4"], ids=str)
def test_weighted_loss_and_gradients(case, dtype, memory, backend, device):
    found_by_draw = []
    for seed in draws(case):
        inputs, reduction = make(case, dtype, device, seed, grad=True), ("mean", "sum")[seed % 2]
        token_weight = torch.rand(case.N, generator=torch.Generator().manual_seed(3)).to(device)
        z_loss = (
            1e-3 if case.V > 1 else 0.0
        )  # with one word the rest of the gradient cancels to rounding errors
        options = {"token_weight": token_weight, "z_loss": z_loss, "reduction": reduction, "memory": memory}
        precise = inputs.double()
        found, exact = losses(inputs, options, backend)[0], exact_loss(precise, options)
        eager = eager_loss(inputs, token_weight, z_loss, reduction)
        slack = (bound(inputs) * (1 + 2e-3 * 100)).sum() if case.N else 0.0
        assert found.dtype == torch.float32 and found.shape == ()
        assert abs(found - exact) <= slack + 2e-6 * abs(exact)
        of = ((found, inputs), (exact, precise), (eager, inputs))
        found_by_draw.append(tuple(torch.autograd.grad(loss * 3.5, made.leaves()) for loss, made in of))
    assert_gradients(*found_by_draw)


@every
@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum"},
        {"num_items": 17},
        {"num_items": 2.5, "reduction": "sum"},
        {"num_items": torch.tensor(17)},
        {"num_kept": 6},
        {"z_loss": 0.01, "num_items": torch.tensor(4.0)},
    ],
    ids=str,
)
def test_divisors(options, memory, backend, device):
    inputs = make(PLAIN, torch.float32, device, grad=True)
    found, exact = losses(inputs, {**options, "memory": memory}, backend)
    torch.testing.assert_close(found, exact.float())
    for mine, truth in zip(
        torch.autograd.grad(found, inputs.leaves()), torch.autograd.grad(exact, inputs.leaves()), strict=True
    ):
        torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-6)


@every
@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_to_learn(dtype, memory, backend, device):
    zeros = torch.zeros(9, device=device)
    for change in (
        {"ignored": "all"},
        {"N": 0, "ignored": "none"},
        {"options": {"num_items": 0}},
        {"options": {"num_items": torch.tensor(0)}},
        {"options": {"token_weight": zeros}},
    ):
        options = change.pop("options", {})
        inputs = make(
            Case("empty", **{"N": 9, "D": 16, "V": 50, "bias": True} | change), dtype, device, grad=True
        )
        args = (inputs.hidden, inputs.weight, inputs.target)
        loss = linear_cross_entropy(*args, **inputs.options, **options, memory=memory, backend=backend)
        loss.backward()
        assert loss.item() == 0.0
        assert all(leaf.grad is not None and not leaf.grad.any() for leaf in inputs.leaves())


@every
def test_no_reduction_takes_any_upstream(backend, device):
    inputs = make(PLAIN, torch.float32, device, grad=True)
    token_weight = torch.rand(9, device=device, requires_grad=True)
    found, exact = losses(inputs, {"reduction": "none", "token_weight": token_weight, "z_loss": 0.1}, backend)
    assert found.shape == (9,) and (found[inputs.target == -100] == 0).all()
    torch.testing.assert_close(found, exact.float())
    upstream = torch.randn(9, device=device)
    leaves = [*inputs.leaves(), token_weight]
    for mine, truth in zip(
        torch.autograd.grad(found, leaves, upstream),
        torch.autograd.grad(exact, leaves, upstream.double()),
        strict=True,
    ):
        torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-6)


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_twice_gives_twice_the_gradient(dtype, backend, device):
    inputs = make(PLAIN, dtype, device, grad=True)
    args = (inputs.hidden, inputs.weight, inputs.target)
    loss = linear_cross_entropy(*args, **inputs.options, z_loss=0.01, backend=backend)
    loss.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in inputs.leaves()]
    loss.backward()
    assert all(torch.equal(leaf.grad, 2 * first) for leaf, first in zip(inputs.leaves(), once, strict=True))


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("memory", ["fast", "low"])
def test_differentiating_twice_raises(memory, dtype, backend, device):
    inputs = make(PLAIN, dtype, device, grad=True)
    loss = linear_cross_entropy(
        inputs.hidden, inputs.weight, inputs.target, **inputs.options, memory=memory, backend=backend
    )
    (gradient,) = torch.autograd.grad(loss, inputs.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd"):
        torch.autograd.grad(gradient.sum() + inputs.hidden.square().sum(), inputs.hidden)


@every
def test_small_float16_gradients_survive_loss_scaling(backend, device):
    """1/num_items and the scaler's 65536 meet in float32, ahead of the one cast."""
    inputs = make(Case("scaled", N=6, D=16, V=50, ignored="none"), torch.float16, device, grad=True)
    args = (inputs.hidden, inputs.weight, inputs.target)
    plain, _ = torch.autograd.grad(linear_cross_entropy(*args, backend=backend), inputs.leaves())
    tiny, _ = torch.autograd.grad(
        linear_cross_entropy(*args, num_items=1e7, backend=backend) * 65536.0, inputs.leaves()
    )
    torch.testing.assert_close(tiny.float(), plain.float() * (6 * 65536.0 / 1e7), rtol=2e-3, atol=1e-6)
    many = torch.full((6,), 1e6, device=device)  # the sum alone is beyond float16
    mean, _ = torch.autograd.grad(
        linear_cross_entropy(*args, token_weight=many, num_items=6e6, backend=backend), inputs.leaves()
    )
    torch.testing.assert_close(mean, plain, rtol=2e-3, atol=1e-6)


def test_formed_gradients_are_handed_out_without_a_copy():
    """For float32 the sums of the forward become the gradients: nothing of their size is allocated again."""
    inputs = make(Case("big", N=4, D=64, V=4000), torch.float32, grad=True)
    loss = linear_cross_entropy(inputs.hidden, inputs.weight, inputs.target, backend="torch")
    node = loss.grad_fn
    held = node.grads[0][1].data_ptr()  # not the tensor: the engine copies what is shared
    loss.backward()
    assert inputs.weight.grad.data_ptr() == held
    assert not node.grads, "a loss kept for the log would keep the sums alive"


class ProductCounter(TorchDispatchMode):
    """Operations of the matrix products run under it."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.addmm_, torch.ops.aten.mm, torch.ops.aten.addmm):
            left, right = args[-2:]
            self.total += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


def test_products_are_counted():
    """Three products for a formed gradient, two with a frozen weight or hidden, none for ignored rows."""
    inputs = make(Case("count", N=12, D=16, V=100), torch.float32)
    kept = int((inputs.target >= 0).sum())
    product = 2 * kept * 16 * 100
    head = HeadProblem(inputs.hidden, inputs.weight, inputs.target)

    def flops(call):
        with ProductCounter() as counter:
            call()
        return counter.total / product

    def form(needs):
        return linear_cross_entropy_torch.forward_backward(head, None, 0.0, Needs(*needs))

    def recompute(needs):
        ones = torch.ones(12)
        return linear_nll_torch.backward(Upstream(ones), Saved(ones), head, Needs(*needs))

    assert flops(lambda: linear_nll_torch.forward(head, ())) == 1
    assert flops(lambda: form((True, True, False))) == 3
    assert flops(lambda: form((True, False, False))) == flops(lambda: form((False, True, False))) == 2
    assert flops(lambda: recompute((True, True, False))) == 3
    assert flops(lambda: recompute((False, True, False))) == 2


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_num_kept_must_be_right(memory):
    inputs = make(PLAIN, torch.float32, grad=True)
    args = (inputs.hidden, inputs.weight, inputs.target)
    with pytest.raises(ValueError, match="num_kept=5, but target has 6 rows"):
        linear_cross_entropy(*args, num_kept=5, memory=memory, backend="torch")
    with pytest.raises(ValueError, match="num_kept=10 is not in"):
        linear_cross_entropy(*args, num_kept=10, backend="torch")


def test_reference_passes_gradcheck():
    draw = torch.Generator().manual_seed(1)
    leaves = [
        torch.randn(*s, generator=draw, dtype=torch.float64).requires_grad_() for s in ((4, 3), (6, 3), (6,))
    ]
    target = torch.tensor([0, 5, -100, 2])
    token_weight = torch.rand(4, generator=draw)

    def loss(hidden, weight, bias):
        return reference.linear_cross_entropy(
            hidden, weight, target, bias=bias, token_weight=token_weight, z_loss=0.1, logit_softcap=2.0
        )

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("memory", ["fast", "low"])
@every
def test_defaults_of_torch_change_nothing(memory, backend, device):
    hidden, weight = torch.randn(37, 24, device=device), torch.randn(51, 24, device=device)
    target = torch.arange(37, device=device)

    def everything():
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss = linear_cross_entropy(*leaves, target, memory=memory, backend=backend)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    expected = everything()
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.bfloat16, torch.float64):
            torch.set_default_dtype(dtype)
            assert all(map(torch.equal, everything(), expected))
    finally:
        torch.set_default_dtype(before)
    if backend != "reference":
        with torch.device("meta"):
            assert all(map(torch.equal, everything(), expected))


@pytest.mark.parametrize("memory", ["fast", "low"])
@every
def test_targets_and_weights_of_any_stride_and_any_weight_of_ignored_rows(memory, backend, device):
    hidden, weight = torch.randn(37, 24, device=device).requires_grad_(), torch.randn(51, 24, device=device)
    target = torch.arange(37, device=device)
    target[::5] = -100
    row_weight = torch.rand(37, device=device)
    found = []
    for spaced in (False, True):
        if spaced:
            row_weight[::5] = float("nan")
            target, row_weight = (x[:, None].repeat(1, 2)[:, 0] for x in (target, row_weight))
        loss = linear_cross_entropy(
            hidden, weight, target, token_weight=row_weight, memory=memory, backend=backend
        )
        found.append((loss.detach(), *torch.autograd.grad(loss, hidden)))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("memory", ["fast", "low"])
@every
def test_rows_of_weight_zero_may_hold_anything(memory, backend, device):
    hidden, weight = torch.randn(37, 24, device=device), torch.randn(51, 24, device=device).requires_grad_()
    target = torch.arange(37, device=device)
    row_weight = torch.rand(37, device=device)
    row_weight[::3] = 0.0
    clean, spoiled = hidden.clone(), hidden.clone()
    spoiled[::3] = float("nan")
    found = [
        (
            loss := linear_cross_entropy(
                x.requires_grad_(), weight, target, token_weight=row_weight, memory=memory, backend=backend
            )
        ).detach()
        for x in (clean, spoiled)
        for _ in [0]
    ]
    assert torch.equal(*found)
    grad_hidden, grad_weight = torch.autograd.grad(loss, (spoiled, weight))
    assert grad_weight.isfinite().all() and not grad_hidden[::3].any()


@pytest.mark.parametrize("memory", ["fast", "low"])
@every
def test_a_divisor_of_zero_gives_zero_even_of_infinity(memory, backend, device):
    hidden, weight = torch.randn(5, 24, device=device).requires_grad_(), torch.randn(51, 24, device=device)
    bias = torch.zeros(51, device=device)
    bias[2] = -float("inf")
    target = torch.arange(5, device=device)
    for num_items in (0, 0.0, torch.tensor(0), torch.tensor(0.0, device=device)):
        loss = linear_cross_entropy(
            hidden, weight, target, bias=bias, num_items=num_items, memory=memory, backend=backend
        )
        assert loss.item() == 0.0


@every
@pytest.mark.parametrize("learns", [False, True], ids=["weights alone", "hidden too"])
def test_weights_that_learn_know_the_mean(learns, backend, device):
    hidden, weight = torch.randn(37, 24, device=device), torch.randn(51, 24, device=device)
    hidden.requires_grad_(learns)
    target = torch.arange(37, device=device)
    target[::5] = -100
    row_weight = torch.rand(37, device=device).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, target, token_weight=row_weight, backend=backend)
    logits = hidden.double() @ weight.double().T
    nll = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    exact = (row_weight * nll).sum() / row_weight[target != -100].sum()
    torch.testing.assert_close(loss.double(), exact.double(), rtol=1e-5, atol=1e-6)
    inputs = [row_weight, hidden] if learns else [row_weight]
    found, wanted = (torch.autograd.grad(x, inputs) for x in (loss, exact))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_arguments_of_numpy_and_of_no_sense():
    hidden, weight, target = torch.randn(4, 8), torch.randn(9, 8), torch.tensor([0, 1, -100, 3])
    plain = linear_cross_entropy(hidden, weight, target, num_items=3, num_kept=3, z_loss=0.5)
    found = linear_cross_entropy(
        hidden, weight, target, num_items=np.int64(3), num_kept=np.int64(3), z_loss=np.float32(0.5),
        ignore_index=np.int64(-100),
    )  # fmt: skip
    assert torch.equal(plain, found)
    for options, error, message in (
        ({"num_items": -3}, ValueError, "num_items=-3"),
        ({"num_items": torch.tensor(3 + 1j)}, TypeError, "real num_items"),
        ({"ignore_index": 2**70}, ValueError, "64 bits"),
        ({"logit_softcap": 1e-46}, ValueError, "1e-46"),
    ):
        with pytest.raises(error, match=message):
            linear_cross_entropy(hidden, weight, target, **options)


@pytest.mark.parametrize("num_items", [-3, -3.0, torch.tensor(-3), torch.tensor(float("nan"))], ids=str)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_divisor_that_makes_no_sense_is_refused(num_items, backend):
    inputs = make(PLAIN, torch.float32)
    with pytest.raises(ValueError, match=r"num_items=\S+ is (negative|not a finite number)"):
        linear_cross_entropy(
            inputs.hidden, inputs.weight, inputs.target, num_items=num_items, backend=backend
        )


def test_reference_of_ignored_rows_under_a_bias_of_minus_infinity():
    """Values and gradients are 0, whatever the bias holds."""
    leaves = [torch.randn(3, 4).requires_grad_(), torch.randn(6, 4).requires_grad_()]
    leaves.append(torch.full((6,), float("-inf")).requires_grad_())
    hidden, weight, bias = leaves
    loss = linear_cross_entropy(
        hidden, weight, torch.full((3,), -100), bias=bias, z_loss=0.1, backend="reference"
    )
    assert loss == 0 and not any(gradient.any() for gradient in torch.autograd.grad(loss, leaves))


STATS = ("nll", "lse", "entropy", "argmax")


@every
@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.name != "logits-1e4"], ids=str)
def test_statistics_beside_the_loss(case, dtype, memory, backend, device):
    """Within the promise of linear_nll; loss and gradients keep their bits; a row of weight 0 counts as ignored."""
    inputs = make(case, dtype, device, grad=True)
    token_weight = torch.rand(case.N, generator=torch.Generator().manual_seed(3)).to(device)
    token_weight[1:2] = 0.0
    options = {"token_weight": token_weight, "z_loss": 1e-3}
    plain = losses(inputs, options | {"memory": memory}, backend)[0]
    (loss, found), (_, exact) = (
        call(inputs.hidden, inputs.weight, inputs.target, **inputs.options, **options, stats=STATS, **more)
        for call, more in (
            (linear_cross_entropy, {"memory": memory, "backend": backend}),
            (reference.linear_cross_entropy, {}),
        )
    )
    assert torch.equal(loss, plain)
    for mine, theirs in zip(
        torch.autograd.grad(loss, inputs.leaves()), torch.autograd.grad(plain, inputs.leaves()), strict=True
    ):
        assert torch.equal(mine, theirs)
    assert list(found) == list(STATS) and not any(value.requires_grad for value in found.values())
    allowed = bound(inputs)
    for name in STATS[:3]:
        assert found[name].dtype == torch.float32
        assert ((found[name].double() - exact[name]).abs() <= allowed).all(), name
    kept = exact["argmax"] >= 0
    logits = reference.linear_logits(inputs.hidden, inputs.weight, **without(inputs.options, "ignore_index"))
    chosen = logits[kept].gather(1, found["argmax"][kept, None])[:, 0]
    assert (logits[kept].amax(1, keepdim=False) - chosen <= 2 * allowed[kept]).all() if kept.any() else True
    assert torch.equal(found["argmax"] >= 0, kept) and not found["nll"][~kept].any()


def without(options, *names):
    return {name: value for name, value in options.items() if name not in names}


@every
def test_statistics_have_the_shape_of_the_target(backend, device):
    inputs = make(PLAIN, torch.float32, device, grad=True)
    hidden, target = inputs.hidden.reshape(3, 3, 16), inputs.target.reshape(3, 3)
    for reduction in ("mean", "none"):
        loss, found = linear_cross_entropy(
            hidden, inputs.weight, target, reduction=reduction, stats=("argmax", "nll"), backend=backend
        )
        assert {name: value.shape for name, value in found.items()} == {"argmax": (3, 3), "nll": (3, 3)}
        assert loss.shape == ((3, 3) if reduction == "none" else ())
    with pytest.raises(ValueError, match="stats='kl' is not one of 'nll', 'lse', 'entropy', 'argmax'"):
        linear_cross_entropy(hidden, inputs.weight, target, stats=("kl",))
