"""The fold of linear_nll for sm_90 in Gluon: persistent, warp-specialised, its epilogue beside the next products.

One warp loads (TMA), two warpgroups multiply (wgmma), 64 rows x 256 words each, and fold their half of the tile when
its products are done; the loads of the next tile are under way meanwhile. Blocks stay on their multiprocessor and
walk over the tiles, groups of row tiles first. Written for Triton 3.6 and 3.9, whose names differ.
"""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

NAME = "persistent fold, warp-specialised (Gluon)"
BLOCK_N, BLOCK_V, BLOCK_K, STAGES, GROUP = 128, 256, 64, 4, 16
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 232, 24
ALIGNMENT = 16  # bytes, of TMA

load_async = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def tile_of(pid, row_tiles, vocab_tiles, GROUP: gl.constexpr):
    """GROUP row tiles sweep the vocabulary together."""
    span = GROUP * vocab_tiles
    first = (pid // span) * GROUP
    width = gl.minimum(row_tiles - first, GROUP)
    return first + (pid % span) % width, (pid % span) // width


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    wraps = stage + 1 == STAGES
    return gl.where(wraps, 0, stage + 1), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def produce(
    hidden, weight, hidden_tiles, weight_tiles, ready, empty, row_tiles, vocab_tiles, D,
    PROGRAMS: gl.constexpr, GROUP: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_V: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Both operands of every step, as soon as both consumers have left the stage."""
    stage = 0
    phase = 1  # the first wait finds the stages empty
    for pid in range(gl.program_id(0), row_tiles * vocab_tiles, PROGRAMS):
        row_tile, vocab_tile = tile_of(pid, row_tiles, vocab_tiles, GROUP)
        for k in range(0, D, BLOCK_K):
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(ready.index(stage), (BLOCK_N + BLOCK_V) * BLOCK_K * 2)
            load_async(hidden, [row_tile * BLOCK_N, k], ready.index(stage), hidden_tiles.index(stage))
            load_async(weight, [vocab_tile * BLOCK_V, k], ready.index(stage), weight_tiles.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def exp2(x):
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def consume(
    hidden_tiles, weight_tiles, ready, empty, target, partial_max, partial_sum, target_logit, rows, row_tiles,
    vocab_tiles, V, D, HALF_INDEX: gl.constexpr, PROGRAMS: gl.constexpr, GROUP: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_V: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Products and fold of half the rows of every tile: max, sum of exp and the target's logit."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_V, 16]
    )
    ROWS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    HALF: gl.constexpr = BLOCK_N // 2
    LOG2_E: gl.constexpr = 1.4426950408889634
    stage = 0
    phase = 0
    for pid in range(gl.program_id(0), row_tiles * vocab_tiles, PROGRAMS):
        row_tile, vocab_tile = tile_of(pid, row_tiles, vocab_tiles, GROUP)
        zero = gl.zeros((HALF, BLOCK_V), gl.float32, LAYOUT)
        mbarrier.wait(ready.index(stage), phase)
        acc = warpgroup_mma(
            hidden_tiles.index(stage).slice(HALF_INDEX * HALF, HALF, dim=0),
            weight_tiles.index(stage).permute((1, 0)),
            zero,
            use_acc=False,
            is_async=True,
        )
        last = stage
        stage, phase = next_stage(stage, phase, STAGES)
        for _ in range(BLOCK_K, D, BLOCK_K):
            mbarrier.wait(ready.index(stage), phase)
            acc = warpgroup_mma(
                hidden_tiles.index(stage).slice(HALF_INDEX * HALF, HALF, dim=0),
                weight_tiles.index(stage).permute((1, 0)),
                acc,
                is_async=True,
            )
            acc = warpgroup_mma_wait(1, deps=(acc,))
            acc = warpgroup_mma_init(acc)
            mbarrier.arrive(empty.index(last), count=1)  # the products of the step before are done
            last = stage
            stage, phase = next_stage(stage, phase, STAGES)
        z = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(last), count=1)

        local = row_tile * BLOCK_N + HALF_INDEX * HALF + gl.arange(0, HALF, layout=ROWS)
        live = local < rows
        lane = gl.arange(0, BLOCK_V, layout=COLUMNS)
        if vocab_tile * BLOCK_V + BLOCK_V > V:
            z = gl.where((vocab_tile * BLOCK_V + lane)[None, :] < V, z, -float("inf"))
        wanted = gl.load(target + local, mask=live, other=-1)
        position = gl.where((wanted >= 0) & (wanted < V), wanted - vocab_tile * BLOCK_V, -1).to(gl.int32)
        hit = live & (position >= 0) & (position < BLOCK_V)
        if gl.sum(hit.to(gl.int32), axis=0) > 0:
            picked = gl.sum(gl.where(lane[None, :] == position[:, None], z, 0.0), axis=1)
            gl.store(target_logit + local, picked, mask=hit)
        top = gl.max(z, axis=1)
        safe = gl.where(top == -float("inf"), 0.0, top)
        e = exp2(z * LOG2_E - (safe * LOG2_E)[:, None])
        at = vocab_tile.to(gl.int64) * rows + local
        gl.store(partial_max + at, top, mask=live)
        gl.store(partial_sum + at, gl.sum(e, axis=1), mask=live)


@gluon.jit(do_not_specialize=["rows", "row_tiles", "vocab_tiles", "V"])
def fold_kernel(
    hidden,  # (N, D) descriptor
    weight,  # (V, D) descriptor
    target,  # (N,) int64
    partial_max,  # (vocabulary tiles, N) float32
    partial_sum,  # the same: sum of exp(z - partial_max)
    target_logit,  # (N,) float32
    rows, row_tiles, vocab_tiles, V, D,
    PROGRAMS: gl.constexpr, GROUP: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_V: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, CONSUMER: gl.constexpr, PRODUCER: gl.constexpr,
):  # fmt: skip
    """Grid: PROGRAMS, one a multiprocessor; num_warps=4 is the first consumer."""
    hidden_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_N, BLOCK_K], hidden.layout)
    weight_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_V, BLOCK_K], weight.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    gl.warp_specialize(
        [
            (consume, (hidden_tiles, weight_tiles, ready, empty, target, partial_max, partial_sum, target_logit,
                       rows, row_tiles, vocab_tiles, V, D, 0, PROGRAMS, GROUP, BLOCK_N, BLOCK_V, BLOCK_K, STAGES)),
            (consume, (hidden_tiles, weight_tiles, ready, empty, target, partial_max, partial_sum, target_logit,
                       rows, row_tiles, vocab_tiles, V, D, 1, PROGRAMS, GROUP, BLOCK_N, BLOCK_V, BLOCK_K, STAGES)),
            (produce, (hidden, weight, hidden_tiles, weight_tiles, ready, empty, row_tiles, vocab_tiles, D,
                       PROGRAMS, GROUP, BLOCK_N, BLOCK_V, BLOCK_K, STAGES)),
        ],
        [4, 1],
        [CONSUMER, PRODUCER],
    )  # fmt: skip


def why_not(device: torch.device) -> str | None:
    """None on a GPU of compute capability 9.0."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "needs an NVIDIA GPU of compute capability 9.0"
    capability = torch.cuda.get_device_capability(device)
    return None if capability == (9, 0) else "needs compute capability 9.0, this is {}.{}".format(*capability)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def layout(block: int) -> gl.NVMMASharedLayout:
    """Of a (block, BLOCK_K) tile of 16-bit numbers in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([block, BLOCK_K], gl.bfloat16)


def descriptor(matrix: Tensor, block: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, [block, BLOCK_K], layout(block))


def linear_nll(
    hidden: Tensor,  # (N, D) bfloat16, no row ignored
    weight: Tensor,  # (V, D) bfloat16
    target: Tensor,  # (N,) int64
) -> Tensor:
    """(N,) float32: (max z - z[target]) + log sum exp(z - max z), z = hidden @ weight.T."""
    (N, D), V = hidden.shape, weight.shape[0]
    if (
        hidden.dtype != torch.bfloat16
        or D % BLOCK_K
        or any(x.data_ptr() % ALIGNMENT or x.stride(0) * 2 % ALIGNMENT for x in (hidden, weight))
    ):
        raise ValueError(
            f"expected bfloat16, aligned rows and D a multiple of {BLOCK_K}, got {tuple(hidden.shape)}"
        )
    row_tiles, vocab_tiles = triton.cdiv(N, BLOCK_N), triton.cdiv(V, BLOCK_V)
    top, total = torch.empty(2, vocab_tiles, N, dtype=torch.float32, device=hidden.device)
    picked = torch.full((N,), torch.nan, dtype=torch.float32, device=hidden.device)
    programs = min(_processors(hidden.device), row_tiles * vocab_tiles)
    fold_kernel[(programs,)](
        descriptor(hidden, BLOCK_N), descriptor(weight, BLOCK_V), target, top, total, picked,
        N, row_tiles, vocab_tiles, V, D,
        PROGRAMS=programs, GROUP=GROUP, BLOCK_N=BLOCK_N, BLOCK_V=BLOCK_V, BLOCK_K=BLOCK_K, STAGES=STAGES,
        CONSUMER=CONSUMER_REGISTERS, PRODUCER=PRODUCER_REGISTERS, num_warps=4,
    )  # fmt: skip
    largest = top.amax(0)
    return (largest - picked) + (total * (top - largest).exp()).sum(0).log()
