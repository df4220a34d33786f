"""The ops, and the backends that may run them. Without torch: command lines read it for their help.

A new backend is a package `vig_kernels/kernels/<name>/` with `why_not(device)` and one module an op, and a row here.
"""

from __future__ import annotations

from typing import NamedTuple

OPS = ("linear_nll", "linear_vig", "linear_cross_entropy", "gaussian_blur")


class Backend(NamedTuple):
    name: str
    runs_on: str  # one line for people
    package: str  # import path; has why_not(device), and a module for each op or the ops themselves


_ROWS = (
    Backend("triton", "GPUs by CUDA, ROCm or XPU: Triton kernels", "vig_kernels.kernels.triton"),
    Backend("cpu", "CPUs: compiled C++ kernels", "vig_kernels.kernels.cpu"),
    Backend("torch", "any device: chunked PyTorch, no compiler needed", "vig_kernels.kernels.torch"),
    Backend("reference", "any device with float64: the slow specification", "vig_kernels.reference"),
)


BACKENDS = {row.name: row for row in _ROWS}  # best first: "auto" takes the first that can run


def choices() -> str:
    """For help texts: auto, triton, ... or reference."""
    *most, last = "auto", *BACKENDS
    return f"{', '.join(most)} or {last}"
