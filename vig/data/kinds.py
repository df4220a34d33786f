"""What the commands leave behind, known by the names of its files: so that a path in the wrong place is told what it
is, and which command makes what belongs there."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from vig.data.files import StoreError


class Kind(NamedTuple):
    """marks: regular expressions of names; a folder of this kind holds a file of each. command: makes one."""

    name: str
    text: str  # with its article
    marks: tuple[str, ...]
    command: str


KINDS = {
    kind.name: kind
    for kind in (
        Kind("scores", "a folder of scores", (r"scores-\d{5,}\.parquet",), "vig score MODEL DATA"),
        Kind("selection", "a selection", (r"selection-\d{5,}\.parquet",), "vig select SCORES"),
        Kind(
            "predictions",
            "a folder of predictions",
            (r"predictions\.jsonl|_batches\.jsonl", r"_manifest\.json"),
            "vig eval MODEL DATA --task NAME",
        ),
        Kind("checkpoint", "a checkpoint", (r"config\.json", r".+\.safetensors"), "vig train MODEL DATA"),
        Kind("adapter", "a PEFT adapter", (r"adapter_config\.json",), "vig train MODEL DATA"),
        Kind("report", "a page", (), "vig report SCORES"),
    )
}
MARKS = re.compile("|".join([mark for kind in KINDS.values() for mark in kind.marks] + [r"shard-\d+-of-\d+"]))
OF_FILES = {  # a single file, by its name
    r"scores-\d{5,}\.parquet": "scores",
    r"selection-\d{5,}\.parquet": "selection",
    r"predictions\.jsonl": "predictions",
    r".+\.safetensors": "checkpoint",
    r".+\.html?": "report",
}


def kind_of(path: str | Path) -> Kind | None:
    """What a file or folder is, by names alone; None for anything else, such as data, and for what is not there.

    The folder above the jobs of an array (`vig score --shard`) is one of scores too.
    """
    path = Path(path)
    if path.is_dir():
        names = [name for name in _names(path) if MARKS.fullmatch(name)]
        for kind in KINDS.values():
            if kind.marks and all(any(re.fullmatch(mark, name) for name in names) for mark in kind.marks):
                return kind
        jobs = (path / name for name in names if re.fullmatch(r"shard-\d+-of-\d+", name))
        return KINDS["scores"] if any(kind_of(job) is KINDS["scores"] for job in jobs) else None
    found = (name for mark, name in OF_FILES.items() if path.is_file() and re.fullmatch(mark, path.name))
    return KINDS.get(next(found, ""))


def _names(folder: Path) -> list[str]:
    with suppress(OSError):  # whoever opens its files says that it cannot be read
        return os.listdir(folder)
    return []


def other_kind(path: str | Path, wanted: str) -> str | None:
    """A sentence where the path is of another kind than `wanted`, a name of KINDS, with the cure; else None."""
    kind = kind_of(path)
    if kind is None or kind.name == wanted:
        return None
    right = KINDS[wanted]
    return f"{path} is {kind.text}, not {right.text}. Give what `{right.command} -o DIR` wrote"


def lacking(path: str | Path, wanted: str) -> str:
    """Why nothing of the kind `wanted` can be read at a path, and the cure."""
    path, right = Path(path), KINDS[wanted]
    other = other_kind(path, wanted)
    if other is not None:
        return other
    if path.exists() and (path.is_file() or _names(path)):
        return f"{path} is not {right.text}. Give what `{right.command} -o DIR` wrote"
    state = "is empty" if path.exists() else "does not exist"
    return f"{path} {state}. `{right.command} -o {path}` makes {right.text}"


def taken(folder: str | Path, wanted: str) -> str | None:
    """A sentence where an output folder holds what another command wrote; None where `wanted`, or nothing, is there."""
    kind = kind_of(folder)
    if kind is None or kind.name == wanted:
        return None
    return f"{folder} is {kind.text}, which `{kind.command}` wrote. Give another output folder"


def refuse_selections(*compared: object) -> None:
    """Raises StoreError where one of what is to be compared is a selection: scores are."""
    for one in compared:
        if isinstance(one, str | Path) and kind_of(one) is KINDS["selection"]:
            raise StoreError(
                f"{one} is a selection, and scores are compared. For two selections: read both with "
                "pyarrow.parquet.read_table, join them by key, and count where keep (of tokens: token_keep) is true"
            )
