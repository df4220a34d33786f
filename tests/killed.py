"""Score a dataset in children that are killed at random moments: run by tests/test_engine.py in a process of its own.

    python killed.py DATA FOLDER KILLS SEED

The parent loads torch and the model once and never computes with them, so that forking it is safe and cheap.
Two kills in five are aimed: at a random call of fsync or rename, where a store that is not careful would lose
or repeat a window. FOLDER/whole holds an uninterrupted run, FOLDER/killed-0, ... the runs that were killed and
resumed until they were complete. Each child appends its batch plans to FOLDER/<run>.plans. Prints one JSON line.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import tiny
import torch

from vig.scoring import batching
from vig.scoring.run import score_dataset
from vig.scoring.scorer import Scorer

WINDOW = 8


def child(model, data: Path, out: Path, aim: int | None = None) -> None:
    if aim is not None:
        die_at_call(aim)
    plans = os.open(f"{out}.plans", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    cut = batching.batches

    def recorded(*args, **options):
        batches = cut(*args, **options)
        os.write(plans, f"{args!r} {options!r} {batches!r}\n".encode())
        return batches

    batching.batches = recorded
    score_dataset(Scorer(model, tiny.llava_processor(), batch_tokens=256), data, out, window=WINDOW)


def die_at_call(number: int) -> None:
    """The process kills itself at the numbered call of fsync, replace or rename: before it, or right after it."""
    calls = 0

    def deadly(call):
        def called(*args):
            nonlocal calls
            calls += 1
            if calls == number and number % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            call(*args)
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)

        return called

    os.fsync, os.replace, os.rename = deadly(os.fsync), deadly(os.replace), deadly(os.rename)


def fork(child, *arguments) -> int:
    """The pid of a process that runs child(*arguments)."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            child(*arguments)
            code = 0
        finally:
            os._exit(code)
    return pid


def complete(out: Path) -> bool:
    manifest = out / "_manifest.json"
    return manifest.exists() and json.loads(manifest.read_text())["complete"]


def main(data: Path, folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    model = tiny.llava_model().to(torch.bfloat16)
    tiny.llava_processor()
    draw = random.Random(seed)
    begun = time.monotonic()
    _, status = os.waitpid(fork(child, model, data, folder / "whole"), 0)
    assert status == 0
    seconds = time.monotonic() - begun
    landed, runs, moments = 0, 0, []
    aims = itertools.cycle(
        (25, 1, 13, 19, 7)
    )  # early and late by turns, so that kills spread however fast a run is
    while landed < kills or not complete(folder / f"killed-{runs - 1}"):
        if runs == 0 or complete(folder / f"killed-{runs - 1}"):
            runs += 1
        aim = None
        if landed < kills and draw.random() < 0.4:
            aim = next(aims) + draw.randrange(6)
        pid = fork(child, model, data, folder / f"killed-{runs - 1}", aim)
        if landed < kills and aim is None:
            time.sleep(draw.uniform(0, 0.95 * seconds))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert status in (0, signal.SIGKILL), f"a resumed run failed with {status}"
        if status == signal.SIGKILL:
            landed += 1
            moments.append(len(list((folder / f"killed-{runs - 1}").glob("scores-*.parquet"))))
    print(json.dumps({"kills": landed, "runs": runs, "seconds": seconds, "windows_at_kill": moments}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
