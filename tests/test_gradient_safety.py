"""Gradients of the loss that nothing disturbs: other threads, failures half way, many upstream factors at once."""

import importlib
import threading

import pytest
import torch
from cases import Case, make, runners

from vig_kernels import linear_cross_entropy, linear_nll

every = pytest.mark.parametrize(("backend", "device"), runners("linear_cross_entropy"))
memories = pytest.mark.parametrize("memory", ["fast", "low"])
PLAIN = Case("plain", N=9, D=16, V=50, bias=True)
FACTORS = (3.0, -0.5, 7.0)


def loss_of(inputs, **options):
    return linear_cross_entropy(
        inputs.hidden, inputs.weight, inputs.target, **inputs.options, reduction="sum", **options
    )


@every
def test_threads_that_differentiate_one_retained_loss(backend, device):
    """200 rounds: each of three threads gets the gradient of its own upstream factor."""
    inputs = make(Case("wide", N=16, D=64, V=2000, bias=True), torch.float32, device, grad=True)
    once = torch.autograd.grad(loss_of(inputs, backend=backend, memory="low"), inputs.leaves())
    wrong = 0
    for _ in range(200):
        loss = loss_of(inputs, backend=backend)
        ready, found = threading.Barrier(len(FACTORS)), {}

        def differentiate(factor, loss=loss, ready=ready, found=found):
            upstream = torch.tensor(factor, device=device)
            ready.wait()
            found[factor] = torch.autograd.grad(loss, inputs.leaves(), upstream, retain_graph=True)

        threads = [threading.Thread(target=differentiate, args=(factor,)) for factor in FACTORS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wrong += any(
            not torch.allclose(mine, factor * one, rtol=1e-4, atol=1e-5)
            for factor, gradients in found.items()
            for mine, one in zip(gradients, once, strict=True)
        )
        assert len(found) == len(FACTORS)
    assert wrong == 0


@every
def test_a_backward_that_fails_half_way_leaves_no_trap(backend, device, monkeypatch):
    """The first gradient is scaled, the second is not: the next backward must not scale the first one again."""
    module = importlib.import_module("vig_kernels.ops.loss_gradients")
    inputs = make(PLAIN, torch.float32, device, grad=True)
    expected = torch.autograd.grad(loss_of(inputs, backend=backend) * 3.0, inputs.leaves())
    scaled, calls = module._scaled, []

    def fail_at_the_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return scaled(*args)

    loss = loss_of(inputs, backend=backend) * 3.0
    monkeypatch.setattr(module, "_scaled", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        torch.autograd.grad(loss, inputs.leaves(), retain_graph=True)
    found = torch.autograd.grad(loss, inputs.leaves())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@every
@memories
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_upstream_factors_at_once(dtype, memory, backend, device):
    inputs = make(PLAIN, dtype, device, grad=True)
    loss = loss_of(inputs, backend=backend, memory=memory)
    factors = torch.tensor(FACTORS, device=device)
    single = [torch.autograd.grad(loss, inputs.leaves(), f, retain_graph=True) for f in factors]
    batched = torch.autograd.grad(
        loss_of(inputs, backend=backend, memory=memory), inputs.leaves(), factors, is_grads_batched=True
    )
    loss = loss_of(inputs, backend=backend, memory=memory)
    mapped = torch.func.vmap(lambda f: torch.autograd.grad(loss, inputs.leaves(), f, retain_graph=True))(
        factors
    )
    for at, leaf in enumerate(inputs.leaves()):
        wanted = torch.stack([gradients[at] for gradients in single])
        assert wanted.dtype == leaf.dtype
        assert torch.equal(batched[at], wanted) and torch.equal(mapped[at], wanted)


@every
@memories
def test_function_transforms_say_the_cure(memory, backend, device):
    inputs = make(PLAIN, torch.float32, device)

    def loss(hidden, backend=backend):
        return linear_cross_entropy(hidden, inputs.weight, inputs.target, memory=memory, backend=backend)

    def nll(hidden):
        return linear_nll(hidden, inputs.weight, inputs.target, backend=backend).sum()

    for transform in (torch.func.grad, torch.func.jacrev):
        for function in (loss, nll):
            with pytest.raises(RuntimeError, match=r"torch\.func\.grad.*torch\.autograd\.grad.*'reference'"):
                transform(function)(inputs.hidden)
    with pytest.raises(RuntimeError, match=r"torch\.autograd\.grad"):
        torch.func.vjp(loss, inputs.hidden)
    with pytest.raises(RuntimeError, match=r"torch\.autograd\.grad"):
        torch.func.vmap(torch.func.grad(loss))(torch.stack([inputs.hidden] * 2))
    with torch.no_grad():
        assert torch.func.vmap(loss)(torch.stack([inputs.hidden] * 2)).shape == (2,)
    wanted = torch.func.grad(lambda hidden: loss(hidden, backend="reference"))(inputs.hidden)
    leaf = inputs.hidden.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(found, wanted)
