"""Suite `memory`: peak extra memory of one call, as growth of the resident set of a fresh process.

The child makes the inputs, makes a tiny call so that libraries are loaded and threads started, resets the kernel's
high-water mark, makes the call, and reads the mark: growth less the bytes of the outputs (and gradients) is what is
reported.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import score, train
from benchmarks.harness import Contender
from benchmarks.heads import make_inputs
from benchmarks.shapes import QUICK, SCORE, TRAIN, TRAIN_MANY_ROWS, Shape

MIB = 2**20
SCORE_ROWS = ("linear_nll", "linear_vig, N + N rows", "eager PyTorch")
TRAIN_ROWS = (
    "linear_cross_entropy",
    'linear_cross_entropy, memory="low"',
    "eager PyTorch",
    "TRL ChunkedLogProb",
)
PROMISED_SCORE_MIB, PROMISED_TRAIN_MIB = 64, 256


def run(threads: int, quick: bool, say: Callable[[str], None]) -> list[dict]:
    """The cases of the suite, measured."""
    cases = []
    for suite, shapes, wanted in (
        ("score", SCORE, SCORE_ROWS),
        ("train", TRAIN + TRAIN_MANY_ROWS, TRAIN_ROWS),
    ):
        for shape in QUICK if quick else shapes:
            for dtype in (torch.bfloat16,) if quick else (torch.float32, torch.bfloat16):
                name = str(dtype).removeprefix("torch.")
                say(f"{suite}, {shape}, {name}")
                rows = [_row(suite, contender, shape, name, threads) for contender in _field(suite, wanted)]
                cases.append(
                    {
                        "model": shape.name,
                        "label": f"{suite}: {shape}, {name}",
                        "suite": suite,
                        "dtype": name,
                        "unit": "MiB",
                        "rows": rows,
                    }
                )
    return cases


def _field(suite: str, wanted=None) -> list[Contender]:
    everyone = score.contenders() if suite == "score" else train.contenders()
    return [contender for contender in everyone if wanted is None or contender.name in wanted]


def promised_mib(suite: str, contender: Contender, shape: Shape, dtype: str) -> float | None:
    """What the library promises for its own ops; peers promise nothing."""
    if not contender.ours:
        return None
    if suite == "score":
        return PROMISED_SCORE_MIB
    buffered = dtype != "float32" and "low" not in contender.name
    return PROMISED_TRAIN_MIB + (4 * shape.V * shape.D / MIB if buffered else 0.0)


def broken_bounds(cases: list[dict]) -> list[str]:
    """Which calls took more than is promised."""
    return [
        f"{case['label']}: {row['name']}: {row['value']:.1f} MiB, promised {row['promised']:.0f}"
        for case in cases
        for row in case["rows"]
        if row["status"] == "ok" and row["promised"] is not None and not row["value"] <= row["promised"]
    ]


def caption(cases: list[dict]) -> str:
    """What the promises hold, and where eager PyTorch needs less than the library."""
    text = (
        f"Promised are {PROMISED_SCORE_MIB} MiB for scoring and {PROMISED_TRAIN_MIB} MiB for training; with 16-bit "
        'weights also the float32 (V, D) sum of the weight gradient, unless memory="low".'
    )
    less = [case["label"].replace(" x ", " × ") for case in cases if _eager_needs_less(case)]
    if less:
        text += (
            f" Eager PyTorch needs less than linear_cross_entropy where its logits are small beside our buffers: "
            f"{'; '.join(less)}."
        )
    return text


def _eager_needs_less(case: dict) -> bool:
    values = {row["name"]: row["value"] for row in case["rows"] if row["status"] == "ok"}
    return values.get(TRAIN_ROWS[2], math.inf) < values.get(TRAIN_ROWS[0], 0.0)


def _row(suite: str, contender: Contender, shape: Shape, dtype: str, threads: int) -> dict:
    row = {"name": contender.name, "ours": contender.ours, "baseline": False, "note": contender.note}
    reason = contender.why_not()
    if reason is None and not Path("/proc/self/clear_refs").exists():
        reason = "needs Linux's /proc/self/clear_refs"
    if reason is not None:
        return row | {"status": "cannot run", "reason": reason}
    order = {
        "suite": suite,
        "name": contender.name,
        "shape": dataclasses.asdict(shape),
        "dtype": dtype,
        "threads": threads,
    }
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps(order)]
    child = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if child.returncode != 0:
        lines = child.stderr.strip().splitlines() or [f"exit code {child.returncode}"]
        return row | {"status": "failed", "reason": f"{lines[-1]:.200}"}
    value = float(child.stdout.strip().splitlines()[-1])
    return row | {
        "status": "ok",
        "value": value,
        "promised": promised_mib(suite, contender, shape, dtype),
    }


def child(order: dict) -> float:
    """MiB of resident memory that one call needs beyond its inputs and outputs."""
    torch.set_num_threads(order["threads"])
    shape, dtype = Shape(**order["shape"]), getattr(torch, order["dtype"])
    contender = next(c for c in _field(order["suite"]) if c.name == order["name"])
    contender.make(make_inputs(dataclasses.replace(shape, N=8, V=512), dtype))()
    call = contender.make(make_inputs(shape, dtype))
    gc.collect()
    _give_back()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from the present size
    before = _status_bytes("VmRSS")
    output = call()
    peak = _status_bytes("VmHWM")
    return max(0.0, peak - before - output_bytes(output)) / MIB


def _give_back() -> None:
    """Free heap goes back to the system, so that the call cannot use it unseen (glibc; elsewhere nothing is done)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def output_bytes(output) -> int:
    """Bytes of the tensors in an output."""
    if isinstance(output, Tensor):
        return output.numel() * output.element_size()
    return sum(output_bytes(item) for item in output) if isinstance(output, (tuple, list)) else 0


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    print(child(json.loads(sys.argv[1])))
