"""Suite `peak`: multiply-adds on registers only, the ceiling of every kernel here on this machine."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.harness import quantile
from vig_kernels.kernels.cpu import native

TRIALS = 5


def run(threads: int, quick: bool, say: Callable[[str], None]) -> list[dict]:
    """One case per number of threads: rows are instruction set x precision."""
    return [_case(count, 0.05 if quick else 0.3, say) for count in sorted({1, threads})]


def _case(threads: int, seconds: float, say: Callable[[str], None]) -> dict:
    rows = []
    for isa, reason in (native.isas() or {"compiled kernels": native.why_not()}).items():
        for pairs, precision in ((False, "float32"), (True, "bfloat16")):
            row = {"name": f"{isa}, {precision}", "ours": False, "baseline": False, "note": ""}
            if reason is not None:
                rows.append(row | {"status": "cannot run", "reason": reason})
                continue
            say(f"{row['name']}, {threads} threads")
            samples = [native.module().peak(isa, pairs, threads, seconds) for _ in range(TRIALS)]
            rows.append(row | {"status": "ok", "value": quantile(samples, 0.5) / 1e9})
    return {
        "model": "registers only",
        "label": f"{threads} thread{'s' * (threads > 1)}",
        "threads": threads,
        "unit": "GFLOP/s",
        "rows": rows,
    }
