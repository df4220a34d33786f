"""Checks of the ops' arguments, which become one value. Every message shows what is wrong."""

from __future__ import annotations

import contextlib
import math
import numbers
import operator
import os

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vig_kernels.problem import HeadProblem

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
STATS = ("lse", "entropy", "argmax")
SMALLEST_CAP, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def require(condition: bool, kind: type[Exception], message: str) -> None:
    if not condition:
        raise kind(message)


def tensor(name: str, value, dtypes: tuple[torch.dtype, ...]) -> None:
    """A plain tensor of one of `dtypes`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"expected {name} to be a torch.Tensor, got {type(value).__name__} {value!r:.80}")
    if type(value).__name__ == "DTensor":
        raise TypeError(
            f"{name} is a DTensor, which this op does not shard: gather it first with {name}.full_tensor(), or "
            f"work on the local shard with {name}.to_local()"
        )
    if value.layout is not torch.strided or value.is_nested:
        raise TypeError(
            f"{name} is a {'nested' if value.is_nested else str(value.layout).removeprefix('torch.')} tensor: "
            f"pass a dense one, {name}.to_dense() or one row after another"
        )
    if value.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        fitting = torch.float32 if torch.float32 in dtypes else dtypes[0]
        raise TypeError(
            f"expected {name} of dtype {names}, got {str(value.dtype).removeprefix('torch.')}: call "
            f"{name}.to({fitting})"
        )


def flag(name: str, value, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")


def stats(value, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """Names of statistics."""
    if isinstance(value, str):
        raise TypeError(f"expected stats to be a tuple such as ({value!r},), got the string {value!r}")
    if not isinstance(value, (tuple, list)):
        raise TypeError(
            f"expected stats to be a tuple such as ({allowed[0]!r},), got {type(value).__name__} {value!r:.80}"
        )
    for name in value:
        flag("stats", name, allowed)
    return tuple(value)


def number(name: str, value, *, positive: bool = False) -> float:
    # comparisons, not math.isfinite: torch.compile passes numbers that vary from call to call as symbols
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"expected {name} to be a number, got {type(value).__name__} {value!r:.80}")
    if not -math.inf < value < math.inf or (positive and value <= 0):
        raise ValueError(f"{name}={value!r} is not a finite {'positive ' if positive else ''}number")
    return float(value)


def integer(name: str, value) -> int:
    """A Python or NumPy integer that fits 64 bits."""
    if isinstance(value, bool) or not (isinstance(value, int) or hasattr(value, "__index__")):
        raise TypeError(f"expected {name} to be an int, got {type(value).__name__} {value!r:.80}")
    value = value if isinstance(value, int) else operator.index(value)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}={value} does not fit 64 bits")
    return value


def softcap(value) -> float | None:
    """None, or a cap that float32 can hold."""
    if value is None:
        return None
    cap = number("logit_softcap", value, positive=True)
    if not SMALLEST_CAP <= cap <= LARGEST:
        raise ValueError(
            f"logit_softcap={value!r} is not in [{SMALLEST_CAP:.3g}, {LARGEST:.3g}], float32's range"
        )
    return cap


def scale(value) -> float:
    """A factor that float32 can hold."""
    factor = number("logit_scale", value)
    if not -LARGEST <= factor <= LARGEST:
        raise ValueError(f"logit_scale={value!r} is beyond {LARGEST:.3g}, the end of float32's range")
    return factor


FORWARD_MODE_CURE = "differentiate with backward() or torch.autograd.grad, or take backend='reference'"


def forward_mode(*tensors: Tensor | None, cure: str = FORWARD_MODE_CURE) -> None:
    """RuntimeError for dual tensors: custom ops would drop their tangents and give derivatives of 0."""
    if forward_ad._current_level < 0:
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(
            f"forward-mode differentiation (torch.func.jvp, dual tensors) is not supported here: {cure}"
        )


def transforms(*tensors: Tensor | None) -> None:
    """RuntimeError for tensors that torch.func.grad, vjp or jacrev differentiates, and for dual ones.

    Custom ops have no rule for the transforms; PyTorch's own message does not say what to do instead.
    """
    forward_mode(*tensors)
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return
    if not torch.is_grad_enabled():
        return
    if any(t is not None and torch._C._functorch.is_gradtrackingtensor(_beneath_vmap(t)) for t in tensors):
        raise RuntimeError(
            "torch.func.grad, vjp and jacrev are not supported here: differentiate with backward() or "
            "torch.autograd.grad (inside torch.func.vmap or with is_grads_batched=True for many upstream gradients), "
            "or take backend='reference'"
        )


def is_batched(value: Tensor) -> bool:
    """Whether it stands for many tensors at once: under torch.vmap, or (an older kind) under is_grads_batched."""
    return torch._C._functorch.is_batchedtensor(value) or torch._C._functorch.is_legacy_batchedtensor(value)


def _beneath_vmap(value: Tensor) -> Tensor:
    while torch._C._functorch.is_batchedtensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value


def wants_grad(value: Tensor | None) -> bool:
    """Whether autograd may ask for its gradient. Inside torch.vmap the tensor beneath says so, not its wrapper."""
    if value is None:
        return False
    if value.requires_grad or torch.compiler.is_compiling():
        return value.requires_grad
    return torch._C._are_functorch_transforms_active() and _beneath_vmap(value).requires_grad


_autocast_kinds: dict[str, bool] = {}  # kinds of devices that have it
NOTHING = contextlib.nullcontext()


@torch.compiler.assume_constant_result  # torch 2.8 does not trace into it
def _has_autocast(kind: str) -> bool:
    if kind not in _autocast_kinds:
        _autocast_kinds[kind] = torch.amp.is_autocast_available(kind)
    return _autocast_kinds[kind]


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in the dtype that F.linear would use under the autocast in force."""
    kind = tensors[0].device.type
    if not _has_autocast(kind) or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t is None else t.to(dtype) for t in tensors)


