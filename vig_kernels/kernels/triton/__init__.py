"""Triton kernels for GPUs, and for Triton's interpreter."""

from __future__ import annotations

import functools
import importlib

import torch

MINIMUM_CAPABILITY = (8, 0)


@functools.cache
def _missing() -> str | None:
    """Why Triton cannot be imported here, or None."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported ({error}): pip install triton"
    return None


@functools.cache
def _not_interpreted() -> str | None:
    from .launch import interpreted

    cure = "set TRITON_INTERPRET=1 before import"
    return None if interpreted() else f"Triton runs on a CPU only interpreted: {cure}"


def why_not(device: torch.device) -> str | None:
    """None when Triton kernels can run on tensors of `device`, else the reason and the cure."""
    if device.type not in ("cpu", "cuda", "xpu"):
        return f"Triton has no {device.type} target; use backend='torch'"
    if _missing() is not None:
        return _missing()
    if device.type == "cpu":
        return _not_interpreted()
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
        if capability < MINIMUM_CAPABILITY:
            return "needs compute capability 8.0 or newer, this is {}.{}".format(*capability)
    return None
