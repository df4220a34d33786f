"""The memory promise on a GPU, counted without one: every allocation of an op on tensors that hold nothing.

Kernels and GEMMs are left out: they allocate nothing but a GEMM's workspace, which is not counted.
"""

from dataclasses import replace

import checks
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vig_kernels.kernels.triton.tile_configs import HEAD, NARROW
from vig_kernels.ops.linear_cross_entropy import GPU_MIB, LEAST_MIB
from vig_kernels.problem import HeadProblem, Needs, Saved, Upstream

KERNELS = checks.load("vig_kernels.kernels.triton")
MIB = 2**20


class Peak(TorchDispatchMode):
    """The most bytes that were allocated at a time by what runs under it."""

    def __init__(self):
        super().__init__()
        self.live, self.bytes = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {at: entry for at, entry in self.live.items() if not entry[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.live.values()))
        return out


class NoLaunch:
    def __getitem__(self, grid):
        return lambda *arguments, **options: None


@pytest.fixture
def gpu(monkeypatch):
    """No launches, no GEMMs, and the tiles of sm_90."""

    def config(kernel, weight, softcap, trial):
        kind = "float32" if weight.dtype == torch.float32 else "16-bit"
        return replace(HEAD[kernel, "sm_90", kind][weight.shape[1] <= NARROW], descriptor=False)

    for module in vars(KERNELS).values():
        for name in vars(module).copy():
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, NoLaunch())
        idle = lambda out, a, b, first=False: None  # noqa: E731
        for name, value in (("head_config", config), ("accumulate", idle), ("product", idle)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    with FakeTensorMode():
        yield


def inputs(N, D, V, dtype):
    hidden, weight, bias = (torch.empty(*size, dtype=dtype) for size in ((N, D), (V, D), (V,)))
    return hidden, weight, torch.empty(N, dtype=torch.long), bias


def extra_mib(call, *allowed) -> float:
    """Peak of a call less its outputs and less the bytes that are allowed beside."""
    with Peak() as peak:
        call()
    return (peak.bytes - sum(allowed)) / MIB


both = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
SHAPES = (
    (8192, 4096, 32064), (6144, 2048, 151936), (8192, 576, 49280), (4096, 2560, 262208), (4096, 8192, 1000),
    (15000, 4096, 32064), (300000, 64, 128), (1, 4096, 151936),
)  # fmt: skip


@both
@pytest.mark.parametrize("shape", [(65536, 2304, 262208), (2**20, 64, 32064), (7, 4096, 32064)], ids=str)
def test_scoring(shape, dtype, gpu):
    hidden, weight, target, bias = inputs(*shape, dtype)
    N = shape[0]
    head = HeadProblem(hidden, weight, target, bias)
    alone = extra_mib(lambda: KERNELS.linear_nll.forward(head, checks.STATS), 20 * N)
    pair = extra_mib(lambda: KERNELS.linear_vig.with_stats(head, hidden, ()), 12 * N)
    names = ("kl", "entropy_image", "argmax_null")
    # outputs of either pass: nll, entropy and argmax; VIG and KL
    stats = extra_mib(lambda: KERNELS.linear_vig.with_stats(head, hidden, names), 40 * N)
    assert max(alone, pair, stats) <= 64, f"{alone:.0f}, {pair:.0f} and {stats:.0f} MiB"
    print(f"scored {shape} {dtype}: {alone:.0f}, {pair:.0f} and {stats:.0f} MiB")


@both
@pytest.mark.parametrize("shape", [*SHAPES, (8192, 4096, 151936), (16384, 4096, 151936)], ids=str)
@pytest.mark.parametrize("mib", [LEAST_MIB, GPU_MIB])
@pytest.mark.parametrize("num_kept", ["told", "not told"])
def test_formed_gradients(shape, dtype, mib, num_kept, gpu):
    """Forward, and the weight gradient from a kept block: the hidden gradient's float32 buffer counts too."""
    hidden, weight, target, bias = inputs(*shape, dtype)
    (N, D, V), size = shape, dtype.itemsize
    if size == 2 and mib * MIB // 2 < 4 * N * D:
        pytest.skip("the op recomputes for such a shape")
    kept = N if num_kept == "told" else None
    head = HeadProblem(hidden, weight, target, bias, 1.0, 30.0, num_kept=kept)
    block = KERNELS.linear_cross_entropy.kept_rows(head, Needs(), mib * MIB)
    outputs = V * D * (2 if block else 4) + 4 * V + (4 * N * D if size == 4 else 0)
    row_weight = torch.empty(N)
    extra = extra_mib(
        lambda: checks.formed_gradients(KERNELS, head, row_weight, 1e-3, budget=mib * MIB), outputs
    )
    assert extra <= mib, f"{extra:.0f} MiB"
    print(f"formed {num_kept} {shape} {dtype} {mib}, {block} rows kept: {extra:.0f} MiB")


@both
@pytest.mark.parametrize("shape", [*SHAPES, (65536, 4096, 32064)], ids=str)
@pytest.mark.parametrize("share", [None, 0.3], ids=["not told", "30 % kept"])
def test_recomputed_gradients(shape, dtype, share, gpu):
    hidden, weight, target, bias = inputs(*shape, dtype)
    N, D, V = shape
    row, kept = torch.empty(N), None if share is None else int(share * N)
    head = HeadProblem(hidden, weight, target, bias, 1.0, 30.0, num_kept=kept)
    extra = extra_mib(
        lambda: KERNELS.linear_nll.backward(Upstream(row, row, row), Saved(row, row), head, Needs()),
        dtype.itemsize * (N * D + V * D + V),
    )
    assert extra <= 256, f"{extra:.0f} MiB"
    print(f"recomputed {share} {shape} {dtype}: {extra:.0f} MiB")
