"""How ops are registered: whoever looks at ops sees them, and a call that nobody looks at gives the same."""

import functools
import warnings
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vig_kernels
from vig_kernels import gaussian_blur, linear_cross_entropy, linear_nll, linear_vig
from vig_kernels.ops.linear_nll import nll_forward_op

TARGET = torch.tensor([3, 0, -100, 8])


def leaves():
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(rows, 6, generator=draw).requires_grad_() for rows in (4, 9)]


def step(hidden, weight):
    """Loss, likelihoods, VIG and gradients of one call of each op."""
    loss, logged = linear_cross_entropy(hidden, weight, TARGET, stats=("argmax",), backend="torch")
    nll, values = linear_nll(hidden, weight, TARGET, stats=("entropy",), backend="torch")
    vig = linear_vig(hidden, -hidden, weight, TARGET, backend="torch")
    gradients = torch.autograd.grad(loss + (nll * values["entropy"]).sum(), (hidden, weight))
    return loss, logged["argmax"], nll, values["entropy"], *vig, *gradients


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **kwargs or {})


class Marked(torch.Tensor):
    """A subclass around a tensor, which notes the ops that meet it."""

    names: ClassVar[set] = set()

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        cls.names.add(function.name())
        return function(*(x.inner if isinstance(x, cls) else x for x in args), **kwargs or {})


OPS = {
    f"vig_kernels::{name}"
    for name in ("linear_nll", "linear_nll_backward", "linear_cross_entropy", "linear_vig")
}


def test_a_dispatch_mode_sees_every_op_and_changes_nothing():
    with Seen() as seen:
        found = step(*leaves())
    assert seen.names >= OPS
    assert all(map(torch.equal, found, step(*leaves())))


def test_a_profiler_sees_every_op_and_changes_nothing():
    with torch.profiler.profile() as profile:
        found = step(*leaves())
    assert {event.key for event in profile.key_averages()} >= OPS
    assert all(map(torch.equal, found, step(*leaves())))


def test_a_subclass_of_tensor_meets_the_op():
    hidden, weight = (x.detach() for x in leaves())
    found = linear_nll(Marked(hidden), weight, TARGET, backend="torch")
    assert "vig_kernels::linear_nll" in Marked.names
    assert torch.equal(found, linear_nll(hidden, weight, TARGET, backend="torch"))


def test_a_call_that_nobody_looks_at_is_the_op_itself():
    arguments = (*leaves(), TARGET, None, 1.0, None, -100, None, [True, True, True, True], "torch")
    direct, dispatched = nll_forward_op(*arguments), nll_forward_op.op(*arguments)
    assert len(direct) == len(dispatched) == 5 and all(map(torch.equal, direct, dispatched))
    differentiable = [True, True, True, False, False]  # nll, lse, entropy; argmax, lse_lo
    assert [x.requires_grad for x in direct] == [x.requires_grad for x in dispatched] == differentiable


def test_vmap_has_a_rule_and_no_warning():
    hidden, weight = (x.detach() for x in leaves())
    many = torch.stack([hidden, -hidden])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = torch.vmap(lambda h: linear_nll(h, weight, TARGET, stats=("argmax",), backend="torch"))(many)
    for at, rows in enumerate(many):
        nll, values = linear_nll(rows, weight, TARGET, stats=("argmax",), backend="torch")
        assert torch.equal(found[0][at], nll) and torch.equal(found[1]["argmax"][at], values["argmax"])


@pytest.mark.parametrize(
    ("dims", "members"), [((0, None), (0, 4, 6)), ((2, None), (4, 6, 0)), ((0, 0), (0, 4, 6))]
)
def test_vmap_of_no_members_gives_no_results(dims, members):
    weight = torch.randn(0, 9, 6) if dims[1] == 0 else torch.randn(9, 6)

    def one(hidden, weight):
        nll, values = linear_nll(hidden, weight, TARGET, stats=("argmax",), backend="torch")
        losses = linear_cross_entropy(hidden, weight, TARGET, reduction="none", backend="torch")
        return nll, values["argmax"], losses, linear_vig(hidden, -hidden, weight, TARGET, backend="torch").vig

    found = torch.vmap(one, in_dims=dims)(torch.randn(members), weight)
    assert [tuple(x.shape) for x in found] == [(0, 4)] * 4
    assert [x.dtype for x in found] == [torch.float32, torch.int64, torch.float32, torch.float32]


