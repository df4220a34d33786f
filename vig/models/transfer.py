"""Copies from the CPU that a GPU's host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. To a GPU it is copied from pinned memory, while the host goes on.

    A plain `.to` would wait until the GPU has done all that it was given before.
    """
    if value.device == device:
        return value
    if value.device.type == "cpu" and device.type == "cuda":
        value = value.pin_memory()  # torch keeps it until the copy is done
    return value.to(device, non_blocking=device.type != "mps")
