"""What every Triton op asks before it launches: target, precision and operands."""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


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
    nvidia = target_of(weight.device).startswith("sm_")
    return "tf32x3" if weight.dtype == torch.float32 and nvidia else "ieee"


def fast_exp2(device: torch.device) -> bool:
    """Whether the device has ex2.approx.ftz, one instruction; elsewhere, and in the interpreter, tl.exp2."""
    return target_of(device).startswith("sm_")


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


def load_options(weight: Tensor, config, *hidden: Tensor) -> dict:
    """How the loop over D loads: constants of the head kernels.

    EVEN_K: D is a multiple of BLOCK_K, so that nothing is masked. DESCRIPTOR: the weight comes through a tensor
    descriptor. UNIT: D and all row strides are multiples of so many elements: 16 bytes, or 1. Triton itself looks for
    multiples of 16 elements, and loads single elements where it finds none.
    """
    D, unit = weight.shape[1], 16 // weight.element_size()
    cut = D % unit or weight.stride(0) % unit or any(rows.stride(0) % unit for rows in hidden)
    return {
        "EVEN_K": D % config.block_k == 0,
        "DESCRIPTOR": config.descriptor and fits_descriptor(weight),
        "UNIT": 1 if cut else unit,
    }


def dense(*vectors: Tensor | None) -> tuple[Tensor | None, ...]:
    """One-dimensional operands, which kernels read with stride 1 (an upstream gradient is often expanded)."""
    return tuple(vector if vector is None else vector.contiguous() for vector in vectors)


def silence(rows: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """The rows, zeroed in place where they are ignored: what they hold, times a gradient of 0, may be NaN."""
    return rows.masked_fill_((target == ignore_index)[:, None], 0.0)
