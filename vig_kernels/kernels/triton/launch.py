"""What every Triton op asks before it launches: target, precision and operands."""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vig_kernels.problem import HeadProblem


def cdiv(a: int, b: int) -> int:
    """How many b are needed for a. triton.cdiv takes microseconds: it unwraps constants of kernels first."""
    return -(-a // b)


@functools.cache
def interpreted() -> bool:
    """Whether kernels of this process run in Triton's interpreter (TRITON_INTERPRET=1 before the first import)."""
    return bool(triton.knobs.runtime.interpret)


@functools.cache
def target_of(device: torch.device) -> str:
    """The column of the configuration table: sm_80 | sm_90 | sm_100 | gfx942 | xpu | interpreter."""
    if interpreted():
        return "interpreter"
    if device.type == "xpu":
        return "xpu"
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    # 12.x (consumer Blackwell) has neither wgmma nor tcgen05 and 99 KiB of shared memory, as 8.6 and 8.9
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


NOTHING = contextlib.nullcontext()


@functools.cache
def _is_alone(kind: str) -> bool:
    """Whether there is one device of a kind at most, which then is the current one."""
    return kind == "cpu" or getattr(torch, kind).device_count() < 2


def device_guard(device: torch.device):
    """Kernels go to the current device: make it the tensors' own."""
    kind = device.type
    return NOTHING if _is_alone(kind) else getattr(torch, kind).device(device)


def compute_precision(weight: Tensor) -> str:
    """input_precision of tl.dot: 16-bit operands are exact products either way; float32 never meets plain TF32."""
    return precision_on(target_of(weight.device), weight.dtype)


def precision_on(target: str, dtype: torch.dtype) -> str:
    return "tf32x3" if dtype == torch.float32 and target.startswith("sm_") else "ieee"


def fast_exp2(target: str) -> bool:
    """Whether the target has ex2.approx.ftz, one instruction; elsewhere, and in the interpreter, tl.exp2."""
    return target.startswith("sm_")


def aligned(hidden: Tensor) -> Tensor:
    """Hidden rows on 16-byte borders, copied where they could but do not lie so: else every kernel compiles twice,
    once with loads of single elements."""
    apart = 16 // hidden.element_size()
    if hidden.shape[1] % apart or (hidden.data_ptr() % 16 == 0 and hidden.stride(0) % apart == 0):
        return hidden
    return hidden.clone(memory_format=torch.contiguous_format)


def fits_descriptor(weight: Tensor) -> bool:
    """Whether a weight (V, D) is worth a tensor descriptor, which fills in zeros beyond D.

    It needs a 16-byte aligned base and row stride. D must be whole 16 bytes too: hidden has no descriptor, and a mask
    that cuts 16 bytes would make its loads single elements.
    """
    unit = 16 // weight.element_size()
    return weight.data_ptr() % 16 == 0 and weight.stride(0) % unit == 0 and weight.shape[1] % unit == 0


def operand(weight: Tensor, config) -> TensorDescriptor:
    """The weight (V, D) as a tensor descriptor of BLOCK_V x BLOCK_K blocks."""
    return TensorDescriptor(
        weight, list(weight.shape), list(weight.stride()), [config.block_v, config.block_k]
    )


def dense(*vectors: Tensor | None) -> tuple[Tensor | None, ...]:
    """One-dimensional operands, which kernels read with stride 1 (an upstream gradient is often expanded)."""
    return tuple([v if v is None or v.is_contiguous() else v.contiguous() for v in vectors])


def as_read(problem: HeadProblem) -> HeadProblem:
    """The problem as kernels read it: hidden's rows aligned where they can be, target and bias dense."""
    hidden, (target, bias) = aligned(problem.hidden), dense(problem.target, problem.bias)
    if hidden is problem.hidden and target is problem.target and bias is problem.bias:
        return problem
    return problem._replace(hidden=hidden, target=target, bias=bias)


def silence(rows: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """The rows, zeroed in place where they are ignored: what they hold, times a gradient of 0, may be NaN."""
    return rows.masked_fill_((target == ignore_index)[:, None], 0.0)
