"""Tables of a GPU's result, the same for terminal and page; what was not measured says so, with its reason."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import results
from benchmarks.gpu import plan

NOT_MEASURED = "not measured"
REHEARSAL = "REHEARSAL ON A CPU, no figures"
REHEARSED = {
    "device ms": "interpreter ms",
    "/ cuBLAS": "/ CPU product",
    "/ products": "/ CPU products",
}  # heads
PREDICTED = {  # rows that predictions speak of, and the op's name there
    "linear_nll": "linear_nll",
    "linear_vig, N + N rows": "linear_vig",
    "linear_cross_entropy": "linear_cross_entropy",
}
PICTURED = ("score", "train", "blur")
COUNTERS = ("Speed Of Light", "Occupancy", "Warp State")  # sections of ncu that a page shows


def tables(result: dict) -> list[list[list[str]]]:
    """Lists of rows, the first of them the head: a table a case, then what became of the steps.

    Every table of a rehearsal says so: tiny shapes in the interpreter on a CPU have times, which are no figures.
    """
    found = [*(_table(case) for case in result["cases"] if case["rows"]), steps_table(result)]
    if result["rehearsal"]:
        for table in found:
            table[0] = [f"{REHEARSAL}: {table[0][0]}", *(REHEARSED.get(name, name) for name in table[0][1:])]
    return found


def _table(case: dict) -> list[list[str]]:
    if any("p50_ms" in row for row in case["rows"]):
        return _timings(case)
    return _values(case)


def _timings(case: dict) -> list[list[str]]:
    """Device time without launch gaps, beside it what a call takes by the clock."""
    named = f"{case['suite']}: " if case.get("suite") in ("score", "train", "blur") else ""
    ratio = case.get("ratio_to", "/ products" if case.get("suite") == "train" else "/ cuBLAS")
    model = f" ({case['model']})" if case.get("model") else ""
    head = [
        f"{named}{results.label(case)}{model}",
        "device ms",
        "p20-p80",
        ratio,
        "call ms",
        "peak MiB",
        "max error",
    ]
    rows = []
    for row in case["rows"]:
        if row["status"] != "ok":
            rows.append(
                [_bold(row, row["name"]), *[f"{NOT_MEASURED}: {_short(row)}"], *[""] * (len(head) - 2)]
            )
            continue
        cells = results.cells(row)
        call = results.milliseconds(row["call_ms"]) if "call_ms" in row else ""
        rows.append(
            [_bold(row, results.named(row)), cells["p50 ms"], cells["p20-p80"], cells["ratio"], call,
             cells["peak MiB"], cells["max error"]]
        )  # fmt: skip
    return [head, *rows]


def _values(case: dict) -> list[list[str]]:
    """Cases that hold values: rates, tests, samples a second, counters."""
    rows = [row for row in case["rows"] if case.get("unit") or _shown(row)]
    end_to_end = any("outside_s" in row for row in rows)
    head = [case["label"], case.get("unit") or "value"]
    head += ["of cuBLAS' rate (MFU)", "outside tower and layers, s", "of, s"] if end_to_end else []
    table = [head]
    for row in rows:
        if row["status"] != "ok":
            what = row["reason"] if row["status"] == "wrong" else f"{NOT_MEASURED}: {row['reason']}"
            table.append([_bold(row, row["name"]), what, *[""] * (len(head) - 2)])
            continue
        line = [_bold(row, row["name"]), f"{_number(row['value'])} {row.get('unit', '')}".strip()]
        if end_to_end:
            mfu = NOT_MEASURED if row.get("mfu") is None else f"{row['mfu']:.2f}"
            line += [mfu, f"{row['outside_s']:.1f}", f"{row['seconds']:.1f}"]
        table.append(line)
    return table


def _shown(row: dict) -> bool:
    return row["status"] != "ok" or any(section in row["name"] for section in COUNTERS)


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _short(row: dict) -> str:
    return f"{row['status']}, {row['reason']}".replace("|", "/")


def _bold(row: dict, text: str) -> str:
    return f"**{text}**" if row.get("ours") else text


def steps_table(result: dict) -> list[list[str]]:
    """Every step of the plan: how long it took, or that it was not measured and why."""
    records = {record["name"]: record for record in result["steps"]}
    planned = plan.rehearsed() if result["rehearsal"] else plan.steps()
    rows = []
    for name in dict.fromkeys([*(step.name for step in planned), *records]):
        record = records.get(name)
        if record is None:
            rows.append([name, NOT_MEASURED, "the run ended before"])
            continue
        state = record["status"] if record["status"] == "ok" else f"{NOT_MEASURED} ({record['status']})"
        state = NOT_MEASURED if record["status"] == NOT_MEASURED else state
        rows.append([name, f"{state}, {record['seconds']:.0f} s", record["reason"].replace("|", "/")])
    return [["step", "state", "reason"], *rows]


def drawn(result: dict) -> list[dict]:
    """The cases that have a picture: scoring, training and blur."""
    return [case for case in result["cases"] if case.get("suite") in PICTURED and _any(case)]


def _any(case: dict) -> bool:
    return any(row["status"] == "ok" for row in case["rows"])


def measured(result: dict) -> Iterator[tuple[str, str, tuple, float]]:
    """(op, dtype, shape, device milliseconds) of the library's own rows, named as predictions name them."""
    for case in result["cases"]:
        if "shape" not in case or case.get("suite") not in ("score", "train"):
            continue
        shape = tuple(case["shape"][letter] for letter in "NDV")
        for row in case["rows"]:
            if row["status"] == "ok" and row["name"] in PREDICTED:
                yield PREDICTED[row["name"]], case["dtype"], shape, row["p50_ms"]
