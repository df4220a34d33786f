"""What lies in a folder of scores: its shards, its manifest, the settings that bind it, the jobs that fill it.

    scores/                       scores/                      one job array, `--shard i/n`
      scores-00000.parquet          shard-0-of-2/
      scores-00001.parquet            scores-00000.parquet
      _manifest.json                  _manifest.json
                                    shard-1-of-2/
                                      scores-00001.parquet
                                      _manifest.json

Readers of Parquet folders (pandas, pyarrow) skip names that begin with "_" or ".", so the folder is a table to them.
The jobs of an array write at the same time, each into its own folder, so that no lock is shared between
machines. Readers take the folder above them as one, in the order of the windows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vig.data.files import StoreError
from vig.data.kinds import lacking, other_kind, taken

MANIFEST = "_manifest.json"
OLD_MANIFEST = "manifest.json"  # as early folders have it: read, and replaced by the next run
# Settings that may differ between a run and its resumption: they do not change what is scored.
NOT_BINDING = frozenset(
    {
        "library_version",
        "data",
        "image_root",
        "batch_tokens",
        "batch_size",
        "tensor_parallel_size",
        "noise_floor",
        "sharing",
        "data_format",
        "stop_ids",
    }
)
ABOUT_THE_DATA = frozenset({"data_fingerprint", "limit", "window", "shard"})
# Settings that may differ between scores that are read as one: columns beside the likelihoods, which do not change.
BESIDE = frozenset({"stats"})
JOB = re.compile(r"shard-(\d+)-of-(\d+)")


class SettingsDiffer(StoreError):
    """Scores were made with other settings. ``differences``: [(setting, value on one side, value on the other)]."""

    def __init__(
        self, problem: str, sides: tuple[str, str], differences: list[tuple[str, Any, Any]], cure: str
    ):
        self.differences = differences
        lines = [
            "  the data changed since"
            if name == "data_fingerprint"
            else f"  {name}: {sides[0]} {old!r}, {sides[1]} {new!r}"
            for name, old, new in differences
        ]
        super().__init__("\n".join([f"{problem}:", *lines, cure]))


# --- shards ---


def shard_name(window: int) -> str:
    return f"scores-{window:05d}.parquet"


def window_of(shard: Path) -> int:
    return int(shard.stem.removeprefix("scores-"))


def shards_in(folder: Path) -> list[Path]:
    """The shards of one folder, by window."""
    files = [file for file in folder.glob("scores-*.parquet") if file.stem[7:].isdigit()]
    return sorted(files, key=window_of)


@dataclass(frozen=True)
class Shards:
    """Scores as they were found once, so that several passes read the same while `vig score` writes beside them.

    It stands for its path wherever scores are read. files: may name a file twice, as the path may.
    """

    path: str | Path | Sequence[str | Path]
    files: tuple[Path, ...]
    stamps: dict[Path, Any]  # of the files
    unfinished: tuple[str, ...]  # as `unfinished_folders` says

    @classmethod
    def found(cls, path: str | Path | Sequence[str | Path]) -> Shards:
        # Asked first: of scores that are completed in between, nothing is missing below.
        unfinished = tuple(unfinished_folders(score_files(path)))
        files = tuple(score_files(path))
        return cls(path, files, {file: _stamp(file) for file in files}, unfinished)

    def __str__(self) -> str:
        return str(self.path) if isinstance(self.path, str | Path) else " ".join(map(str, self.path))

    def refuse_changed(self, file: Path) -> None:
        """Raises StoreError where another file took its place, as `vig score --retry failed` does."""
        if _stamp(file) != self.stamps[file]:
            raise StoreError(
                f"{file} was written anew while the scores were read. When `vig score` has ended, run the same "
                "command again"
            )


def _stamp(file: Path) -> tuple[int, int] | None:
    with suppress(OSError):  # whoever opens it says why it cannot be read
        about = file.stat()
        return about.st_size, about.st_mtime_ns
    return None


def score_files(path: str | Path | Sequence[str | Path] | Shards) -> list[Path]:
    """The shards of a file, a folder, a folder of folders (one a job of ``--shard i/n``), or a list of these."""
    if isinstance(path, Shards):
        return list(path.files)
    if not isinstance(path, str | Path):
        return [file for part in path for file in score_files(part)]
    path = Path(path)
    if path.is_file():
        if path.suffix != ".parquet" or other_kind(path, "scores"):
            raise StoreError(lacking(path, "scores"))
        return [path]
    found = shards_in(path)
    if not found and path.is_dir():
        jobs = job_folders(path)
        folders = jobs.values() if jobs else sorted(folder for folder in path.iterdir() if folder.is_dir())
        found = [file for folder in folders for file in shards_in(folder)]
        if jobs:  # as one run would have written them
            found.sort(key=window_of)
    if not found:
        raise StoreError(lacking(path, "scores"))
    return found


# --- the jobs of an array ---


def job_folders(folder: Path) -> dict[tuple[int, int], Path]:
    """(i, n) -> the folder of job i of n."""
    found = {}
    for path in sorted(folder.glob("shard-*-of-*")):
        name = JOB.fullmatch(path.name)
        if name and path.is_dir():
            found[int(name[1]), int(name[2])] = path
    return found


def output_folder(folder: str | Path, shard: tuple[int, int] | None) -> Path:
    """Where a run writes: the folder itself, or the folder of its job within.

    Raises StoreError where the data is being scored there in another number of parts, or another command wrote there.
    """
    folder = Path(folder)
    other = taken(folder, "scores")
    if other is not None:
        raise StoreError(other)
    jobs = job_folders(folder)
    other = next((n for _, n in jobs if shard is None or n != shard[1]), None)
    if other is not None:
        raise StoreError(
            f"{folder} holds the scores of {other} jobs. Give --shard i/{other} to resume them, or another "
            "output folder."
        )
    if shard is None:
        return folder
    if shards_in(folder):
        raise StoreError(
            f"{folder} holds the scores of one run over all the data. Leave out --shard to resume it, or give "
            "another output folder."
        )
    return folder / f"shard-{shard[0]}-of-{shard[1]}"


def siblings(folder: Path) -> Iterator[Path]:
    """The folders of the other jobs, where `folder` is the folder of a job."""
    if JOB.fullmatch(folder.name):
        yield from (path for path in job_folders(folder.parent).values() if path.name != folder.name)


# --- manifest and settings ---


def read_manifest(folder: Path) -> dict | None:
    """settings, complete, notes and shards of a folder; None where there is none. Raises StoreError."""
    path = folder / MANIFEST
    if not path.exists():
        path = folder / OLD_MANIFEST
    try:
        manifest = json.loads(path.read_text())
        return {name: manifest[name] for name in ("settings", "complete", "notes", "shards")}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        cure = "Delete it: the shards beside it are checked and listed again."
        raise StoreError(f"{path} is damaged ({error}). {cure}") from error


def recorded_setting(folder: str | Path, name: str) -> Any:
    """A setting that the scores in a folder, or of a job in it, were made with; None where there are none."""
    for place in (Path(folder), *job_folders(Path(folder)).values()):
        manifest = read_manifest(place) if place.is_dir() else None
        if manifest is not None and manifest["shards"]:
            return manifest["settings"].get(name)
    return None


def unfinished_folders(files: Iterable[Path]) -> list[str]:
    """A line for each folder of these shards that scoring has not come to the end of, and for missing jobs."""
    lines: list[str] = []
    arrays: dict[tuple[Path, int], None] = {}
    for folder in dict.fromkeys(path.parent for path in files):
        job = JOB.fullmatch(folder.name)
        if job:
            arrays[folder.parent, int(job[2])] = None
        else:
            lines += _unfinished(folder)
    for parent, count in arrays:
        jobs = job_folders(parent)
        for folder in jobs.values():
            lines += _unfinished(folder)
        missing = [str(index) for index in range(count) if (index, count) not in jobs]
        if missing:
            lines.append(f"{parent}: of {count} jobs these have not begun: {', '.join(missing)}")
    return lines


def _unfinished(folder: Path) -> list[str]:
    manifest = read_manifest(folder)
    if manifest is None:
        return []
    lines = []
    if not manifest["complete"]:
        lines.append(f"{folder}: scoring is unfinished ({len(manifest['shards'])} windows so far)")
    there = {window_of(shard) for shard in shards_in(folder)}
    gone = [shard_name(int(window)) for window in manifest["shards"] if int(window) not in there]
    if gone:
        lines.append(
            f"{folder}: {', '.join(gone[:5])}{f' and {len(gone) - 5} more' if len(gone) > 5 else ''} went missing: "
            "run `vig score` again, it redoes those windows"
        )
    return lines


def _flat(settings: dict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat


def settings_differences(old: dict, new: dict) -> list[tuple[str, Any, Any]]:
    """Binding settings that differ, nested ones by dotted name: [(name, old value, new value)]."""
    old, new = _flat(old), _flat(new)
    names = [name for name in {**old, **new} if name not in NOT_BINDING]
    return [(name, old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)]


def refuse_differences(folder: Path, old: dict, new: dict) -> None:
    """Raises SettingsDiffer where the scores of `folder` were made with other binding settings."""
    differences = settings_differences(old, new)
    if differences:
        raise SettingsDiffer(
            f"{folder} holds scores made with other settings",
            ("the folder has", "this run has"),
            differences,
            "Give the same settings to resume, or another output folder to score anew.",
        )


def refuse_mixture(first: Path, settings: dict, path: Path, others: dict) -> None:
    """Raises SettingsDiffer where two shards hold values that cannot be compared; they may be of different data."""
    differences = [
        row for row in settings_differences(settings, others) if row[0] not in ABOUT_THE_DATA | BESIDE
    ]
    if differences:
        raise SettingsDiffer(
            f"{first} and {path} hold scores made with different settings",
            ("the first has", "the second"),
            differences,
            "Their values cannot be compared: select from each of them on its own.",
        )