def test_what_has_no_derivative_says_so():
    hidden, weight = leaves()
    vig, *_ = torch.ops.vig_kernels.linear_vig(
        hidden, weight, TARGET, None, 1.0, None, -100, None, -hidden, [False] * 5, "torch"
    )
    with pytest.raises(RuntimeError, match="vig_kernels::linear_vig has no autograd formula"):
        vig.sum().backward()


# --- what the dispatcher would have resolved ---


def small(requires_grad=False):
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 16, requires_grad=requires_grad), torch.randn(50, 16)
    return hidden, weight.requires_grad_(requires_grad), torch.arange(6)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_negative_bit_is_resolved(backend):
    if why_not := vig_kernels.backends()["linear_nll", backend, "cpu"]:
        pytest.skip(why_not)
    hidden, weight, target = small()
    turned = torch._neg_view(hidden)
    assert torch.equal(
        linear_nll(turned, weight, target, backend=backend),
        linear_nll(-hidden, weight, target, backend=backend),
    )
    image = torch.rand(1, 8, 8)
    assert torch.equal(
        gaussian_blur(torch._neg_view(image), 1.0, backend=backend),
        gaussian_blur(-image, 1.0, backend=backend),
    )


def test_a_trace_before_dispatch_holds_the_op():
    from torch.fx.experimental.proxy_tensor import make_fx

    first, second = torch.rand(2, 1, 8, 8)
    traced = make_fx(lambda image: gaussian_blur(image, 1.0), pre_dispatch=True)(first)
    assert torch.equal(traced(second), gaussian_blur(second, 1.0))


def test_all_ops_have_shapes_on_meta():
    hidden, weight, target = (x.to("meta") for x in small())
    assert linear_nll(hidden, weight, target).shape == (6,)
    assert linear_vig(hidden, hidden, weight, target).vig.shape == (6,)
    assert linear_cross_entropy(hidden.requires_grad_(), weight, target, num_kept=6).shape == ()
    assert gaussian_blur(torch.empty(3, 8, 8, device="meta"), 1.0).shape == (3, 8, 8)


def test_vig_is_a_constant_under_func_grad():
    hidden, weight, target = small()
    value = linear_vig(hidden, hidden * 0.5, weight, target).vig.sum()
    found = torch.func.grad(lambda x: (x * linear_vig(x, hidden * 0.5, weight, target).vig.sum()).sum())(
        hidden
    )
    torch.testing.assert_close(found, torch.full_like(hidden, float(value)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selective_checkpointing_keeps_what_the_loss_made(dtype):
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    hidden, weight, target = small(requires_grad=True)
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
    saved = [torch.ops.vig_kernels.linear_cross_entropy.default]
    keep = functools.partial(create_selective_checkpoint_contexts, saved)

    def run(x):
        return linear_cross_entropy(torch.sin(x), weight, target)

    exact = torch.autograd.grad(run(hidden) / 4, (hidden, weight))
    loss = checkpoint(run, hidden, use_reentrant=False, context_fn=keep)
    for mine, truth in zip(torch.autograd.grad(loss / 4, (hidden, weight)), exact, strict=True):
        torch.testing.assert_close(mine, truth)


def test_a_forward_derivative_by_token_weight_is_refused():
    hidden, weight, target = small(requires_grad=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.func.jvp(
            lambda x: linear_cross_entropy(hidden, weight, target, token_weight=x, reduction="sum"),
            (torch.rand(6) + 0.1,),
            (torch.ones(6),),
        )
