"""Steps: tiles of the fold side by side with cuBLAS, and the candidates that are not part of the library.

Tiles are compiled by several processes at once, which fill Triton's cache on disk; then one process times them in
turn. What is found goes into `vig_kernels/kernels/triton/tile_configs.py` by hand.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import pkgutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, replace
from unittest.mock import patch

import torch
import torch.nn.functional as F

import vig_kernels
from benchmarks import gpu_candidates, peers
from benchmarks.gpu.heads import shape_of
from benchmarks.gpu.session import Session, named
from benchmarks.harness import Contender
from benchmarks.heads import HeadInputs, ScoreJudge, TrainJudge, make_inputs
from benchmarks.shapes import Shape

# changes of the table's row, one contender each; a field that the table no longer has is left out
CHANGES = (
    {},
    {"parts": 1},
    {"num_stages": 3},
    {"group": 8},
    {"group": 32},
    {"descriptor": False},
    {"block_v": 128, "num_stages": 3},
    {"block_v": 128, "num_warps": 4, "parts": 1},
    {"block_n": 64, "num_warps": 4, "parts": 1},
)
REHEARSED = 2
COMPILED_ROWS = 256  # of the small call that compiles a tile
COMPILERS = 9
DTYPE = torch.bfloat16


def candidates(kernel: str, device: str) -> list:
    """The table's wide row for this device's 16-bit numbers, and its neighbours."""
    from vig_kernels.kernels.triton import launch, tile_configs

    target = launch.target_of(torch.device(device))
    if target == "interpreter":
        base = tile_configs.INTERPRETER
    else:
        base = tile_configs.HEAD[kernel, tile_configs.table_target(target), "16-bit"][0]
    known = {field.name for field in fields(base)}
    changed = [replace(base, **{k: v for k, v in change.items() if k in known}) for change in CHANGES]
    return list(dict.fromkeys(changed))


@contextmanager
def tile(kernel: str, config, device: str) -> Iterator[None]:
    """While it lasts, the table holds `config` for `kernel`."""
    from vig_kernels.kernels.triton import launch, tile_configs

    target = launch.target_of(torch.device(device))
    if target == "interpreter":
        with patch.object(tile_configs, "INTERPRETER", config):
            yield
        return
    key = (kernel, tile_configs.table_target(target), "16-bit")
    with patch.dict(tile_configs.HEAD, {key: (config, config)}):
        yield


def call(kernel: str, config, device: str, inputs: HeadInputs):
    """One call of the op that launches `kernel`, with that tile."""
    with tile(kernel, config, device):
        if kernel == "fold":
            with torch.no_grad():
                return vig_kernels.linear_nll(inputs.hidden, inputs.weight, inputs.target, backend="triton")
        hidden, weight = inputs.leaves()
        loss = vig_kernels.linear_cross_entropy(
            hidden, weight, inputs.target, backend="triton", num_kept=inputs.shape.N
        )
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def compile_tile(kernel: str, index: int, device: str, D: int) -> str | None:
    """In a process of its own: a small call. Returns None, or what the compiler or the device said."""
    try:
        config = candidates(kernel, device)[index]
        call(kernel, config, device, make_inputs(Shape("small", COMPILED_ROWS, D, 1024), DTYPE, device))
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # whatever it is, the candidate's row says it
        text = (str(error).strip() or "no message").splitlines()[0]
        return f"{type(error).__name__}: {text:.200}"
    return None


def tiles_step(session: Session, kernel: str, given: Sequence) -> None:
    """`kernel`: "fold" (scoring) or "store" (training). The baseline is cuBLAS of the same shape."""
    shape, device = shape_of(session, given), session.device
    configs = candidates(kernel, device)
    configs = configs[:REHEARSED] if session.rehearse else configs
    reasons: list[str | None] = [None] * len(configs)
    if not session.rehearse:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(COMPILERS, os.cpu_count() or 1), mp_context=context) as pool:
            jobs = [pool.submit(compile_tile, kernel, i, device, shape.D) for i in range(len(configs))]
            reasons = [job.result() for job in jobs]
    inputs = make_inputs(shape, DTYPE, device)
    output = "nll" if kernel == "fold" else "loss"

    def contender(config, reason: str | None) -> Contender:
        run = functools.partial(call, kernel, config, device)
        return Contender(
            f"{config} g{config.group}",
            lambda inputs: lambda: run(inputs),
            lambda: reason,
            output,
            "promise",
            ours=True,
        )

    if kernel == "fold":
        field, judge = [_bare()], ScoreJudge(inputs)
    else:
        upstream = torch.rand(shape.N, shape.V, device=device, dtype=DTYPE)
        field, judge = peers.bare_products(upstream), TrainJudge(inputs, upstream)
    field += [contender(config, reason) for config, reason in zip(configs, reasons, strict=True)]
    result = session.contest(field, inputs, judge, rounds=9, seconds=4.0, peaks=False)
    session.case(_case(f"tiles of {kernel}", shape, result))


def _bare() -> Contender:
    product = peers.forward_only(lambda h, w, t: F.linear(h, w))
    return Contender("bare GEMM", product, output="logits", baseline=True)


def _case(kind: str, shape: Shape, result: dict) -> dict:
    """Tiles of the library are ours; that one does not compile or does not fit is a finding, not a fault."""
    for row in result["rows"]:
        if row["status"] == "failed":
            row["status"] = "cannot run"
    label = f"{kind}: {shape}, {named(DTYPE)}"
    return {"label": label, "model": shape.name, "suite": "tiles", "rows": result["rows"]}


def candidate_modules() -> list:
    """Every module of benchmarks/gpu_candidates: NAME, why_not(device) and linear_nll(hidden, weight, target)."""
    names = sorted(module.name for module in pkgutil.iter_modules(gpu_candidates.__path__))
    return [importlib.import_module(f"benchmarks.gpu_candidates.{name}") for name in names]


def candidates_step(session: Session, given: Sequence) -> None:
    """Kernels that have not yet been found right and faster on a GPU, beside the library's and cuBLAS."""
    shape = shape_of(session, given)
    inputs = make_inputs(shape, DTYPE, session.device)

    def contender(module) -> Contender:
        make = peers.forward_only(module.linear_nll)
        why_not = functools.partial(module.why_not, torch.device(session.device))
        return Contender(module.NAME, make, why_not, "nll", "promise")

    ours = [entry for entry in peers.score_ours("triton", session.device) if entry.name == "linear_nll"]
    field = [_bare(), *ours, *map(contender, candidate_modules())]
    result = session.contest(field, inputs, ScoreJudge(inputs), rounds=9, seconds=4.0)
    session.case(_case("candidates", shape, result))
