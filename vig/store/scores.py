"""Scores on disk: Parquet shards, manifest, lock, resume, and streaming readers.

A folder of scores holds one Parquet file a window (``scores-00000.parquet``), one row a sample, and
``_manifest.json``: the settings of the run and the finished shards. A shard appears under its name only when
it is whole (temporary name, fsync, rename), so a process may be killed at any instant: the next run finds
each window either finished or absent.

    key, id, source, status  string      status: "ok" | "text_only" | "error: <message>"
    n_tokens                 int32       answer tokens; 0 in error rows
    vig, nll_image, nll_null float64     means over the answer tokens, nats; null where not defined
    token_ids, positions     list<int32> position 0 marks a new turn; null in error rows
    token_nll_image          list<float32>
    token_nll_null           list<float32>   null in text-only rows, which have one pass
    token_kl                 list<float32>   only where asked for (`vig.store.token_stats`): KL(p_image || p_null)
    token_entropy_image, token_entropy_null  list<float32>, likewise

Text-only and error rows have null vig, never 0. The settings stand as JSON in every file's metadata under
the key "vig", so a single shard explains itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata as package_metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vig.data.files import FolderLock, StoreError, lock_folder, write_atomically
from vig.store.folder import (
    MANIFEST,
    OLD_MANIFEST,
    Shards,
    read_manifest,
    refuse_differences,
    refuse_mixture,
    score_files,
    shard_name,
    shards_in,
    siblings,
    unfinished_folders,
    window_of,
)
from vig.store.rows import METADATA_KEY, ScoreBlock, ScoreRow
from vig.store.token_stats import TOKEN_STATS

SCHEMA_VERSION = 1
Scores = str | Path | Sequence[str | Path] | Shards | pa.Table
PARQUET = {"compression": "zstd", "compression_level": 1, "use_dictionary": ["source", "status"]}


def normal_settings(settings: dict) -> dict:
    """Settings as they read back from JSON, with the schema and library versions filled in."""
    try:
        library = package_metadata.version("vig-kernels")
    except package_metadata.PackageNotFoundError:
        library = "unknown"
    return json.loads(
        json.dumps({"schema_version": SCHEMA_VERSION, "library_version": library, **settings}, default=str)
    )


def write_shard(
    folder: str | Path, window: int, rows: ScoreBlock | Iterable[ScoreRow] | pa.Table, settings: dict
) -> dict:
    """Write one window as a finished shard and return its manifest entry.

    Needs no lock and no manifest, so that remote workers may call it; their driver then calls
    ``ScoreWriter.register(window, entry)``.
    """
    if not isinstance(rows, pa.Table):
        rows = _table(rows, settings)
    document = json.dumps(normal_settings(settings), sort_keys=True)
    sink = pa.BufferOutputStream()
    pq.write_table(rows.replace_schema_metadata({METADATA_KEY: document}), sink, **PARQUET)
    content = sink.getvalue()
    path = Path(folder) / shard_name(window)
    write_atomically(path, content)
    return _entry(path.name, content.size, rows)


def replace_rows(
    folder: str | Path, window: int, rows: ScoreBlock | Iterable[ScoreRow], settings: dict
) -> dict:
    """Rewrite a finished shard, the rows of the given keys replaced and the order kept; its new manifest entry.

    Like ``write_shard`` it needs no lock."""
    path = Path(folder) / shard_name(window)
    new = _table(rows, settings)
    old = pq.read_table(path).replace_schema_metadata(None)
    place = {key: row for row, key in enumerate(old["key"].to_pylist())}
    order = np.arange(len(old))
    for row, key in enumerate(new["key"].to_pylist()):
        if key not in place:
            raise StoreError(f"{path} has no sample {key!r} to replace")
        order[place[key]] = len(old) + row
    return write_shard(folder, window, pa.concat_tables([old, new]).take(order), settings)


def _table(rows: ScoreBlock | Iterable[ScoreRow], settings: dict) -> pa.Table:
    block = rows if isinstance(rows, ScoreBlock) else ScoreBlock.from_rows(rows)
    return block.table(settings.get("stats", ()))


def _entry(name: str, size: int, rows: pa.Table) -> dict:
    status = rows["status"]
    return {
        "file": name,
        "bytes": size,
        "rows": len(rows),
        "text_only": pc.sum(pc.equal(status, "text_only")).as_py() or 0,
        "errors": pc.sum(pc.starts_with(status, "error: ")).as_py() or 0,
        "tokens": pc.sum(rows["n_tokens"]).as_py() or 0,
    }


class ScoreWriter:
    """A folder of scores opened for writing; resumes what is there, refuses what does not fit.

        with ScoreWriter("scores/", settings) as writer:
            for window in range(n_windows):
                if window not in writer.finished:
                    writer.write(window, score(window))
            writer.mark_complete()

    Raises SettingsDiffer (binding settings differ; the differences are shown), FolderInUse (a second
    process), StoreError (read-only folder, disk full, damaged manifest). Finished shards outlive any of them.
    """

    def __init__(self, folder: str | Path, settings: dict, lock: FolderLock | None = None):
        """lock: the folder's, held by the caller already, who need not release it."""
        self.folder = Path(folder)
        self.settings = normal_settings(settings)
        self._lock = lock or lock_folder(self.folder)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ScoreWriter:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _open(self) -> None:
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        manifest = read_manifest(self.folder)
        if manifest is None or not manifest["shards"]:  # nothing is scored yet: any settings will do
            manifest = {"settings": self.settings, "complete": False, "notes": {}, "shards": {}}
        refuse_differences(self.folder, manifest["settings"], self.settings)
        self._fit_siblings()
        self.complete: bool = manifest["complete"]
        self.notes: dict = manifest["notes"]
        listed = {int(window): entry for window, entry in manifest["shards"].items()}
        self.finished: dict[int, dict] = {}
        for path in shards_in(self.folder):
            window = window_of(path)
            entry = listed.get(window)
            if entry is None or entry["bytes"] != path.stat().st_size:
                entry = self._adopt(path)
            if entry is not None:
                self.finished[window] = entry
        self.complete = self.complete and self.finished.keys() >= listed.keys()
        self._write_manifest()

    def _fit_siblings(self) -> None:
        """The jobs of an array must have the same settings, but for the part that each scores."""
        for folder in siblings(self.folder):
            manifest = read_manifest(folder)
            if manifest is not None and manifest["shards"]:
                part = {"shard": self.settings.get("shard")}
                refuse_differences(folder, manifest["settings"] | part, self.settings)

    def _adopt(self, path: Path) -> dict | None:
        """The entry of a shard renamed just before a kill, ahead of the manifest; None if it is damaged."""
        try:
            table = pq.read_table(path, columns=["status", "n_tokens"])
        except (pa.ArrowException, OSError):
            return None  # not ours or damaged: its window is scored again
        refuse_differences(self.folder, _file_settings(table.schema, path), self.settings)
        return _entry(path.name, path.stat().st_size, table)

    def _write_manifest(self) -> None:
        shards = {str(window): self.finished[window] for window in sorted(self.finished)}
        document = {
            "settings": self.settings,
            "complete": self.complete,
            "notes": self.notes,
            "shards": shards,
        }
        write_atomically(self.folder / MANIFEST, json.dumps(document, indent=1).encode())
        (self.folder / OLD_MANIFEST).unlink(missing_ok=True)

    def write(self, window: int, rows: ScoreBlock | Iterable[ScoreRow]) -> dict:
        """Store a window; when this returns it survives a power cut. Returns the manifest entry."""
        if window in self.finished:
            raise StoreError(f"{self.folder}: window {window} is already finished")
        return self.register(window, write_shard(self.folder, window, rows, self.settings))

    def register(self, window: int, entry: dict) -> dict:
        """List a shard that ``write_shard`` wrote elsewhere."""
        self.finished[window] = entry
        self.complete = False
        self._write_manifest()
        return entry

    def mark_complete(self) -> None:
        """Say that every window of the data is there (readers warn about unfinished scores)."""
        self.complete = True
        self._write_manifest()

    def note(self, name: str, value: Any) -> None:
        """Keep a fact measured during the run (the noise floor, say); ``score_metadata`` shows it in "notes"."""
        self.notes[name] = value
        self._write_manifest()

    def counts(self) -> dict[str, int]:
        """Sums over the finished shards: rows, errors, text_only, tokens."""
        names = ("rows", "errors", "text_only", "tokens")
        return {name: sum(entry[name] for entry in self.finished.values()) for name in names}

    def failed(self) -> dict[int, list[str]]:
        """window -> keys of its error rows, for ``--retry failed``."""
        found = {}
        for window in sorted(window for window, entry in self.finished.items() if entry["errors"]):
            table = pq.read_table(self.folder / shard_name(window), columns=["key", "status"])
            found[window] = table.filter(pc.starts_with(table["status"], "error: "))["key"].to_pylist()
        return found

    def replace(self, window: int, rows: ScoreBlock | Iterable[ScoreRow]) -> dict:
        """``replace_rows``, and list the new shard; a complete folder stays complete."""
        complete = self.complete
        entry = self.register(window, replace_rows(self.folder, window, rows, self.settings))
        if complete:
            self.mark_complete()
        return entry

    def close(self) -> None:
        self._lock.release()


