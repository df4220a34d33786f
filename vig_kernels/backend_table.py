"""The ops, and the backends that may run them. Without torch: command lines read it for their help.

What a backend's package holds: vig_kernels/kernels/__init__.py.
"""

from __future__ import annotations

from typing import NamedTuple

OPS = ("linear_nll", "linear_vig", "linear_cross_entropy", "gaussian_blur")


class Backend(NamedTuple):
    name: str
    runs_on: str  # one line for people
    package: str  # import path; has why_not(device), and a module for each op or the ops themselves
    fills_values: bool = (
        True  # its linear_cross_entropy gives statistics; else linear_nll sweeps again for them
    )
    bfloat16_gradients: bool = (
        False  # linear_cross_entropy's of bfloat16 hidden and weight; all others are float32
    )
    # its linear_cross_entropy has `kept_rows` and may keep gradients of logits for the backward (kernels/__init__.py)
    keeps_block: bool = False


BACKENDS = {
    row.name: row
    for row in (
        Backend(
            "triton",
            "GPUs by CUDA, ROCm or XPU: Triton kernels",
            "vig_kernels.kernels.triton",
            fills_values=False,
            keeps_block=True,
        ),
        Backend("cpu", "CPUs: compiled C++ kernels", "vig_kernels.kernels.cpu", bfloat16_gradients=True),
        Backend("torch", "any device: chunked PyTorch, no compiler needed", "vig_kernels.kernels.torch"),
        Backend("reference", "any device with float64: the slow specification", "vig_kernels.reference"),
    )
}  # best first: "auto" takes the first that can run


def choices() -> str:
    """For help texts: auto, triton, ... or reference."""
    *most, last = "auto", *BACKENDS
    return f"{', '.join(most)} or {last}"
