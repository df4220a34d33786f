"""Step: hardware counters of one launch of the fold, by Nsight Compute where it is installed and allowed."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys

import torch

from benchmarks.gpu.environment import value_row
from benchmarks.gpu.session import Session

SECTIONS = (
    "SpeedOfLight",
    "Occupancy",
    "WarpStateStats",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
)
KERNEL = "fold_kernel"
SHAPE = (8192, 4096, 32064)
TEXTS = 40  # characters of what is not a number


def counters(session: Session) -> None:
    label = f"counters of {KERNEL}, {' x '.join(map(str, SHAPE))}, bfloat16"
    tool = shutil.which("ncu")
    if tool is None or session.rehearse:
        reason = "ncu is not on the path" if tool is None else "no GPU in a rehearsal"
        row = {
            "name": "ncu",
            "ours": False,
            "baseline": False,
            "note": "",
            "status": "cannot run",
            "reason": reason,
        }
        session.case({"label": label, "unit": "", "rows": [row]})
        return
    command = [
        tool,
        "--csv",
        "--page",
        "details",
        "--clock-control",
        "none",
        "-k",
        KERNEL,
        "-s",
        "1",
        "-c",
        "1",
    ]
    command += [word for section in SECTIONS for word in ("--section", section)]
    done = subprocess.run(
        [*command, sys.executable, "-m", "benchmarks.gpu.counters"],
        capture_output=True,
        text=True,
        timeout=session.left_s,
        check=False,
    )
    print(done.stdout[-20000:], done.stderr[-4000:], flush=True)
    rows = rows_of(done.stdout)
    if not rows:
        session.fails(
            (done.stderr or done.stdout).strip().splitlines()[-1][:200]
            if done.stderr or done.stdout
            else "ncu gave nothing"
        )
        raise SystemExit(1)
    session.case({"label": label, "unit": "", "rows": rows})


def rows_of(text: str) -> list[dict]:
    """A row a metric, from ncu's CSV, which begins after the lines of ncu itself."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    rows = []
    for entry in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        name, unit, value = entry.get("Metric Name"), entry.get("Metric Unit"), entry.get("Metric Value")
        if not name or not value:
            continue
        try:
            number: float | str = float(value.replace(",", ""))
        except ValueError:
            number = value[:TEXTS]
        rows.append(value_row(f"{entry.get('Section Name', '')}: {name}", number, unit=unit or ""))
    return rows


def one_call() -> None:
    """A warm call and one more, for ncu to look at."""
    import vig_kernels

    N, D, V = SHAPE
    hidden, weight = (torch.randn(rows, D, device="cuda").bfloat16() for rows in (N, V))
    target = torch.randint(0, V, (N,), device="cuda")
    for _ in range(2):
        vig_kernels.linear_nll(hidden, weight / 64, target, backend="triton")
    torch.cuda.synchronize()


if __name__ == "__main__":
    one_call()
