"""Step: every op x dtype x case on the device against float64: the tests of the ops, in parallel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu.environment import value_row
from benchmarks.gpu.session import Session

ROOT = Path(__file__).resolve().parents[2]
FILES = ("linear_nll", "linear_vig", "linear_cross_entropy", "gaussian_blur")
DTYPES = re.compile(r"torch\.(float32|bfloat16|float16|uint8)")
WORKERS = 10
KEEP_S = 8.0  # of the step's time, to read the results
QUOTED = 5  # failures named in a row


def correctness(session: Session) -> None:
    report = session.out.with_suffix(".xml")
    report.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-q",
        "--tb=line",
        f"--junitxml={report}",
    ]
    if session.rehearse:
        command += ["tests/test_linear_nll.py", "-k", "triton-cpu and one-row and float32"]
    else:
        command += [*(f"tests/test_{name}.py" for name in FILES), "-k", "triton-cuda", "--maxfail=80"]
        if find_spec("xdist"):
            command += ["-n", str(min(WORKERS, os.cpu_count() or 1))]
    # pytest writes its report when it is interrupted, but not when it is killed
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        process.wait(max(session.left_s - KEEP_S, 1.0))
        cut = False
    except subprocess.TimeoutExpired:
        process.send_signal(2)
        cut = True
        try:
            process.wait(KEEP_S / 2)
        except subprocess.TimeoutExpired:
            process.kill()
    if not report.exists():
        session.fails("pytest left no report")
        raise SystemExit(1)
    session.case(case_of(report.read_text(), cut))


def case_of(xml: str, cut: bool = False) -> dict:
    """A row an op and dtype: how many tests passed; "wrong" where one did not, with the first of them."""
    passed: Counter = Counter()
    failed: dict[str, list[str]] = defaultdict(list)
    for test in ElementTree.fromstring(xml).iter("testcase"):
        op = test.get("classname", "").rpartition(".test_")[2] or test.get("classname", "")
        dtype = DTYPES.search(test.get("name", ""))
        name = f"{op}, {dtype.group(1) if dtype else 'any dtype'}"
        broken = [child for child in test if child.tag in ("failure", "error")]
        if broken:
            message = (broken[0].get("message") or "").splitlines() or [""]
            failed[name].append(f"{test.get('name')}: {message[0][:160]}")
        elif not any(child.tag == "skipped" for child in test):
            passed[name] += 1
    rows = []
    for name in sorted({*passed, *failed}):
        row = value_row(name, passed[name], ours=True)
        if failed[name]:
            shown = "; ".join(failed[name][:QUOTED])
            row |= {"status": "wrong", "reason": f"{len(failed[name])} of its tests fail: {shown}"}
        rows.append(row)
    label = "tests against float64" + (", cut off by the time limit" if cut else "")
    return {"label": label, "unit": "tests passed", "rows": rows}
