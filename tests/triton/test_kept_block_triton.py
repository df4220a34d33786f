"""linear_cross_entropy in bfloat16, whose backward forms the gradients from a kept block."""

import pytest
import torch
from cases import assert_gradients
from torch.utils.checkpoint import checkpoint

from vig_kernels import linear_cross_entropy, reference
from vig_kernels.ops import linear_cross_entropy as op
from vig_kernels.ops.loss_gradients import loss_and_gradients

HEAD = {"N": 9, "D": 16, "V": 40}


def leaves(dtype=torch.bfloat16):
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(HEAD[n], HEAD["D"], generator=draw).to(dtype) for n in "NV")
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(0, 40, (9,), generator=draw)


def loss_of(hidden, weight, target, **options):
    return linear_cross_entropy(hidden, weight, target, backend="triton", **options)


def gradients(wrap=lambda function, *args: function(*args), **options):
    inputs = leaves()
    wrap(lambda *args: loss_of(*args, **options), *inputs).backward(torch.tensor(3.3))
    return [x.grad for x in inputs[:2]]


def forward_arguments(budget=1 << 28):
    hidden, weight, target = leaves()
    return (
        hidden,
        weight,
        target,
        None,
        1.0,
        None,
        -100,
        None,
        None,
        0.0,
        [True, True, False],
        budget,
        [False] * 4,
        0.125,
        None,
        "triton",
    )


def test_ops_hold_what_they_promise_to_torch():
    arguments = forward_arguments()
    torch.library.opcheck(torch.ops.vig_kernels.linear_cross_entropy.default, arguments)
    hidden, weight, *_ = arguments
    with torch.no_grad():
        *_, block, row_factor, visit = loss_and_gradients(*arguments)
    assert block.shape == (9, 48) and row_factor.shape == (9,) and visit.tolist() == [*range(9), 9]
    inputs = block, row_factor, visit, hidden.detach(), weight.detach(), torch.tensor(2.0), 0.125
    for needs_hidden in (True, False):
        op = torch.ops.vig_kernels.linear_cross_entropy_of_block.default
        torch.library.opcheck(op, (*inputs, needs_hidden, "triton"))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant):
    wrapped = gradients(lambda function, *args: checkpoint(function, *args, use_reentrant=reentrant))
    assert all(map(torch.equal, wrapped, gradients()))


def test_a_second_backward_forms_the_block_again():
    hidden, weight, target = leaves()
    loss = loss_of(hidden, weight, target)
    loss.backward(retain_graph=True)
    first = weight.grad.clone()
    loss.backward()
    assert torch.equal(weight.grad, first * 2)


def test_differentiating_twice_raises_with_hidden_frozen():
    hidden, weight, target = leaves()
    (gradient,) = torch.autograd.grad(loss_of(hidden.detach(), weight, target), weight, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        gradient.sum().backward()


def test_the_budget_decides_and_a_small_one_raises(monkeypatch):
    seen = []
    monkeypatch.setattr(op, "loss_and_gradients", lambda *a: seen.append(a[11]) or loss_and_gradients(*a))
    loss_of(*leaves())
    loss_of(*leaves(), memory=300)
    monkeypatch.setattr(op, "_fast_budget", lambda device: op.GPU_MIB << 20)  # as on a GPU
    loss_of(*leaves())
    assert seen == [256 << 20, 300 << 20, 2816 << 20]
    with pytest.raises(ValueError, match="memory=255 MiB is less than 256"):
        loss_of(*leaves(), memory=255)


def test_bits_do_not_depend_on_the_way_that_rows_are_kept():
    """num_kept told or not, and with ignored rows between: the same kept rows give the same gradients."""
    hidden, weight, target = leaves()
    found = []
    for options in ({}, {"num_kept": 7}):
        masked = target.clone()
        masked[[2, 5]] = -100
        found.append(torch.autograd.grad(loss_of(hidden, weight, masked, **options), (hidden, weight)))
    precise = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = torch.autograd.grad(reference.linear_cross_entropy(*precise, masked), precise)
    logits = torch.nn.functional.linear(hidden, weight).float()
    eager = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, masked), (hidden, weight))
    assert all(map(torch.equal, *found))
    assert_gradients((found[0], exact, eager))
