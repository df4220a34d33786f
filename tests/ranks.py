"""Starts the processes of a distributed test and waits for what they save."""

from __future__ import annotations

import multiprocessing
import os
import socket
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


def run_command(words: list, ranks: int, logs: Path, before=lambda rank: None) -> list[tuple[int, str]]:
    """(exit code, what it says) of `vig WORDS` on each rank, in forks of this process, as torchrun would start them.

    before(rank): called in each first.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    arguments = (ranks, port, [str(word) for word in words], logs, before)
    started = [fork.Process(target=_command, args=(rank, *arguments)) for rank in range(ranks)]
    for process in started:
        process.start()
    try:
        for process in started:
            process.join(SECONDS)
    finally:
        for process in started:
            process.kill()
    return [(process.exitcode, (logs / f"{rank}.txt").read_text()) for rank, process in enumerate(started)]


def take_place(rank: int, ranks: int, port: int | str) -> None:
    """The environment that torchrun gives to a process of one machine."""
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in place.items()})


def _command(rank: int, ranks: int, port: int, words: list[str], logs: Path, before) -> None:
    from vig.cli import main

    take_place(rank, ranks, port)
    torch.set_num_threads(1)
    said = os.open(logs / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115 (not pytest's)
    sys.argv = ["vig", *words]
    before(rank)
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
