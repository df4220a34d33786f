"""Tiles by kernel, target, kind of number and shape class. A readable table; nothing is tuned at import.

Every row compiles without spills in its main loop on its target (`python -m benchmarks static` proves it). The
choice depends on (target, dtype, D, V), never on N, so that a value's bits do not depend on its company.
VIG_AUTOTUNE=1 times the candidates at the first call of each such key, prints what it found and keeps the fastest
for the life of the process. The rows were chosen from static counts: no GPU has timed them yet.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import triton
from torch import Tensor

from .launch import fast_exp2, fits_descriptor, precision_on, target_of

NARROW = 1024  # at D up to this the epilogue weighs as much as the main loop: smaller tiles, two to a multiprocessor


@dataclass(frozen=True)
class TileConfig:
    """One tile: BLOCK_N rows x BLOCK_V columns, BLOCK_K of the contraction at a time."""

    block_n: int
    block_v: int
    block_k: int
    num_warps: int
    num_stages: int
    parts: int = 1  # 2: the epilogue takes the tile in halves
    descriptor: bool = False  # load the weight through a tensor descriptor (TMA)
    group: int = 16  # row tiles that sweep the vocabulary together

    @property
    def launch_options(self) -> dict:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    def __str__(self):
        path = "tma" if self.descriptor else "ptr"
        tile = f"{self.block_n}x{self.block_v}x{self.block_k}"
        return f"{tile} w{self.num_warps} s{self.num_stages} p{self.parts} {path}"


T = TileConfig
P = partial(TileConfig, group=8)
INTERPRETER = T(32, 256, 64, num_warps=1, num_stages=1, parts=2, group=2)

# (kernel, target, kind): (wide, narrow). wide where D > NARROW, see `head_config`.
# fold: linear_nll and linear_vig; store: the fold of linear_cross_entropy; gradient: the recomputing backward;
# pair: KL of linear_vig, two accumulators a tile.
HEAD: dict[tuple[str, str, str], tuple[TileConfig, TileConfig]] = {
    # one tile fills a multiprocessor: 64 KiB of A and B a stage pair, the accumulator in 128 registers a thread
    ("fold", "sm_90", "16-bit"): (T(128, 256, 64, 8, 4, 2, True), T(128, 128, 64, 8, 3, 2, True)),
    ("store", "sm_90", "16-bit"): (T(128, 256, 64, 8, 4, 2, True), T(128, 128, 64, 8, 3, 2, True)),
    ("gradient", "sm_90", "16-bit"): (T(128, 128, 64, 8, 3, 2, True), T(128, 128, 64, 8, 3, 2, True)),
    # the accumulator lives in tensor memory; the epilogue fetches it in halves
    ("fold", "sm_100", "16-bit"): (T(128, 256, 64, 8, 4, 2, True), T(128, 128, 64, 8, 3, 2, True)),
    ("store", "sm_100", "16-bit"): (T(128, 256, 64, 8, 4, 2, True), T(128, 128, 64, 8, 3, 2, True)),
    ("gradient", "sm_100", "16-bit"): (T(128, 128, 64, 8, 3, 2, True), T(128, 128, 64, 8, 3, 2, True)),
    # at most 99 KiB of shared memory, so that the rows serve 8.6, 8.9 and 12.x as well
    ("fold", "sm_80", "16-bit"): (T(128, 128, 32, 8, 4, 2), T(128, 64, 32, 4, 4, 2)),
    ("store", "sm_80", "16-bit"): (T(128, 128, 32, 8, 4, 2), T(128, 64, 32, 4, 4, 2)),
    ("gradient", "sm_80", "16-bit"): (T(128, 64, 32, 4, 4, 2), T(128, 64, 32, 4, 4, 2)),
    ("fold", "gfx942", "16-bit"): (T(128, 256, 64, 8, 2, 2), T(128, 128, 64, 8, 2, 2)),
    ("store", "gfx942", "16-bit"): (T(128, 256, 64, 8, 2, 2), T(128, 128, 64, 8, 2, 2)),
    ("gradient", "gfx942", "16-bit"): (T(128, 256, 64, 8, 2, 2), T(128, 128, 64, 8, 2, 2)),
    # tf32x3 keeps three products' operands in registers: smaller tiles
    ("fold", "sm_90", "float32"): (T(128, 128, 32, 8, 3, 2, True),) * 2,
    ("store", "sm_90", "float32"): (T(128, 128, 32, 8, 3, 2, True),) * 2,
    ("gradient", "sm_90", "float32"): (T(128, 128, 16, 8, 4, 2, True),) * 2,
    ("fold", "sm_100", "float32"): (T(128, 64, 32, 8, 3, 2, True),) * 2,
    ("store", "sm_100", "float32"): (T(128, 64, 32, 8, 3, 2, True),) * 2,
    ("gradient", "sm_100", "float32"): (T(128, 64, 32, 8, 3, 2, True),) * 2,
    ("fold", "sm_80", "float32"): (T(128, 64, 32, 8, 3, 2),) * 2,
    ("store", "sm_80", "float32"): (T(128, 64, 32, 8, 3, 2),) * 2,
    ("gradient", "sm_80", "float32"): (T(128, 64, 32, 8, 3, 2),) * 2,
    ("fold", "gfx942", "float32"): (T(128, 128, 32, 8, 2, 2),) * 2,
    ("store", "gfx942", "float32"): (T(128, 128, 32, 8, 2, 2),) * 2,
    ("gradient", "gfx942", "float32"): (T(128, 128, 32, 8, 2, 2),) * 2,
    # two accumulators and two blocks of rows beside one of the weight: half the fold's columns, and half its group, so
    # that as many rows stay in L2
    ("pair", "sm_90", "16-bit"): (P(128, 128, 64, 8, 4, 2, True), P(128, 64, 64, 8, 3, 2, True)),
    ("pair", "sm_100", "16-bit"): (P(128, 128, 64, 8, 4, 2, True), P(128, 64, 64, 8, 3, 2, True)),
    ("pair", "sm_80", "16-bit"): (P(128, 64, 32, 8, 4, 2), P(64, 64, 32, 4, 4, 2)),
    ("pair", "gfx942", "16-bit"): (P(128, 128, 64, 8, 2, 2), P(128, 64, 64, 8, 2, 2)),
    ("pair", "sm_90", "float32"): (P(128, 64, 32, 8, 3, 2, True),) * 2,
    ("pair", "sm_100", "float32"): (P(128, 32, 32, 8, 3, 2, True),) * 2,
    ("pair", "sm_80", "float32"): (P(128, 64, 16, 8, 3, 2),) * 2,
    ("pair", "gfx942", "float32"): (P(128, 64, 32, 8, 2, 2),) * 2,
}

# (target, kind): for weights that fit no descriptor, whose masks take registers; see `irregular_tile`
IRREGULAR: dict[tuple[str, str], TileConfig] = {
    ("sm_90", "16-bit"): T(128, 64, 32, 8, 3, 2),
    ("sm_90", "float32"): T(128, 64, 32, 8, 3, 2),
    ("sm_100", "16-bit"): T(128, 64, 32, 8, 3, 2),
    ("sm_100", "float32"): T(128, 64, 16, 8, 3, 2),
}

# where masks of hidden, for a D that is no multiple of BLOCK_K, make the tile of the table spill
CUT: dict[tuple[str, str, str], TileConfig] = {("fold", "sm_100", "float32"): T(128, 64, 16, 8, 3, 2, True)}

# of IRREGULAR, for "pair"
IRREGULAR_PAIR: dict[tuple[str, str], TileConfig] = {
    ("sm_90", "16-bit"): P(128, 32, 32, 8, 3, 2),
    ("sm_90", "float32"): P(64, 32, 32, 4, 3, 2),
    ("sm_100", "16-bit"): P(128, 32, 32, 8, 3, 2),
    ("sm_100", "float32"): P(128, 32, 16, 8, 3, 2),
    ("sm_80", "float32"): P(128, 32, 16, 8, 3, 2),
}

# (target, kind of the products)
BLUR: dict[tuple[str, str], TileConfig] = {
    (target, kind): T(64, 64, 32, 4, 2 if target == "gfx942" else 3)
    for target in ("sm_80", "sm_90", "sm_100", "gfx942")
    for kind in ("16-bit", "float32")
}

_tuned: dict[tuple, TileConfig] = {}
_decided: dict[tuple, TileConfig] = {}  # of a GPU's heads, for the life of the process


def kind_of(dtype: torch.dtype) -> str:
    return "float32" if dtype == torch.float32 else "16-bit"


def table_target(target: str) -> str:
    """The column that serves a target: Intel GPUs take the plain pointer rows of sm_80."""
    return "sm_80" if target == "xpu" else target


def irregular_tile(kernel: str, target: str, kind: str) -> TileConfig:
    """The tile for loads with masks along D, by pointers; the narrow one where none is named."""
    table = IRREGULAR_PAIR if kernel == "pair" else IRREGULAR
    return table.get((target, kind), HEAD[kernel, target, kind][1])


def regular(D: int, fits: bool, config: TileConfig) -> bool:
    """Whether a tile can load a weight of width D as it was made to: through a descriptor, or without masks along D.

    fits: `fits_descriptor` of the weight.
    """
    return fits if config.descriptor else D % config.block_k == 0


def head_config(
    kernel: str, weight: Tensor, softcap: bool, trial: Callable[[TileConfig], object]
) -> TileConfig:
    """The tile of "fold", "store", "gradient" or "pair" for a weight (V, D). `trial` runs a candidate."""
    (V, D), target, fits = weight.shape, target_of(weight.device), fits_descriptor(weight)
    key = kernel, target, weight.dtype, V, D, fits, softcap
    if key in _decided:
        return _decided[key]
    chosen = _decide(key, trial)
    if target != "interpreter":
        _decided[key] = chosen
    return chosen


def _decide(key: tuple, trial: Callable[[TileConfig], object]) -> TileConfig:
    kernel, target, dtype, V, D, fits, softcap = key
    kind = kind_of(dtype)
    if target == "interpreter":
        chosen = INTERPRETER
    else:
        chosen = _from_table(kernel, target, kind, D, fits, softcap)
    if not autotuning():
        return chosen
    if target == "interpreter":
        candidates = [chosen, replace(chosen, parts=1)]
    else:
        candidates = [chosen, *HEAD[kernel, table_target(target), kind], *neighbours(chosen)]
    if not fits:
        candidates = [replace(config, descriptor=False) for config in candidates]
    return tuned((kernel, target, str(dtype), V, D), candidates, trial)


def _from_table(kernel: str, target: str, kind: str, D: int, fits: bool, softcap: bool) -> TileConfig:
    # the slopes of the cap take registers that the wide tiles do not have
    column = table_target(target)
    chosen = HEAD[kernel, column, kind][D <= NARROW or (kernel == "store" and softcap)]
    if not regular(D, fits, chosen):
        return irregular_tile(kernel, column, kind)
    return CUT.get((kernel, column, kind), chosen) if D % chosen.block_k else chosen


def head_options(weight: Tensor, config: TileConfig, *hidden: Tensor) -> dict:
    """What every launch of a head kernel says of its tile, the weight and the rows: constants, warps and stages.

    EVEN_K: D is a multiple of BLOCK_K, so that nothing is masked. DESCRIPTOR: the weight comes through a tensor
    descriptor. UNIT: D and all row strides are multiples of so many elements: 16 bytes, or 1. Triton itself looks for
    multiples of 16 elements, and loads single elements where it finds none.
    """
    target, D, unit = target_of(weight.device), weight.shape[1], 16 // weight.element_size()
    steps = D, weight.stride(0), *[rows.stride(0) for rows in hidden]
    cut = any([step % unit for step in steps])  # noqa: C419  (a list takes half the time)
    return _options(config, target, weight.dtype, D, fits_descriptor(weight), 1 if cut else unit)


@functools.lru_cache(maxsize=256)
def _options(config: TileConfig, target: str, dtype: torch.dtype, D: int, fits: bool, unit: int) -> dict:
    return {
        "BLOCK_N": config.block_n,
        "BLOCK_V": config.block_v,
        "BLOCK_K": config.block_k,
        "PARTS": config.parts,
        "GROUP": config.group,
        "EVEN_K": D % config.block_k == 0,
        "DESCRIPTOR": config.descriptor and fits,
        "UNIT": unit,
        "FAST_EXP2": fast_exp2(target),
        "PRECISION": precision_on(target, dtype),
    } | config.launch_options


def blur_config(matrices: Tensor, size: int, lines: int, trial: Callable[[TileConfig], object]) -> TileConfig:
    """The tile of the blur, BLOCK_N rows of a (size, size) matrix x BLOCK_V of `lines`. `trial` runs a candidate."""
    target = target_of(matrices.device)
    if target == "interpreter":
        chosen, changes = replace(INTERPRETER, block_n=32, block_v=32, block_k=32), [{"block_n": 16}]
    else:
        chosen = BLUR[table_target(target), kind_of(matrices.dtype)]
        changes = [{"block_n": 128}, {"block_v": 128}, {"num_warps": 8}, {"num_stages": 2}, {"num_stages": 4}]
    if not autotuning():
        return chosen
    candidates = [chosen, *(replace(chosen, **change) for change in changes)]
    return tuned(("blur", target, str(matrices.dtype), size, lines), candidates, trial)


def autotuning() -> bool:
    return os.environ.get("VIG_AUTOTUNE", "") not in ("", "0")


def neighbours(config: TileConfig) -> list[TileConfig]:
    """Candidates around a row of the table: fewer or more stages, other warps, the other epilogue, other groups."""
    changes = [
        {"num_stages": config.num_stages - 1},
        {"num_stages": config.num_stages + 1},
        {"num_warps": 12 - config.num_warps},
        {"parts": 3 - config.parts},
        {"group": config.group // 2},
        {"group": config.group * 2},
        {"descriptor": not config.descriptor},
    ]
    return [replace(config, **change) for change in changes]


def tuned(key: tuple, candidates: list[TileConfig], trial: Callable[[TileConfig], object]) -> TileConfig:
    """The fastest candidate for `key`, searched once a process and printed."""
    if key not in _tuned:
        times = {}
        for config in dict.fromkeys(candidates):
            try:
                times[config] = measure(lambda config=config: trial(config))
            except triton.runtime.errors.OutOfResources:
                continue
        _tuned[key] = min(times, key=times.get)
        for config, ms in sorted(times.items(), key=lambda item: item[1]):
            mark = "*" if config == _tuned[key] else " "
            print(f"VIG_AUTOTUNE {mark} {' '.join(map(str, key))}: {config} {ms:.3f} ms", file=sys.stderr)
    return _tuned[key]


def measure(run: Callable[[], object]) -> float:
    """Milliseconds of one run, compiled before it is timed."""
    run()
    if torch.accelerator.is_available():
        return triton.testing.do_bench(run, warmup=5, rep=30, return_mode="median")
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3
