"""Suite `score`: per-token negative log-likelihoods against the bare GEMM and the peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from benchmarks import harness, peers
from benchmarks.harness import Contender
from benchmarks.heads import ScoreJudge, make_inputs
from benchmarks.shapes import MODELS, Shape, score_cases
from vig_kernels.kernels.cpu import native

PEAK_SECONDS = 0.15
PRODUCTS = {"score": 1, "train": 3}  # of N, D and V: what `of_peak` counts of a suite's call
COMPARISONS = (  # (what is shown, row, row it is divided by, how many times that)
    ("linear_vig on N + N rows / two linear_nll calls", "linear_vig, N + N rows", "linear_nll", 2),
    (f"{peers.SPARSE} / none", peers.SPARSE, "linear_nll", 1),
)
CASE_SECONDS = 16.0  # of timing; verification and compilation come on top
FEW = (
    "bare GEMM",
    "eager PyTorch",
    "CCE torch_compile",
    "TRL ChunkedLogProb",
    "linear_nll",
    "linear_vig, N + N rows",
)


def contenders() -> list[Contender]:
    return [*peers.score_peers(gpu=False), *peers.score_ours("cpu", "cpu")]


def run(threads: int, quick: bool, say: Callable[[str], None]) -> list[dict]:
    """The cases of the suite, measured."""
    few = [contender for contender in contenders() if contender.name in FEW]
    return [
        case(shape, dtype, threads, 3 if quick else 9, few if shape in MODELS else contenders(), say)
        for shape, dtype in score_cases(quick)
    ]


def case(
    shape: Shape, dtype: torch.dtype, threads: int, rounds: int, field: Sequence[Contender], say
) -> dict:
    """One shape in one precision."""
    label = f"{shape}, {str(dtype).removeprefix('torch.')}"
    say(f"{label}: inputs and float64 truth")
    inputs = make_inputs(shape, dtype)
    judge = ScoreJudge(inputs)
    probe = peak_probe(dtype, threads)
    result = harness.measure(
        field,
        inputs,
        judge,
        rounds=rounds,
        seconds=CASE_SECONDS,
        probe=probe,
        say=lambda text: say(f"{label}: {text}"),
    )
    add_share_of_peak(result, ("bare GEMM", "linear_nll", "linear_vig, N + N rows"), shape.gemm_flops)
    return describe(shape, dtype, result, COMPARISONS)


def peak_probe(dtype: torch.dtype, threads: int) -> Callable[[], float] | None:
    """Measures the machine's register-only peak for products of `dtype`; None without the compiled kernels."""
    if native.why_not() is not None:
        return None
    peak = native.peak_bf16 if dtype == torch.bfloat16 else native.peak_f32
    return lambda: peak(threads, PEAK_SECONDS)


def add_share_of_peak(result: dict, names: Sequence[str], flops: float) -> None:
    """Sets `of_peak` of the rows named."""
    for row in result["rows"]:
        if result["probe"] and row["name"] in names and row["status"] == "ok":
            row["of_peak"] = share_of_peak(row, flops, result["probe"])


def share_of_peak(row: dict, flops: float, peak: float) -> float:
    """Operations a second of a row, `flops` times its work, over the register-only peak of the same run."""
    return row["work"] * flops / (row["p50_ms"] * 1e-3) / peak


def describe(shape: Shape, dtype: torch.dtype, result: dict, comparisons) -> dict:
    """A case as it is stored."""
    found = [
        {"name": name, "ratio": harness.median_ratio(result["rows"], row, other, times)}
        for name, row, other, times in comparisons
    ]
    return {
        "model": shape.name,
        "shape": {"N": shape.N, "D": shape.D, "V": shape.V},
        "dtype": str(dtype).removeprefix("torch."),
        "peak_gflops": None if result["probe"] is None else result["probe"] / 1e9,
        "rows": result["rows"],
        "comparisons": found,
    }
