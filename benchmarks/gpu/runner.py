"""Steps of the GPU suite: each in a process of its own, stored as it is done, within a budget of minutes.

A step that dies or hangs costs itself alone. Where its process says which contender it was at, the step is run again
without that one, and the contender's row says what it did.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

MARGIN_S = 6.0  # of the budget that no step may use: to end a process and to store
GRACE_S = 5.0  # from SIGTERM to SIGKILL
AGAIN = 2  # times that a step is run again without a contender that killed it
TAIL = 300  # characters of a log that a reason quotes


@dataclass(frozen=True)
class Step:
    """`run` is "module:function", called with (Session, *arguments) in the step's process."""

    name: str
    run: str
    arguments: tuple = ()
    limit_s: float = 60.0
    least_s: float = 10.0  # with less time left the step is not begun


@dataclass
class Outcome:
    """What became of a step: "ok", "failed", "timed out" or "not measured", and the cases that it stored."""

    status: str
    seconds: float = 0.0
    reason: str = ""
    cases: list[dict] = field(default_factory=list)
    at: dict | None = None  # {"name", "ours"} of the contender at hand when the process ended


Launch = Callable[[Step, float, Sequence[str]], Outcome]  # (step, limit in seconds, contenders left out)


def run_steps(
    steps: Sequence[Step],
    budget_s: float,
    launch: Launch,
    store: Callable[[list[dict], list[dict]], None],
    *,
    done: tuple[list[dict], list[dict]] = ((), ()),
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = print,
) -> tuple[list[dict], list[dict]]:
    """(step records, cases), stored after each step by `store`. `done`: what an earlier call has measured."""
    started = clock()
    records, cases = list(done[0]), list(done[1])
    finished = {record["name"] for record in records if record["status"] == "ok"}
    records = [record for record in records if record["name"] in finished]
    cases = [case for case in cases if case["step"] in finished]
    for number, step in enumerate(steps, 1):
        head = f"[{number}/{len(steps)}] {step.name}"
        if step.name in finished:
            say(f"{head}: measured before")
            continue
        outcome = _one(step, lambda: budget_s - MARGIN_S - (clock() - started), launch)
        reason = f": {outcome.reason}" if outcome.reason else ""
        say(f"{head}: {outcome.status} after {outcome.seconds:.0f} s{reason}")
        records.append({"name": step.name, **_record(outcome)})
        cases += [{"step": step.name, **case} for case in outcome.cases]
        store(records, cases)
    return records, cases


def _record(outcome: Outcome) -> dict:
    return {"status": outcome.status, "seconds": outcome.seconds, "reason": outcome.reason}


def _one(step: Step, left: Callable[[], float], launch: Launch) -> Outcome:
    """A step, and again without whoever killed it."""
    without: list[str] = []
    lost: list[dict] = []
    seconds = 0.0
    while True:
        if left() < step.least_s:
            reason = f"{max(left(), 0):.0f} s left of the minutes, it needs {step.least_s:.0f}"
            outcome = Outcome("not measured", reason=reason)
        else:
            outcome = launch(step, min(step.limit_s, left()), tuple(without))
        seconds += outcome.seconds
        culprit = outcome.at if outcome.status in ("failed", "timed out") else None
        if culprit is None or culprit["name"] in without or len(without) == AGAIN:
            break
        without.append(culprit["name"])
        lost.append(_lost_row(culprit, outcome))
    outcome.seconds = seconds
    return _with_lost(step, outcome, lost)


def _lost_row(culprit: dict, outcome: Outcome) -> dict:
    reason = f"ended the step's process ({outcome.status}: {outcome.reason})"
    return {"baseline": False, "work": 1.0, "note": "", **culprit, "status": "failed", "reason": reason}


def _with_lost(step: Step, outcome: Outcome, lost: list[dict]) -> Outcome:
    """The rows of those who were left out, in the step's last case."""
    if lost and not outcome.cases:
        outcome.cases.append({"label": step.name, "rows": []})
    for row in lost:
        outcome.cases[-1]["rows"].append(row)
    return outcome


class Processes:
    """Runs a step as `python -m benchmarks.gpu.child`, its output in a log of its own."""

    def __init__(self, folder: Path, environment: dict[str, str], rehearse: bool):
        self.folder, self.environment, self.rehearse = folder, environment, rehearse
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, step: Step, limit_s: float, without: Sequence[str]) -> Outcome:
        lines, log = (self.folder / f"{stem(step.name)}.{kind}" for kind in ("jsonl", "log"))
        lines.unlink(missing_ok=True)
        order = {"step": asdict(step), "out": str(lines), "rehearse": self.rehearse, "without": list(without)}
        order["limit_s"] = limit_s
        started = time.monotonic()
        with log.open("a") as sink:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu.child", json.dumps(order)],
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )
            try:
                code = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
        outcome = read_lines(lines)
        if code is None:
            outcome = replace(outcome, status="timed out", reason=f"over {limit_s:.0f} s")
        elif code != 0:
            outcome = replace(outcome, status="failed", reason=outcome.reason or _last_line(log, code))
        return replace(outcome, seconds=time.monotonic() - started)


def stem(name: str) -> str:
    """Of the files of a step."""
    return "".join(c if c.isalnum() else "-" for c in name).strip("-")


def _end(process: subprocess.Popen) -> None:
    """The process and all that it started; its group outlives it where it left workers behind."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            continue
        time.sleep(0.05)


def read_lines(path: Path) -> Outcome:
    """What a step's process wrote; a last line that was cut off is left out."""
    outcome = Outcome("ok")
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if "case" in entry:
            outcome.cases.append(entry["case"])
        elif "at" in entry:
            outcome.at = entry["at"]
        elif "reason" in entry:
            outcome.reason = entry["reason"]
    return outcome


def _last_line(log: Path, code: int) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"{how}; {lines[-1][:TAIL]}" if lines else how
