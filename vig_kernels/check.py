"""Checks of the ops' arguments, and their flat form. Every message shows the value that is wrong."""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
STATS = ("lse", "entropy", "argmax")


class Flat(NamedTuple):
    """Arguments of a linear op as the backends take them."""

    hiddens: tuple[Tensor, ...]  # (N, D) each, last stride 1
    weight: Tensor  # (V, D), last stride 1
    target: Tensor  # (N,) int64
    bias: Tensor | None  # (V,)


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
    if value.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"expected {name} of dtype {names}, got {str(value.dtype).removeprefix('torch.')}")


def flag(name: str, value, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")


def number(name: str, value, *, positive: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected {name} to be a number, got {type(value).__name__} {value!r:.80}")
    if not math.isfinite(value) or (positive and value <= 0):
        raise ValueError(f"{name}={value!r} is not a finite {'positive ' if positive else ''}number")
    return float(value)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in the dtype that F.linear would use under the autocast in force."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t is None else t.to(dtype) for t in tensors)


def linear(hiddens: dict[str, Tensor], weight, target, bias, ignore_index) -> Flat:
    """Check shapes, dtypes and devices of a linear op (one hidden or two), apply autocast, flatten to (N, D)."""
    for name, hidden in hiddens.items():
        tensor(name, hidden, FLOATS)
        require(hidden.ndim >= 1, ValueError, f"expected {name} (..., D), got a 0-d tensor")
    tensor("weight", weight, FLOATS)
    tensor("target", target, (torch.int64, torch.int32))
    if bias is not None:
        tensor("bias", bias, FLOATS)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(
            f"expected ignore_index to be an int, got {type(ignore_index).__name__} {ignore_index!r}"
        )

    first_name, first = next(iter(hiddens.items()))
    width = first.shape[-1]
    if weight.ndim != 2 or weight.shape[1] != width or weight.shape[0] == 0 or width == 0:
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
            raise TypeError(f"expected {name} and weight of one dtype, got {hidden.dtype} and {weight.dtype}")
    for name, value in (*zip(hiddens, cast, strict=True), ("target", target), ("bias", bias)):
        if value is not None and value.device != weight.device:
            raise ValueError(f"expected {name} on {weight.device} with weight, got {value.device}")
    return Flat(
        hiddens=tuple(rows(hidden.reshape(-1, width)) for hidden in cast),
        weight=rows(weight),
        target=target.reshape(-1).long(),
        bias=None if bias is None else bias.contiguous(),
    )


def rows(matrix: Tensor) -> Tensor:
    """The matrix with unit last stride; rows may lie any distance apart."""
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def target_range(target: Tensor, vocabulary: int, ignore_index: int) -> None:
    """ValueError for the first target outside [0, V), counted over the flattened rows.

    Reading values back would stall a GPU, so there the check runs only with VIG_CHECK_TARGETS=1.
    """
    if target.device.type != "cpu" and os.environ.get("VIG_CHECK_TARGETS") != "1":
        return
    bad = (target != ignore_index) & ((target < 0) | (target >= vocabulary))
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"target[{at}] = {int(target[at])} is not in [0, {vocabulary}) and is not ignore_index={ignore_index}"
        )
