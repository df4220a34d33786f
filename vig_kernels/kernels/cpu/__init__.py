"""C++ kernels for CPUs, through the compiled module `vig_kernels._native`."""

from __future__ import annotations

import torch

from vig_kernels.kernels.cpu import native


def why_not(device: torch.device) -> str | None:
    """None when the compiled kernels run on tensors of `device`, else the reason and the cure."""
    if device.type != "cpu":
        return f"the cpu backend runs on CPU tensors, not on {device}: use backend='auto'"
    return native.why_not()
