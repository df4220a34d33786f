"""Starts the processes of a distributed test and waits for what they save."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

SECONDS = 240


def launch(program: str, ranks: int, folder: Path, *arguments: str, **environment: str) -> list:
    """What `program RANK RANKS FOLDER *arguments` has saved as FOLDER/RANK.pt, rank by rank."""
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), **environment)
    logs = [folder / f"{rank}.log" for rank in range(ranks)]
    started = [
        subprocess.Popen(
            [sys.executable, program, str(rank), str(ranks), str(folder), *arguments],
            env=env,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(SECONDS) for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(codes), "\n".join(log.read_text()[-2000:] for log in logs)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]
