"""Results on disk, and as rows of a table: what the terminal, the README and the plots have in common."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks import machine, peers

FOLDER = Path(__file__).with_name("results")


def path_of(result: dict, folder: Path) -> Path:
    """<suite>-<machine>.json; quick results have their own name and never replace full ones."""
    kind = f"{result['suite']}-quick" if result["quick"] else result["suite"]
    return folder / f"{kind}-{machine.slug(result['machine'])}.json"


def write(result: dict, folder: Path) -> Path:
    """Stores a result; returns where."""
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(result, folder)
    path.write_text(json.dumps(as_stored(result), indent=1) + "\n")
    return path


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def read_full(suite: str, folder: Path = FOLDER) -> list[dict]:
    """The full results of a suite, of all machines, by file name."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{suite}-*.json"))]
    return [result for result in found if result["suite"] == suite and not result["quick"]]


def digest(result: dict) -> str:
    """Of a result as it is read; a plot carries that of the result it was drawn from."""
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def tables(result: dict) -> list[list[list[str]]]:
    """The tables of a suite that makes its own, each a list of rows, the first of them the head."""
    if result["suite"] == "gpu":
        from benchmarks.gpu import tables as gpu

        return gpu.tables(result)
    return importlib.import_module(f"benchmarks.{result['suite']}").tables(result["cases"])


def label(case: dict) -> str:
    """A case in a few words, such as "512 x 2048 x 32000, float32"."""
    if "shape" not in case:
        return case["label"]
    shape = case["shape"]
    return f"{shape['N']} x {shape['D']} x {shape['V']}, {case['dtype']}"


COLUMNS = ("p50 ms", "p20-p80", "ratio", "of peak", "peak MiB", "max error")


def cells(row: dict) -> dict[str, str]:
    """Column -> text, of a row that was timed; "" where a column does not apply."""
    spread = f"{milliseconds(row['p20_ms'])}-{milliseconds(row['p80_ms'])}"
    share, mib = row.get("of_peak"), row.get("peak_mib")
    return {
        "p50 ms": milliseconds(row["p50_ms"]),
        "p20-p80": "one call" if row["samples"] == 1 else spread,
        "ratio": "" if row["ratio"] is None else f"{row['ratio']:.2f}",
        "of peak": "" if share is None else f"{share:.2f}",
        "peak MiB": "" if mib is None else f"{mib:.0f}",
        "max error": f"{row['max_error']:.1e}",
    }


def timed(case: dict) -> list[dict]:
    """The rows that stand side by side: measured, and asked for the same work."""
    return [row for row in case["rows"] if row["status"] == "ok" and row["name"] not in peers.LESS_WORK]


def named(row: dict) -> str:
    """The contender, with its note."""
    return f"{row['name']} ({row['note']})" if row["note"] else row["name"]


def milliseconds(value: float) -> str:
    """Three significant digits, no exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def problems(case: dict) -> Iterator[str]:
    """One line for every contender that was not timed."""
    for row in case["rows"]:
        if row["status"] != "ok":
            yield f"{row['name']}: {row['status']}: {row['reason']}"


def names(cases: Iterable[dict]) -> list[str]:
    """Names of all rows that stand side by side, in order of first appearance."""
    return list(dict.fromkeys(row["name"] for case in cases for row in timed(case)))


def as_stored(value):
    """A value as it reads back. Five significant digits are more than any timing holds."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: as_stored(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_stored(item) for item in value]
    return value
