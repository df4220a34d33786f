"""Ops of torch.library, registered without the Python layers of `torch.library.custom_op`.

A call costs 5 us less for it, and 55 us less where autograd records it. What is left out is checks of what these ops
promise by themselves: results are fresh tensors, and no argument has a default.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

NAMESPACE = "vig_kernels"
PLAIN = {Tensor, torch.nn.Parameter}
_libraries: dict[str, torch.library.Library] = {}  # a registration lives as long as its library


class Derivative(NamedTuple):
    """How autograd differentiates an op."""

    inputs: tuple[int, ...]  # positions of the arguments that may have gradients
    outputs: Callable  # (arguments) -> how many of the leading results have derivatives
    save: Callable  # (ctx, arguments, results), for the backward
    backward: Callable  # (ctx, *gradients of those results) -> the gradients of `inputs`


class Op:
    """An op of this package: `torch.ops.vig_kernels.<name>`, which a call leaves out where nobody looks at ops."""

    def __init__(self, op: torch._ops.OpOverload, kernel: Callable, derivative: Derivative | None):
        self.op, self.kernel = op, kernel
        tensors = [at for at, argument in enumerate(op._schema.arguments) if "Tensor" in str(argument.type)]
        self.tensors = tuple(tensors)
        self.inputs = self.tensors if derivative is None else derivative.inputs
        self.is_gradient = derivative is None
        self.recorded = _refused(op) if derivative is None else _differentiated(op, derivative)

    def __call__(self, *args):
        if torch.compiler.is_compiling() or not self._is_unseen(args):
            return self.op(*args)
        if torch.is_grad_enabled() and self._may_need_grad(args):
            return self.recorded(self.kernel, args, [args[at] for at in self.inputs])
        return _beneath(self.kernel, args)

    def without_grad(self, *args):
        """A call whose result is not part of the graph."""
        if torch.compiler.is_compiling():
            return self.op(*(x.detach() if isinstance(x, Tensor) else x for x in args))
        if self._is_unseen(args):
            return _beneath(self.kernel, args)
        with torch.no_grad():
            return self.op(*args)

    def _is_unseen(self, args) -> bool:
        """Whether no mode, transform, profiler or subclass of Tensor would see the op between autograd and kernel."""
        if (
            torch._C._len_torch_dispatch_stack()
            or torch._ops._len_torch_dispatch_stack_pre_dispatch()
            or torch._C._are_functorch_transforms_active()
            or torch.autograd._profiler_enabled()
            or torch._C._get_tracing_state() is not None
        ):
            return False
        if self.is_gradient and any(map(_is_batched, args)):
            return False
        tensors = [args[at] for at in self.tensors]
        return all([x is None or _is_plain(x) for x in tensors])  # noqa: C419  (a list takes half the time)

    def _may_need_grad(self, args) -> bool:
        return any(args[at] is not None and args[at].requires_grad for at in self.inputs)

    def autograd_kernel(self, keys, *args):
        """What the dispatcher calls in autograd's place."""

        def below(*args):
            return self.op.redispatch(keys & torch._C._after_autograd_keyset, *args)

        if torch.is_grad_enabled() and self._may_need_grad(args):
            return self.recorded(below, args, [args[at] for at in self.inputs])
        return _beneath(below, args)


def define(
    name: str, schema: str, kernel: Callable, fake: Callable, derivative: Derivative | None = None
) -> Op:
    """Make the op `torch.ops.vig_kernels.<name>`, on every device.

    Args:
        schema: "(Tensor a, int b) -> Tensor", without defaults.
        kernel: computes the result, fresh tensors; autograd does not see what it does.
        fake: the same in shapes and dtypes alone.
        derivative: without one, differentiating the result raises: it is a gradient itself, or has none.
    """
    if name in _libraries:  # the module is loaded once more
        _libraries.pop(name)._destroy()
    library = _libraries[name] = torch.library.Library(NAMESPACE, "FRAGMENT")
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    op = Op(getattr(getattr(torch.ops, NAMESPACE), name).default, kernel, derivative)
    library.impl(name, op.autograd_kernel, "Autograd", with_keyset=True)
    torch.library.register_vmap(f"{NAMESPACE}::{name}", _one_by_one(op, fake), lib=library)
    return op


def _one_by_one(op: Op, fake: Callable) -> Callable:
    """The rule of torch.vmap: one call for each member of the batch; for none, results of no members."""

    def rule(info, in_dims, *args):
        batched = [at for at, dim in enumerate(in_dims) if isinstance(dim, int)]

        def member(take: Callable) -> list:
            return [take(x, in_dims[at]) if at in batched else x for at, x in enumerate(args)]

        if info.batch_size:
            stacked = _stacked(
                [op(*member(lambda x, dim, n=n: x.select(dim, n))) for n in range(info.batch_size)]
            )
        else:
            alike = fake(*member(lambda x, dim: x.new_empty(x.shape[:dim] + x.shape[dim + 1 :])))
            stacked = torch.utils._pytree.tree_map(lambda x: x.new_empty((0, *x.shape)), alike)
        return stacked, torch.utils._pytree.tree_map(lambda _: 0, stacked)

    return rule


def _stacked(members: list):
    """Results of one structure, tensors in tuples or lists, as one of that structure with a leading dimension."""
    if isinstance(members[0], Tensor):
        return torch.stack(members)
    return type(members[0])(_stacked(list(part)) for part in zip(*members, strict=True))


def _is_plain(value: Tensor) -> bool:
    """Whether a kernel may read it as it is: the dispatcher would have nothing to unwrap or to resolve."""
    return (
        value.__class__ in PLAIN
        and not value.is_meta
        and not value.is_neg()
        and not torch._is_zerotensor(value)
    )


def _is_batched(value) -> bool:
    """Whether it stands for many gradients at once, under is_grads_batched=True."""
    return isinstance(value, Tensor) and torch._C._functorch.is_legacy_batchedtensor(value)


def _beneath(function: Callable, args):
    """A call that autograd does not see."""
    with torch._C._AutoDispatchBelowAutograd():
        return function(*args)


def _node(op: torch._ops.OpOverload, forward: Callable, backward: Callable) -> type[torch.autograd.Function]:
    functions = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(op._schema.name.replace("::", "_"), (torch.autograd.Function,), functions)


def _differentiated(op: torch._ops.OpOverload, derivative: Derivative) -> Callable:
    """The op as a node of the graph, which knows of its differentiable inputs and results alone."""
    _, outputs, save, backward = derivative

    def forward(ctx, call, *inputs):
        function, args, rest = call
        found = _beneath(function, args)
        save(ctx, args, found)
        leading = outputs(args)
        rest += found[leading:]
        return tuple(found[:leading])

    node = _node(op, forward, lambda ctx, *grads: (None, *backward(ctx, *grads)))

    def recorded(function, args, inputs):
        rest = []
        return *node.apply((function, args, rest), *inputs), *rest

    return recorded


def _refused(op: torch._ops.OpOverload) -> Callable:
    """The op as a node whose backward raises."""

    def forward(ctx, function, args, *inputs):
        found = _beneath(function, args)
        return tuple(found) if isinstance(found, list) else found  # a node takes no list

    def refuse(ctx, *grads):
        raise RuntimeError(f"{op._schema.name} has no autograd formula: its results cannot be differentiated")

    node = _node(op, forward, refuse)
    return lambda function, args, inputs: node.apply(function, args, *inputs)
