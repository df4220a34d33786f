"""A folder of predictions: what an evaluation leaves behind, and goes on from after it was killed at any instant.

out/
  predictions.jsonl   one line a question, in reading order: its answer, its truth, what was read of it
  measures.json       figures with intervals, counts, where it all comes from
  _errors.jsonl       the questions that could not be asked, where there are any
  _manifest.json      what decides the predictions: another model or prompt needs another folder
  _batches.jsonl      while it runs: one line a batch, appended and synced; a torn last line is dropped
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import vig
from vig.data.error_log import ErrorLog
from vig.data.files import StoreError, explain_write_errors, whole_file, write_atomically
from vig.data.kinds import other_kind, taken
from vig.store.folder import MANIFEST, SettingsDiffer

PREDICTIONS, MEASURES, BATCHES, ERRORS = (
    "predictions.jsonl",
    "measures.json",
    "_batches.jsonl",
    "_errors.jsonl",
)

Row = dict[str, Any]


class PredictionFolder:
    """The rows that a folder holds, by key, and how more are added. The folder must be locked.

    settings: `EvalSpec.binding`. Raises SettingsDiffer where the folder's predictions were made with others, StoreError
    for a damaged manifest, and where another command wrote there.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        other = taken(folder, "predictions")
        if other is not None:
            raise StoreError(other)
        self.folder, self.settings = folder, dict(settings)
        manifest = read_manifest(folder)
        self.found: Row | None = None
        self.rows: dict[str, Row] = {}
        if manifest is not None:
            self._refuse(manifest["settings"], self.settings)
            self.found = manifest["found"]
            self.rows = {row["key"]: row for row in self._stored()}

    def _stored(self) -> Iterable[Row]:
        if (self.folder / PREDICTIONS).exists():
            yield from read_predictions(self.folder)
        if (self.folder / BATCHES).exists():
            for line in self._whole_lines():
                yield from line

    def _whole_lines(self) -> Iterable[list[Row]]:
        """The batches that were written to their end; what a kill left of another one is cut off."""
        content = (self.folder / BATCHES).read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            with explain_write_errors(self.folder):
                os.truncate(self.folder / BATCHES, end)
        return [json.loads(line) for line in content[:end].splitlines()]

    def _refuse(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        if names:
            raise SettingsDiffer(
                f"{self.folder} holds predictions made with other settings",
                ("the folder has", "this run has"),
                [(name, old.get(name), new.get(name)) for name in names],
                "Give the same settings to resume, or another output folder to answer anew.",
            )

    def begin(self, found: Mapping[str, Any]) -> None:
        """found: what is known once the model is loaded; it binds as the settings do."""
        if self.found is not None and self.rows:
            self._refuse(self.found, found)
        self.found = dict(found)
        self._write_manifest(complete=False)

    def append(self, rows: Sequence[Row]) -> None:
        """Adds the rows of one batch, all of them or none."""
        with explain_write_errors(self.folder), open(self.folder / BATCHES, "ab") as file:
            file.write(json.dumps(rows, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows |= {row["key"]: row for row in rows}

    def finish(self, rows: Sequence[Row], measures: Mapping[str, Any]) -> ErrorLog:
        """Writes predictions, measures and errors; the log of batches goes when they stand."""
        with whole_file(self.folder / PREDICTIONS) as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        text = json.dumps(measures, ensure_ascii=False, indent=1, default=str)
        write_atomically(self.folder / MEASURES, text.encode() + b"\n")
        with ErrorLog(self.folder / ERRORS) as log:
            log.extend((row["key"], row["id"], row["error"]) for row in rows if "error" in row)
        if not log.count:
            (self.folder / ERRORS).unlink(missing_ok=True)
        self._write_manifest(complete=True)
        (self.folder / BATCHES).unlink(missing_ok=True)
        return log

    def _write_manifest(self, complete: bool) -> None:
        manifest = {
            "settings": self.settings, "found": self.found, "complete": complete, "library_version": vig.__version__,
        }  # fmt: skip
        text = json.dumps(manifest, ensure_ascii=False, indent=1, default=str)
        write_atomically(self.folder / MANIFEST, text.encode() + b"\n")


def read_manifest(folder: Path) -> Row | None:
    """settings, found and complete of a folder; None where there is none. Raises StoreError."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        return {name: manifest[name] for name in ("settings", "found", "complete")}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        cure = "Give another output folder; a folder of scores is none of predictions."
        raise StoreError(f"{path} is no manifest of predictions ({error}). {cure}") from error


def read_predictions(path: str | Path) -> list[Row]:
    """The rows of a predictions.jsonl, or of the folder that holds it. Raises StoreError."""
    path = Path(path)
    file = path / PREDICTIONS if path.is_dir() else path
    other = other_kind(path, "predictions")
    if other is not None:
        raise StoreError(other)
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # splitlines() cuts at U+2028 within a text too
        rows = [json.loads(line) for line in lines if line]
        if not all("key" in row and "id" in row for row in rows):
            raise ValueError("a line without key and id")
        return rows
    except OSError as error:
        cure = "`vig eval MODEL DATA --task NAME -o DIR` writes it"
        raise StoreError(f"no predictions at {file} ({error.strerror}). {cure}") from None
    except (ValueError, TypeError) as error:
        raise StoreError(
            f"{file} holds no predictions ({error}). Give a file that `vig eval` wrote"
        ) from None
