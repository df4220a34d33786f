"""The only importer of the compiled CPU kernels: are they there, why not, and which instruction set they use."""

from __future__ import annotations

import functools
import importlib
import json
import os
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from vig_kernels.problem import HeadProblem, Needs

RECORD = Path(__file__).parents[2] / "_build.json"
KEPT_OUTPUT_BYTES = 8 << 20  # smaller results are left to the allocator
BUILD = (
    "install a C++20 compiler and run `pip install .` (or `pip install -e .`) in a checkout of vig-kernels"
)


@functools.lru_cache(maxsize=1)
def _load() -> tuple[ModuleType | None, str | None]:
    """The compiled module, or the reason why there is none."""
    try:
        return importlib.import_module("vig_kernels._native"), None
    except ModuleNotFoundError:
        return None, _read_record()
    except ImportError as error:
        return None, f"the compiled kernels do not load: {error}; to build them here, {BUILD}"


def _read_record() -> str:
    """What the build wrote about itself."""
    try:
        record = json.loads(RECORD.read_text())
    except (OSError, ValueError):
        return f"the CPU kernels have not been built: {BUILD}"
    if record.get("built"):
        return f"the CPU kernels were built for another Python: {BUILD}"
    return f"the CPU kernels could not be built: {record.get('reason')}; to fix it, {record.get('cure')}"


def module() -> ModuleType | None:
    """`vig_kernels._native`, or None where it was not built (see `why_not`)."""
    return _load()[0]


def why_not() -> str | None:
    """None when the compiled kernels are there; else the reason, with the cure."""
    return _load()[1]


def forced_isa() -> str:
    """The instruction set that VIG_FORCE_ISA names, "" for the machine's best. Raises ValueError if it cannot run."""
    name = os.environ.get("VIG_FORCE_ISA", "")
    native = module()
    if name and native is not None:
        try:
            native.isa(name)
        except ValueError as error:
            raise ValueError(f"VIG_FORCE_ISA={name}: {error}") from None
    return name


def isa() -> str | None:
    """Name of the instruction set in use, one of isas(), "avx512_bf16" for example; None without kernels."""
    native = module()
    return None if native is None else native.isa(forced_isa())


def isas() -> dict[str, str | None]:
    """Every instruction set of this build, best first, with None or the reason why this machine cannot run it."""
    native = module()
    return {} if native is None else native.isas()


def machine_note() -> str:
    """A remark on units of this CPU that this build leaves unused (AMX), or ""."""
    native = module()
    return "" if native is None else native.machine_note()


def peak_f32(threads: int, seconds: float = 0.2) -> float:
    """float32 operations a second of register-only multiply-adds: the ceiling of every float32 kernel here."""
    return _required().peak(forced_isa(), False, threads, seconds)


def peak_bf16(threads: int, seconds: float = 0.2) -> float:
    """The same for bfloat16 products; without a bfloat16 instruction they run, and are measured, as float32."""
    return _required().peak(forced_isa(), True, threads, seconds)


def _required() -> ModuleType:
    native, reason = _load()
    if native is None:
        raise RuntimeError(reason)
    return native


def dtype_name(tensor: Tensor) -> str:
    """float32, bfloat16, float16 or uint8, as the compiled module spells them."""
    return str(tensor.dtype).removeprefix("torch.")


def byte_strides(tensor: Tensor) -> list[int]:
    """Strides in bytes."""
    return [stride * tensor.element_size() for stride in tensor.stride()]


def head(problem: HeadProblem):
    """(compiled description of the LM head, the float32 bias that must outlive it)."""
    weight, bias = problem.weight, problem.bias
    bias = None if bias is None else bias.float().contiguous()
    described = _required().Head(
        isa=forced_isa(),
        dtype=dtype_name(weight),
        depth=weight.shape[1],
        vocab=weight.shape[0],
        weight=weight.data_ptr(),
        weight_stride=weight.stride(0) * weight.element_size(),
        bias=0 if bias is None else bias.data_ptr(),
        scale=problem.logit_scale,
        cap=problem.logit_softcap or 0.0,
    )
    return described, bias


def gradients(problem: HeadProblem, needs: Needs, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """Tensors for the gradients of hidden and weight, in `dtype`, and of the bias, in float32; None if not needed."""
    hidden, weight = problem.hidden, problem.weight
    return (
        hidden.new_zeros(hidden.shape, dtype=dtype) if needs.hidden else None,  # ignored rows are not written
        empty_gradient(weight, dtype) if needs.weight else None,
        weight.new_empty(weight.shape[0], dtype=torch.float32)
        if needs.bias and problem.bias is not None
        else None,
    )


def empty_gradient(like: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor of the shape of `like`. Large ones take the memory that an earlier one has left.

    A training step frees a gradient of the size of the weight and asks for it again: memory fresh from the system
    would be cleared first, page by page. What is kept between steps (2 GiB at most) the system may take meanwhile.
    """
    if like.numel() * dtype.itemsize < KEPT_OUTPUT_BYTES:
        return like.new_empty(like.shape, dtype=dtype)
    memory = _required().Output(like.numel() * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(like.shape)


def outputs(values: dict[str, Tensor]) -> list[int]:
    """Where linear_nll's results go: addresses of those of `values`, 0 for the others."""
    return [address(values.get(name)) for name in ("nll", "lse", "lse_lo", "entropy", "argmax", "kl")]


def rows_view(hidden: Tensor, target: Tensor) -> tuple[int, int, int, int]:
    """(address, rows, bytes from row to row, address of the targets) of hidden (N, D) and contiguous target (N,)."""
    return (
        hidden.data_ptr(),
        hidden.shape[0],
        hidden.stride(0) * hidden.element_size(),
        target.data_ptr(),
    )


def address(tensor: Tensor | None) -> int:
    """Where the data begin; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
