"""What every step has: the device, its clock, and where cases are written as they are done."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.gpu import device
from benchmarks.gpu.runner import read_lines, stem
from benchmarks.harness import Check, Contender


@dataclass
class Session:
    """One step's process. rehearse: on a CPU, Triton's interpreter in the place of a GPU."""

    out: Path
    rehearse: bool = False
    without: Sequence[str] = ()
    limit_s: float = 60.0
    started: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    @property
    def left_s(self) -> float:
        """Until this step is ended."""
        return self.limit_s - (time.monotonic() - self.started)

    def cases_of(self, step: str) -> list[dict]:
        """Of an earlier step of this run; [] where it has none."""
        return read_lines(self.out.with_name(f"{stem(step)}.jsonl")).cases

    def at(self, name: str | None, ours: bool = False) -> None:
        """Names the contender that is to blame if the process ends now; None: nobody."""
        self._write({"at": None if name is None else {"name": name, "ours": ours}})

    def fails(self, reason: str) -> None:
        self._write({"reason": reason})

    def case(self, case: dict) -> None:
        """Stores a case; one of a rehearsal says that it is."""
        self._write({"case": case | {"rehearsal": True} if self.rehearse else case})

    def _write(self, entry: dict) -> None:
        with self.out.open("a") as lines:
            lines.write(json.dumps(entry) + "\n")

    def contest(
        self,
        field: Sequence[Contender],
        inputs: Any,
        judge: Callable[[Contender, Any], Check],
        *,
        rounds: int = 15,
        seconds: float = 5.0,
        peaks: bool = True,
    ) -> dict:
        """harness.measure of the contenders that this process was not told to leave out.

        p20/p50/p80_ms are device time without launch gaps; `call_ms` the clock's time of one call on an idle device;
        `kernels` the names of what ran longest, by which a row is told to be a library's fast path or its fallback.
        """
        ours = {contender.name: contender.ours for contender in field}

        def say(text: str) -> None:
            stage, _, name = text.partition(" ")
            if stage in ("verifying", "warming"):
                self.at(name, ours[name])
            elif stage == "round":
                self.at(None)

        found = harness.measure(
            [guarded(contender) for contender in field if contender.name not in self.without],
            inputs,
            judge,
            rounds=1 if self.rehearse else rounds,
            seconds=0.0 if self.rehearse else seconds,
            timer=device.clock(self.device),
            beside=device.beside(self.device, peaks),
            settle_s=0.0,
            say=say,
        )
        self.at(None)
        for row in found["rows"]:
            if row["status"] == "ok":
                path = device.path_of(row["kernels"])
                row["note"] = ", ".join(text for text in (row["note"], path) if text)
        device.release(self.device)
        return found


def guarded(contender: Contender) -> Contender:
    """Whatever it raises, the device is looked at: a broken context breaks off the step, not just the contender."""

    def make(inputs: Any) -> Callable[[], Any]:
        run = device.guarded(contender.make)(inputs)
        return device.guarded(run)

    return replace(contender, make=make)


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
