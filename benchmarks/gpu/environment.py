"""Step: what the machine is, how fast it copies, and how fast its library multiplies."""

from __future__ import annotations

import shutil
import subprocess

import torch

from benchmarks.gpu import device
from benchmarks.gpu.session import Session
from benchmarks.harness import quantile

COPY_BYTES = 2**30
SQUARE = 8192
CALLS = 15
QUERY = "name,driver_version,clocks.sm,clocks.max.sm,power.limit,power.draw,temperature.gpu"


def value_row(name: str, value: float, ours: bool = False, **more) -> dict:
    """A row that holds a value instead of times."""
    return {"name": name, "ours": ours, "baseline": False, "status": "ok", "value": value, "note": "", **more}


def environment(session: Session) -> None:
    """Copies and products at full tilt; how many the other steps are divided by."""
    rehearse, kind = session.rehearse, session.device
    clock, elements = device.clock(kind), (1 << 16 if rehearse else COPY_BYTES) // 4
    source = torch.ones(elements, device=kind)
    to = torch.empty_like(source)
    copy_ms = _median(clock, lambda: to.copy_(source))
    session.case(
        {
            "label": f"copy of {4 * elements / 2**20:g} MiB, read and written",
            "unit": "GB/s",
            "rows": [value_row("copy", 8e-6 * elements / copy_ms)],
        }
    )
    n = 64 if rehearse else SQUARE
    one, other = (torch.randn(n, n, device=kind, dtype=torch.bfloat16) for _ in range(2))
    square_ms = _median(clock, lambda: one @ other)
    session.case(
        {
            "label": f"matrix product {n} x {n} x {n}, bfloat16",
            "unit": "TFLOP/s",
            "rows": [value_row("torch.mm", 2e-9 * n**3 / square_ms)],
        }
    )
    print(_smi(), flush=True)
    session.case({"label": "device", "unit": "", "rows": [], "text": _smi()})


def _median(clock, run) -> float:
    run()
    return quantile([clock(run, 1) for _ in range(CALLS)], 0.5)


def _smi() -> str:
    """What nvidia-smi says of the first device."""
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi"
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader", "-i", "0"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return (done.stdout or done.stderr).strip()


def product_rate(cases: list[dict]) -> float | None:
    """FLOP/s of the library's product, as measured by `environment`; None where it was not."""
    for case in cases:
        if case.get("unit") == "TFLOP/s" and case["rows"]:
            return 1e12 * case["rows"][0]["value"]
    return None
