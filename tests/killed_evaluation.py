"""Evaluate in children that are killed: run by tests/test_evaluation_run.py in a process of its own.

    python killed_evaluation.py DATA IMAGES FOLDER SEED

As in killed.py the parent loads torch and never computes. Children die before or after a call of fsync, replace or
rename, then one at a random moment; the last one ends by itself. FOLDER/whole was never interrupted.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from killed import die_at_call, fork
from tiny_benchmarks import CHECKPOINT

from vig.evaluation.answering import Answerer
from vig.evaluation.run import evaluate
from vig.evaluation.settings import AnswerSettings, EvalSpec

# The calls of fsync and rename at which a run's children die: 1 to 3 try the folder, 4 to 6 write the manifest, then
# each batch is one; predictions, measures and manifest are three each.
AIMS = ((2, 7, 8, 9, 8), (12, 10, 8, 12))


def child(data: Path, images: Path, out: Path, aim: int | None) -> None:
    if aim is not None:
        die_at_call(aim)
    log = os.open(f"{out}.batches", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    answer = Answerer.answer

    def recorded(self, batch):
        os.write(log, json.dumps([asked.question.key for asked in batch]).encode() + b"\n")
        return answer(self, batch)

    Answerer.answer = recorded
    spec = EvalSpec("pope", data, image_root=images, resamples=50)
    evaluate(str(CHECKPOINT), spec, out, AnswerSettings(batch_size=3))


def main(data: Path, images: Path, folder: Path, seed: int) -> None:
    torch.set_num_threads(1)
    draw = random.Random(seed)
    begun = time.monotonic()
    _, status = os.waitpid(fork(child, data, images, folder / "whole", None), 0)
    assert status == 0
    seconds = time.monotonic() - begun
    kills, lines = 0, []
    for run, aims in enumerate(AIMS):
        out = folder / f"killed-{run}"
        for aim in (*aims, "any moment", None):
            pid = fork(child, data, images, out, aim if isinstance(aim, int) else None)
            if aim == "any moment":
                time.sleep(draw.uniform(0.3, 0.9) * seconds)
                os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            assert status in (0, signal.SIGKILL), f"a resumed run failed with {status}"
            kills += status == signal.SIGKILL
            log = out / "_batches.jsonl"
            lines.append(log.read_bytes().count(b"\n") if log.exists() else -1)
    print(json.dumps({"kills": kills, "seconds": seconds, "batches_at_kill": lines}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