def no_autocast(device: torch.device):
    """A context in which autocast leaves products alone."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else NOTHING


def linear(
    hiddens: dict[str, Tensor],
    weight,
    target,
    *,
    bias,
    logit_scale,
    logit_softcap,
    ignore_index,
    least_rows=1,
) -> tuple[HeadProblem, ...]:
    """Check the arguments of a linear op, apply autocast and flatten to (N, D): a problem for each hidden.

    least_rows: of the weight; a rank of a sharded head may hold none.
    """
    options = (
        scale(logit_scale),
        softcap(logit_softcap),
        integer("ignore_index", ignore_index),
    )
    for name, hidden in hiddens.items():
        tensor(name, hidden, FLOATS)
        require(hidden.ndim >= 1, ValueError, f"expected {name} (..., D), got a 0-d tensor")
    tensor("weight", weight, FLOATS)
    tensor("target", target, (torch.int64, torch.int32))
    if bias is not None:
        tensor("bias", bias, FLOATS)

    first_name, first = next(iter(hiddens.items()))
    width = first.shape[-1]
    if weight.ndim != 2 or weight.shape[1] != width or weight.shape[0] < least_rows or width == 0:
        raise ValueError(
            f"expected weight (V, {width}) to fit {first_name} {tuple(first.shape)} with V and D at least 1, got "
            f"{tuple(weight.shape)}"
            + (" (a ZeRO-3 shard? gather the weight first)" if weight.numel() == 0 else "")
        )
    for name, hidden in hiddens.items():
        if hidden.shape != first.shape:
            raise ValueError(
                f"expected {name} {tuple(first.shape)} as {first_name}, got {tuple(hidden.shape)}"
            )
    if target.shape != first.shape[:-1]:
        raise ValueError(
            f"expected target {tuple(first.shape[:-1])} to fit {first_name} {tuple(first.shape)}, got "
            f"{tuple(target.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"expected bias ({weight.shape[0]},), got {tuple(bias.shape)}")

    *cast, weight, bias = autocast(*hiddens.values(), weight, bias)
    for name, hidden in zip(hiddens, cast, strict=True):
        if hidden.dtype != weight.dtype:
            raise TypeError(
                f"expected {name} and weight of one dtype, got {hidden.dtype} and {weight.dtype}: call "
                f"{name}.to(weight.dtype), or run under torch.autocast, which casts both"
            )
    for name, value in (*zip(hiddens, cast, strict=True), ("target", target), ("bias", bias)):
        if value is not None and value.device != weight.device:
            raise ValueError(
                f"expected {name} on {weight.device} with weight, got {value.device}: call {name}.to(weight.device)"
            )
    bias = None if bias is None else bias.contiguous()
    flat_target = target if target.ndim == 1 else target.reshape(-1)
    shared = rows(weight), flat_target.long(), bias, *options
    problems = []
    for hidden in cast:
        flat = hidden if hidden.ndim == 2 else hidden.reshape(-1, width)
        problems.append(HeadProblem(rows(flat), *shared))
    return tuple(problems)


def in_shape(values: Tensor, shape: torch.Size) -> Tensor:
    """(N,) values of rows in the shape of the caller's rows."""
    return values if len(shape) == 1 else values.reshape(shape)


def rows(matrix: Tensor) -> Tensor:
    """The matrix with unit last stride; rows may lie any distance apart."""
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def on_cpu(value: Tensor) -> bool:
    """Whether its values can be looked at without a wait for a device."""
    return value.is_cpu


def looks_at_values(target: Tensor) -> bool:
    """Whether targets are read back to be checked: on a CPU, elsewhere with VIG_CHECK_TARGETS=1."""
    return on_cpu(target) or os.environ.get("VIG_CHECK_TARGETS") == "1"


def target_range(problem: HeadProblem, vocabulary: int | None = None) -> None:
    """ValueError for the first target outside [0, V), counted over the flattened rows; V of the weight where not given.

    Reading values back would stall a GPU, so there the check runs only with VIG_CHECK_TARGETS=1. A compiled graph
    cannot branch on them: the ops check when they run, the compiled reference leaves it to its gather.
    """
    if torch.compiler.is_compiling():
        return
    target, ignore_index = problem.target, problem.ignore_index
    vocabulary = problem.weight.shape[0] if vocabulary is None else vocabulary
    if not looks_at_values(target):
        return
    fine = (target.clamp(0, vocabulary - 1) == target) | (target == ignore_index)
    if not bool(fine.all()):
        at = int((~fine).nonzero()[0])
        raise ValueError(
            f"target[{at}] = {int(target[at])} is not in [0, {vocabulary}) and is not ignore_index={ignore_index}"
        )


def num_kept(problem: HeadProblem) -> None:
    """ValueError for a wrong number of kept rows, where looking costs no wait for a GPU."""
    if problem.num_kept is None or not on_cpu(problem.target):
        return
    found = int((problem.target != problem.ignore_index).sum())
    if problem.num_kept != found:
        raise ValueError(f"num_kept={problem.num_kept}, but target has {found} rows that are not ignored")
