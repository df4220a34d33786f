"""A device whose values lie far away: a stand-in for a GPU that writes down where a program waits for it.

Its tensors say "meta" and keep their values beside, on the CPU, so whatever runs on it gives right values. A wait is
what a GPU's host waits for: reading a value, or a shape that depends on values; a copy to the CPU; and a copy from the
CPU that is not `non_blocking`, since torch synchronises the stream after it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

FAR = torch.device("meta")
ROOT = Path(__file__).parents[1]
READS_VALUES = {  # ops whose result, or its shape, the host must know
    "aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::allclose", "aten::nonzero",
    "aten::nonzero_numpy", "aten::argwhere", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::bincount",
}  # fmt: skip


class Wait(NamedTuple):
    op: str
    where: str  # "vig/..." or "transformers/...": file and line of the innermost frame there

    @property
    def is_ours(self) -> bool:
        return self.where.startswith("vig")


class FarTensor(Tensor):
    """A tensor on the device: `near` holds its values."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor):
        layout = {"strides": near.stride(), "storage_offset": near.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(cls, near.shape, **layout, dtype=near.dtype, device=FAR)

    def __init__(self, near: Tensor):
        self.near = near

    def __repr__(self) -> str:
        return f"FarTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function} of far tensors outside of `FarDevice`")


class _Lists(TorchFunctionMode):
    """Tensors made of Python's values are made on the CPU and copied, as on a GPU; others are read for them."""

    def __init__(self, device: FarDevice):
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (Tensor.tolist, Tensor.__format__) and isinstance(args[0], FarTensor):
            if function is Tensor.tolist or not args[0].dim():
                self.device.wait(function.__name__)
            return function(args[0].near, *args[1:])
        if function is Tensor.new_tensor and isinstance(args[0], FarTensor):
            return torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype)).to(FAR)
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            values = tree_map(lambda value: value.item() if isinstance(value, FarTensor) else value, args[0])
            return function(values, **kwargs | {"device": "cpu"}).to(kwargs["device"])
        return function(*args, **kwargs)


class FarDevice(TorchDispatchMode):
    """While it lasts, device "meta" computes. `waits`: where the host waited for it; `copies`: to it."""

    def __init__(self):
        super().__init__()
        self.waits: list[Wait] = []
        self.copies = 0
        self._lists = _Lists(self)

    def __enter__(self):
        self._lists.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._lists.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        names = [argument.name for argument in function._schema.arguments]
        given = dict(zip(names, args, strict=False)) | (kwargs or {})
        far = [value for value in tree_iter(given) if isinstance(value, FarTensor)]
        to = given.get("device")
        if to is None and "other" in given and function._schema.name == "aten::to":
            to = given["other"].device
        self._note(function._schema.name, given, far, to)
        out = function(*tree_map(_near, args), **tree_map(_near, kwargs or {}))
        if to != FAR and (to is not None or not far):
            return out
        known = {id(value.near): value for value in far}

        def placed(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return known[id(value)] if id(value) in known else FarTensor(value)  # in place: the same tensor

        return tree_map(placed, out)

    def _note(self, name: str, given: dict[str, Any], far: list[FarTensor], to: torch.device | None) -> None:
        if name in ("aten::to", "aten::_to_copy") and to is not None:
            self._note_copy(name, bool(far), to == FAR, given.get("non_blocking"))
        elif name == "aten::copy_":
            target, source = (isinstance(given[place], FarTensor) for place in ("self", "src"))
            if source or given["src"].dim():  # a number is an argument of the kernel
                self._note_copy(name, source, target, given.get("non_blocking"))
        elif not far:
            return
        elif name in READS_VALUES or (name == "aten::where" and len(given) == 1):
            self.wait(name)
        elif name == "aten::repeat_interleave" and isinstance(given.get("repeats"), Tensor):
            if given.get("output_size") is None:
                self.wait(name)
        elif name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
            for index in given["indices"]:
                if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                    self.wait(f"{name} by a mask")
                elif isinstance(index, Tensor) and not isinstance(index, FarTensor):
                    self.wait(f"{name} by an index on the CPU")

    def _note_copy(self, name: str, was_far: bool, becomes_far: bool, non_blocking: bool | None) -> None:
        if was_far and not becomes_far:
            self.wait(f"{name} to the CPU")
        elif becomes_far and not was_far:
            self.copies += 1
            if not non_blocking:
                self.wait(f"{name} from the CPU")

    def wait(self, op: str) -> None:
        self.waits.append(Wait(op, next(_places(), "elsewhere")))


def _near(value: Any) -> Any:
    if isinstance(value, torch.device) and value == FAR:
        return torch.device("cpu")
    return value.near if isinstance(value, FarTensor) else value


def _places() -> Iterator[str]:
    """Innermost first: the frames that lie in the package or in transformers."""
    frame = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT / "vig") or path.is_relative_to(ROOT / "vig_kernels"):
            yield f"{path.relative_to(ROOT)}:{frame.f_lineno} {frame.f_code.co_name}"
        elif "transformers" in path.parts:
            inside = Path(*path.parts[path.parts.index("transformers") :])
            yield f"{inside}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """The model with its weights and buffers on the device, in place."""
    for part in model.modules():
        for held in (part._parameters, part._buffers):
            for name, value in held.items():
                if value is not None:
                    held[name] = FarTensor(value.detach())
    return model