def open_scores(scores: Any) -> Any:
    """What `Scorer.score` returned as a table, tables as they are, folders and files as the shards that are there now.

    Whoever reads scores in more than one pass opens them first: `vig score` may be writing. Raises StoreError for
    nothing.
    """
    if isinstance(scores, Shards | pa.Table):
        return scores
    if isinstance(scores, str | Path):
        return Shards.found(scores)
    scores = list(scores)
    if not scores:
        raise StoreError("no scores were given: the list is empty")
    if not isinstance(scores[0], ScoreRow):
        return Shards.found(scores)
    block = ScoreBlock.from_rows(scores)
    return block.table(block.stats)


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise StoreError(
            f"{path} cannot be read ({error}). Run `vig score` again: it redoes that window."
        ) from error


def _file_settings(schema: pa.Schema, path: Path | str) -> dict:
    document = (schema.metadata or {}).get(METADATA_KEY)
    if document is None:
        raise StoreError(
            f"{path} has no {METADATA_KEY.decode()!r} metadata: it was not written by `vig score`"
        )
    return json.loads(document)


def score_metadata(scores: Scores) -> dict:
    """The settings that the scores were made with (model, null, hashes, dtype, ...), from the first shard.

    What the run measured (``ScoreWriter.note``) stands under "notes".
    """
    if isinstance(scores, pa.Table):
        return json.loads((scores.schema.metadata or {}).get(METADATA_KEY, b"{}"))
    path = score_files(scores)[0]
    with _open_parquet(path) as file:
        settings = _file_settings(file.schema_arrow, path)
    return {**settings, "notes": (read_manifest(path.parent) or {}).get("notes", {})}


