"""The ops inside PyTorch's machinery: opcheck, torch.compile, autocast, checkpointing, GradScaler."""

import pytest
import torch
from cases import runners
from torch.utils.checkpoint import checkpoint

from vig_kernels import gaussian_blur, linear_cross_entropy, linear_nll, linear_vig

OPS = torch.ops.vig_kernels
TARGET = torch.tensor([1, 49, -100, 7, 0, 3, -100])
BACKENDS = [backend for backend, device in runners("linear_cross_entropy") if device == "cpu"]


def leaves(dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = ((7, 16), (50, 16), (50,))
    return [torch.randn(shape, generator=draw).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_linear_ops(dtype, backend):
    hidden, weight, bias = leaves(dtype)
    head = (hidden, weight, TARGET, bias, 0.7, 5.0, -100)
    torch.library.opcheck(OPS.linear_nll.default, (*head, None, [True] * 4, backend))
    torch.library.opcheck(OPS.linear_nll.default, (*head, 5, [True, False, False, True], backend))
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in head]
    torch.library.opcheck(
        OPS.linear_vig.default, (*detached, None, detached[0] + 1, [True, False, True, True, False], backend)
    )
    more = torch.rand(7), 0.1, [True] * 3, 1 << 28, [True, False, True, True]
    torch.library.opcheck(
        OPS.linear_cross_entropy.default,
        (*head, 5, *more, 0.5, torch.tensor(2.0), backend),  # a divisor of 1: others scale results in place
    )


@pytest.mark.parametrize("backend", [b for b, device in runners("gaussian_blur") if device == "cpu"])
def test_opcheck_of_blur(backend):
    images, sigma = torch.rand(2, 3, 9, 8), torch.tensor([1.0, 2.0], dtype=torch.float64)
    options = (sigma, sigma, 3.0, "reflect", "float32", backend)
    torch.library.opcheck(OPS.gaussian_blur.default, (images, *options))
    torch.library.opcheck(OPS.gaussian_blur_out.default, (images, *options, torch.empty_like(images)))


def objective(hidden, weight, bias, backend):
    """All linear ops on one graph."""
    hidden = torch.tanh(hidden)
    loss, logged = linear_cross_entropy(
        hidden, weight, TARGET, bias=bias, z_loss=1e-2, num_items=9, stats=("entropy",), backend=backend
    )
    nll, values = linear_nll(
        hidden, weight, TARGET, bias=bias, stats=("lse", "entropy", "argmax"), backend=backend
    )
    vig = linear_vig(hidden, hidden * 0.5, weight, TARGET, backend=backend).vig
    upstream = torch.arange(7.0)
    return (
        3 * loss
        + (nll * upstream).sum()
        + (values["entropy"] * upstream).sum()
        + values["lse"].sum()
        + vig.sum()
        + logged["entropy"].sum()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_compiles_whole_forward_and_backward(dtype, backend):
    torch._dynamo.reset()
    inputs = leaves(dtype)
    eager = objective(*inputs, backend)
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")(*inputs, backend)
    torch.testing.assert_close(compiled, eager)
    for mine, truth in zip(
        torch.autograd.grad(compiled, inputs), torch.autograd.grad(eager, inputs), strict=True
    ):
        torch.testing.assert_close(mine, truth)


def test_blur_compiles_whole():
    images, sigma = torch.rand(2, 3, 9, 8), torch.tensor([1.0, 2.0])

    def both(images, sigma):
        out = torch.empty_like(images)
        gaussian_blur(images, 2.0, out=out)
        return out + gaussian_blur(images, sigma)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images, sigma), both(images, sigma))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_activation_checkpointing(dtype, use_reentrant, backend):
    inputs = leaves(dtype)
    expected = torch.autograd.grad(objective(*inputs, backend), inputs)
    checkpoint(objective, *inputs, backend, use_reentrant=use_reentrant).backward()
    for leaf, truth in zip(inputs, expected, strict=True):
        torch.testing.assert_close(leaf.grad, truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_as_linear_does(backend):
    hidden, weight, bias = leaves()
    low = [t.detach().bfloat16() for t in (hidden, weight, bias)]
    expected = linear_nll(*low[:2], TARGET, bias=low[2], backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nll = linear_nll(hidden, weight, TARGET, bias=bias, backend=backend)
        mixed = linear_nll(low[0], weight, TARGET, bias=bias, backend=backend)
        loss = linear_cross_entropy(hidden, weight, TARGET, bias=bias, backend=backend)
        vig = linear_vig(hidden, hidden, weight, TARGET, bias=bias, backend=backend)
        loss.backward()
    assert nll.dtype == torch.float32
    for found in (nll, mixed, vig.nll_image):
        assert torch.equal(found.detach(), expected)
    assert all(t.grad.dtype == torch.float32 and t.grad.any() for t in (hidden, weight, bias))
    exact = linear_nll(hidden, weight, TARGET, bias=bias, backend=backend)
    assert not torch.equal(exact, expected), "outside of autocast nothing is rounded"


@pytest.mark.parametrize("backend", BACKENDS)
def test_products_stay_float32_inside_autocast(backend):
    """The inputs are cast; the work inside the op is not."""
    hidden, weight, _ = leaves(torch.bfloat16)
    expected = linear_nll(hidden, weight, TARGET, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_nll(hidden, weight, TARGET, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_scaler(backend):
    """A scaled step equals the plain one, and an overflow skips the step."""
    steps = {}
    for scaled in (False, True):
        hidden, weight, bias = leaves()
        optimizer = torch.optim.SGD([weight], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=65536.0, enabled=scaled)
        with torch.autocast("cpu", dtype=torch.float16):
            loss = linear_cross_entropy(hidden, weight, TARGET, bias=bias, backend=backend)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        steps[scaled] = weight.detach().clone()
    torch.testing.assert_close(steps[True], steps[False], rtol=1e-3, atol=1e-5)

    hidden, weight, bias = leaves()
    before = weight.detach().clone()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = linear_cross_entropy(hidden, weight, TARGET, bias=bias, backend=backend)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weight.detach(), before) and scaler.get_scale() < 2.0**60


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_compiled_steps_take_other_counts_without_end(memory):
    torch._dynamo.reset()

    def step(hidden, weight, target, num_items, num_kept):
        return linear_cross_entropy(
            hidden, weight, target, num_items=num_items, num_kept=num_kept, memory=memory, backend="torch"
        )

    compiled = torch.compile(step, fullgraph=True)
    hidden, weight = torch.randn(40, 8).requires_grad_(), torch.randn(9, 8)
    for kept in range(20, 32):
        target = torch.arange(40) % 9
        target[kept:] = -100
        found, exact = (f(hidden, weight, target, 100 + kept, kept) for f in (compiled, step))
        torch.testing.assert_close(found, exact)
        torch.testing.assert_close(*(torch.autograd.grad(x, hidden)[0] for x in (found, exact)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_through_vmap(backend):
    """Inside vmap a tensor does not say that it requires grad."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 7, 16, generator=draw), torch.randn(50, 16, generator=draw)

    def one(hidden, weight, token_weight):
        loss = linear_cross_entropy(hidden, weight, TARGET, z_loss=0.1, backend=backend)
        weighted = linear_cross_entropy(hidden, weight, TARGET, token_weight=token_weight, backend=backend)
        nll, values = linear_nll(hidden, weight, TARGET, stats=("entropy",), backend=backend)
        return loss + weighted + (nll * values["entropy"]).sum()

    inputs = [x.requires_grad_() for x in (hidden, weight, torch.rand(3, 7, generator=draw))]
    batched = torch.vmap(one, in_dims=(0, None, 0))(*inputs)
    each = torch.stack([one(hidden, weight, row) for hidden, row in zip(inputs[0], inputs[2], strict=True)])
    torch.testing.assert_close(batched, each)
    upstream = torch.tensor([1.0, -2.0, 0.5])
    for mine, truth in zip(*(torch.autograd.grad(x, inputs, upstream) for x in (batched, each)), strict=True):
        torch.testing.assert_close(mine, truth)
