"""Suite `train`: mean loss and gradients against the sum of torch's three bare products, timed singly."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks import harness, peers
from benchmarks.harness import Contender
from benchmarks.heads import TrainJudge, make_inputs
from benchmarks.score import CASE_SECONDS, PRODUCTS, add_share_of_peak, describe, peak_probe
from benchmarks.shapes import Shape, train_cases

COMPARISONS = (("frozen weight / both gradients", peers.FROZEN, "linear_cross_entropy", 1),)


def contenders() -> list[Contender]:
    return [*peers.train_peers(gpu=False), *peers.train_ours("cpu", "cpu")]


def run(threads: int, quick: bool, say: Callable[[str], None]) -> list[dict]:
    """The cases of the suite, measured."""
    return [case(s, d, threads, 3 if quick else 9, say) for s, d in train_cases(quick)]


def case(shape: Shape, dtype: torch.dtype, threads: int, rounds: int, say) -> dict:
    """One shape in one precision."""
    label = f"{shape}, {str(dtype).removeprefix('torch.')}"
    say(f"{label}: inputs and float64 truth")
    inputs = make_inputs(shape, dtype)
    upstream = torch.rand(shape.N, shape.V).to(dtype)
    field = [*peers.bare_products(upstream), *contenders()]
    result = harness.measure(
        field,
        inputs,
        TrainJudge(inputs, upstream),
        rounds=rounds,
        seconds=CASE_SECONDS,
        probe=peak_probe(dtype, threads),
        say=lambda text: say(f"{label}: {text}"),
    )
    add_share_of_peak(result, ("linear_cross_entropy",), PRODUCTS["train"] * shape.gemm_flops)
    return describe(shape, dtype, result, COMPARISONS)
