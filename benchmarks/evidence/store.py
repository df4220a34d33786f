"""The lines of the experiment on disk, and who may add to them.

A file of JSON lines: the first tells of the machine and the design, every other of one run, in the order in which they
ended. A line is appended whole under a lock; what a killed process left of one is cut off by the next. So a second
start goes on where the first one stopped, whatever stopped it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from benchmarks.evidence import design
from benchmarks.evidence.design import Group, Run

NAME = "evidence.jsonl"
HEAD = "design"  # the field that tells the first line from the others


class OtherDesign(ValueError):
    """A file that holds runs of another design."""


def design_now() -> dict:
    """What the runs of this checkout have in common, as it reads back from JSON."""
    facts = {
        "samples": design.SAMPLES,
        "p": design.P,
        "easy_nats": design.EASY_NATS,
        "training": design.TRAINING,
        "exams": design.EXAMS,
        "seeds": list(design.SEEDS),
    }
    return json.loads(json.dumps(facts))


def read(path: Path) -> tuple[dict, dict[Run, dict]]:
    """The first line, and each run's; ({}, {}) of a file that is not there. A line cut short at the end is left out."""
    if not path.exists():
        return {}, {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    head = lines[0] if lines and HEAD in lines[0] else {}
    return head, {Run.of(line): line for line in lines if HEAD not in line}


def begin(path: Path, head: dict) -> None:
    """Write the first line of a new file; of one that is there check that it is of this design."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path) as file:
        if not file.tell():
            file.write(json.dumps(head | {HEAD: design_now()}) + "\n")
    found = read(path)[0].get(HEAD)
    if found != design_now():
        raise OtherDesign(f"{path} holds runs of another design: {found}. Give another folder with --out")


def append(path: Path, line: dict) -> None:
    with _locked(path) as file:
        file.write(json.dumps(line) + "\n")


@contextmanager
def _locked(path: Path) -> Iterator[IO[str]]:
    """The file, open at its end, behind the last whole line, for this process alone."""
    with path.open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read()
        whole = text[: text.rfind("\n") + 1]
        if len(whole) < len(text):
            file.truncate(len(whole.encode()))
        file.seek(0, os.SEEK_END)
        yield file
        file.flush()
        os.fsync(file.fileno())


def missing(path: Path, groups: Iterable[Group]) -> list[Group]:
    """The groups with runs that have no line, with these runs alone."""
    done = read(path)[1]
    left = (tuple(run for run in group if run not in done) for group in groups)
    return [group for group in left if group]


def claims(path: Path, groups: Iterable[Group]) -> Iterator[Group]:
    """One group of missing runs after the other, each held by this process alone until the next is asked for.

    A claim is a lock on a temporary file, which the system takes back when the process ends, however it does.
    """
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"vig-evidence-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    for group in groups:
        run = group[0]
        name = f"{run.base}-{run.share:g}-{run.seed}-{run.arm}".replace(" ", "-")
        with (folder / name).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield from missing(path, [group])
