"""The processes of the experiment: one thread each, all taking groups of runs from the same plan.

`python -m benchmarks.evidence.workers FILE SEEDS` is one of them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.evidence import design, store
from benchmarks.evidence.design import Group, Run

POLL = 5.0  # seconds between two looks at what is done
ALONE = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


class WorkerFailed(RuntimeError):
    """A process ended before its work did."""


def possible(groups: Sequence[Group], say: Callable[[str], None]) -> list[Group]:
    """The groups whose base model is there; says which is not."""
    there = {base: (path / "config.json").is_file() for base, path in design.BASES.items()}
    for base in (base for base, is_there in there.items() if not is_there):
        left_out = len([run for run in design.runs(groups) if run.base == base])
        say(f"{design.BASES[base]} holds no checkpoint: the {left_out} runs of the {base} base are left out")
    return [group for group in groups if there[group[0].base]]


def run_all(path: Path, seeds: int, processes: int, say: Callable[[str], None]) -> int:
    """Run what is missing; returns how many lines are there then. Ctrl-C and SIGTERM end the processes too."""
    groups = possible(design.plan(seeds), say)
    wanted = set(design.runs(groups))
    log = path.with_suffix(".log")
    started, before = time.monotonic(), _done(path, wanted)
    with log.open("a", encoding="utf-8") as file, _terminated_as_interrupted():
        workers = [
            subprocess.Popen(_command(path, seeds), stdout=file, stderr=file, env=os.environ | ALONE)
            for _ in range(processes)
        ]
        try:
            told = -1
            while any(worker.poll() is None for worker in workers):
                time.sleep(POLL)
                done = _done(path, wanted)
                if done != told:
                    say(_progress(done, before, len(wanted), time.monotonic() - started))
                    told = done
                if any(worker.poll() for worker in workers):
                    raise WorkerFailed(f"a process of the experiment failed: see {log}")
        finally:
            for worker in workers:
                worker.terminate()
            for worker in workers:
                worker.wait()
    if any(worker.returncode for worker in workers):
        raise WorkerFailed(f"a process of the experiment failed: see {log}")
    log.unlink()
    return _done(path, wanted)


def _command(path: Path, seeds: int) -> list[str]:
    return [sys.executable, "-m", "benchmarks.evidence.workers", str(path), str(seeds)]


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends this process through its `finally` blocks, as Ctrl-C does."""

    def on_signal(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _done(path: Path, wanted: set[Run]) -> int:
    return len(wanted & store.read(path)[1].keys())


def _progress(done: int, before: int, wanted: int, seconds: float) -> str:
    left = ""
    if done > before:
        left = f", about {seconds / (done - before) * (wanted - done) / 60:.0f} minutes left"
    return f"{done} of {wanted} runs{left}"


def work(path: Path, groups: Sequence[Group]) -> None:
    """Take groups until none is left; one base model after the other is held in memory."""
    from benchmarks.evidence.runs import Laboratory

    laboratories: dict[str, Laboratory] = {}
    for group in store.claims(path, groups):
        base = group[0].base
        if base not in laboratories:
            laboratories[base] = Laboratory(base)
        for line in laboratories[base].lines(group):
            store.append(path, line)


def main(file: str, seeds: str) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    work(Path(file), possible(design.plan(int(seeds)), lambda text: None))


if __name__ == "__main__":
    main(*sys.argv[1:])
