"""What a result must hold, just measured or stored: own rows are right, bounds are kept, figures follow from others."""

from __future__ import annotations

import copy
import importlib
import math
import statistics
from collections.abc import Iterator

from benchmarks import harness, results

CLOSE = 5e-4  # relative: stored values have five significant digits


def broken(result: dict) -> list[str]:
    """Own contenders that were wrong or failed, and bounds that are not kept. A ratio of two timings is no bound,
    but for the throughput suite's, which is many minutes of work."""
    suite = importlib.import_module(f"benchmarks.{result['suite']}")
    bounds = getattr(suite, "broken_bounds", lambda cases: [])
    return [*_not_right(result["cases"]), *bounds(result["cases"])]


def _not_right(cases: list[dict]) -> Iterator[str]:
    for case in cases:
        for row in case["rows"]:
            if row.get("ours") and row["status"] in ("wrong", "failed"):
                yield f"{results.label(case)}: {row['name']}: {row['status']}: {row['reason']}"


def not_following(result: dict) -> list[str]:
    """Ratios, shares of the peak and comparisons that are not those of the times and the peak beside them."""
    return [
        f"{results.label(case)}: {name} is {held}, but follows as {due}"
        for case in result["cases"]
        for name, held, due in _derived(case, case.get("suite", result["suite"]))
        if not _same(held, due)
    ]


def _derived(case: dict, suite: str) -> Iterator[tuple[str, float | None, float | None]]:
    """(what, as stored, as it follows)."""
    if "ratios" in case:
        yield "the ratio", case["ratio"], statistics.median(case["ratios"])
        return
    if not any("p50_ms" in row for row in case["rows"]):
        return
    again = copy.deepcopy(case["rows"])
    harness.add_ratios(again)
    for row, fresh in zip(case["rows"], again, strict=True):
        if row["status"] == "ok":
            yield f"the ratio of {row['name']}", row["ratio"], fresh["ratio"]
        if "of_peak" in row:
            yield f"the share of the peak of {row['name']}", row["of_peak"], _of_peak(case, row, suite)
    if "comparisons" in case:
        named = {name: pair for name, *pair in importlib.import_module(f"benchmarks.{suite}").COMPARISONS}
        for held in case["comparisons"]:
            due = harness.median_ratio(again, *named[held["name"]]) if held["name"] in named else None
            yield held["name"], held["ratio"], due


def _of_peak(case: dict, row: dict, suite: str) -> float:
    from benchmarks import score

    shape = case["shape"]
    flops = score.PRODUCTS[suite] * 2 * shape["N"] * shape["D"] * shape["V"]
    return score.share_of_peak(row, flops, case["peak_gflops"] * 1e9)


def _same(held: float | None, due: float | None) -> bool:
    if held is None or due is None:
        return held is due
    return math.isclose(held, due, rel_tol=CLOSE)