def data_sets(scores: Scores) -> list[dict[str, str | None]]:
    """The data sets that the scores are of: `data`, its `data_fingerprint`, and one of its keys, `key`."""
    is_table, found = isinstance(scores, pa.Table), {}
    for table in [scores] if is_table else {file.parent: file for file in score_files(scores)}.values():
        about = score_metadata(table)
        found.setdefault((about.get("data"), about.get("data_fingerprint")), table)
    return [
        {"data": data, "data_fingerprint": fingerprint, "key": first_key(table)}
        for (data, fingerprint), table in found.items()
    ]


def count_rows(scores: Scores) -> int:
    """Rows in all shards, from the files' footers."""
    if isinstance(scores, pa.Table):
        return len(scores)
    rows = 0
    for path in score_files(scores):
        with _open_parquet(path) as file:
            rows += file.metadata.num_rows
    return rows


def first_key(scores: Scores) -> str | None:
    """The key of the first row; None where there is none."""
    return next((batch["key"][0].as_py() for batch in read_scores(scores, ["key"]) if batch.num_rows), None)


def read_scores(
    scores: Scores,
    columns: Sequence[str] | None = None,
    *,
    batch_size: int = 8192,
) -> Iterator[pa.RecordBatch]:
    """Rows of all shards in reading order, in constant memory. ``columns``: the ones wanted, default all.

    Raises StoreError where a column is wanted that the scores do not have, or a shard is damaged, and SettingsDiffer
    where shards were made with other settings than the first: their values cannot be compared. (Settings about which
    data was scored may differ, and which statistics stand beside the likelihoods.)
    """
    if isinstance(scores, pa.Table):
        _check_columns(scores.schema, columns, "the table of scores")
        yield from (scores.select(columns) if columns else scores).to_batches(max_chunksize=batch_size)
        return
    first = None
    for path in score_files(scores):
        with _open_parquet(path) as file:
            if isinstance(scores, Shards):
                scores.refuse_changed(path)
            settings = _file_settings(file.schema_arrow, path)
            first = first or (path, settings)
            refuse_mixture(*first, path, settings)
            _check_columns(file.schema_arrow, columns, path)
            batches = file.iter_batches(batch_size, columns=columns)
            while (batch := _next_batch(batches, path)) is not None:
                yield batch


def _check_columns(schema: pa.Schema, columns: Sequence[str] | None, where: Path | str) -> None:
    for name in columns or ():
        if name not in schema.names:
            stat = next((s for s, known in TOKEN_STATS.items() if name in [one.name for one in known]), None)
            cure = f" with `vig score --stats {stat}` into another folder" if stat else ""
            raise StoreError(f"{where} has no column {name!r}. Score the data again{cure}")


def _next_batch(batches: Iterator[pa.RecordBatch], path: Path) -> pa.RecordBatch | None:
    try:
        return next(batches, None)
    except (pa.ArrowException, OSError) as error:
        raise StoreError(
            f"{path} is damaged ({error}). Delete it and run `vig score` again: it redoes that window."
        ) from error


def unfinished(scores: Scores) -> list[str]:
    """A line for each folder whose manifest says that scoring has not come to its end, and for missing jobs."""
    if isinstance(scores, pa.Table):
        return []
    return list(scores.unfinished) if isinstance(scores, Shards) else unfinished_folders(score_files(scores))
