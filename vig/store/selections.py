"""Selections on disk, and the mapping key -> (keep, token_ids, token_keep) that training reads.

A folder of selections holds ``selection-00000.parquet``, ...: key, id, keep bool, token_ids list<int32>,
token_keep list<bool>, one row a scored sample, in the order of the scores.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vig.data.files import StoreError, explain_write_errors, sync_folder
from vig.data.kinds import lacking, other_kind
from vig.store.folder import SettingsDiffer, settings_differences
from vig.store.rows import METADATA_KEY

SELECTION_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("id", pa.string()),
        ("keep", pa.bool_()),
        ("token_ids", pa.list_(pa.int32())),
        ("token_keep", pa.list_(pa.bool_())),
    ]
)
FILE_TOKENS = 1 << 30  # answer tokens a file: offsets of Arrow lists are int32
# By the run itself; the first job there may be any.
FOUND_OUT = ("selection.tau", "selection.tau_p", "selection.sources", "selection.data_sets", "shard")
IN_MEMORY_BYTES = 1 << 28  # larger selections are read through a memory-mapped copy


def mix64(values: np.ndarray) -> np.ndarray:
    """Scatter uint64 values over all 64 bits, one to one (the finaliser of splitmix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hash_keys(keys: pa.Array) -> np.ndarray:
    """(R,) uint64 hashes of strings, the same on every machine and in every version.

    h = mix64(sum_j (byte_j + 1) * w_j) with a fixed random 64-bit weight w_j a byte position: two given keys
    collide with probability of at most 2^-56.
    """
    parts = [_hash_slice(keys.slice(start, 1 << 15)) for start in range(0, len(keys), 1 << 15)]
    return np.concatenate(parts) if parts else np.empty(0, np.uint64)


def _hash_slice(keys: pa.Array) -> np.ndarray:
    keys = keys.cast(pa.large_binary())
    offsets = np.frombuffer(keys.buffers()[1], np.int64)[keys.offset : keys.offset + len(keys) + 1]
    if offsets[-1] == offsets[0]:
        return np.zeros(len(keys), np.uint64)
    bytes_ = np.frombuffer(keys.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
    lengths = np.diff(offsets)
    starts = offsets[:-1] - offsets[0]
    place = np.arange(len(bytes_)) - np.repeat(starts, lengths)
    weights = mix64(
        (np.arange(lengths.max(), dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    )
    sums = np.zeros(len(keys), np.uint64)
    filled = lengths > 0
    sums[filled] = np.add.reduceat(weights[place] * (bytes_ + np.uint64(1)), starts[filled])
    return mix64(sums)


class Entry(NamedTuple):
    """What is selected of one sample."""

    keep: bool
    token_ids: np.ndarray  # (n,) int32, the answer as scored
    token_keep: np.ndarray  # (n,) bool


class SelectionTable(Mapping[str, Entry]):
    """key -> Entry over an Arrow table; an index of 12 to 16 bytes a row is all that is added to it.

    The table may lie in a memory-mapped file, so that tens of millions of rows cost address space and page
    cache, shared by all processes, rather than memory. Lookup: binary search in the sorted key hashes.
    """

    def __init__(self, table: pa.Table, path: Path | None = None):
        self.table = table
        self.path = path
        self.metadata: dict = json.loads((table.schema.metadata or {}).get(METADATA_KEY, b"{}"))
        names = ("key", "id", "keep", "token_ids", "token_keep")
        self._chunks = {name: table[name].chunks for name in names if name in table.column_names}
        self._keys = self._chunks["key"]
        self._next = (0, 0)  # chunk and row after the last one that was found
        hashes = np.concatenate([hash_keys(chunk) for chunk in self._keys] or [np.empty(0, np.uint64)])
        self._order = np.argsort(hashes, kind="stable").astype(
            np.uint32 if len(hashes) < 2**32 else np.uint64
        )
        self._hashes = hashes[self._order]
        self._ends = np.cumsum([len(chunk) for chunk in self._keys])

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[str]:
        for chunk in self._keys:
            yield from chunk.to_pylist()

    def __reduce__(self):  # worker processes open the files themselves
        if self.path is not None:
            return read_selection, (self.path,)
        return SelectionTable, (self.table,)

    def __getitem__(self, key: str) -> Entry:
        return self._entry(*self._place(key))

    def with_id(self, key: str) -> tuple[Entry, str | None]:
        """The entry of a sample, and the id that it was scored under; None, unread, of one that is not kept."""
        chunk, row = self._place(key)
        entry = self._entry(chunk, row)
        return entry, self._chunks["id"][chunk][row].as_py() if entry.keep else None

    def _place(self, key: str) -> tuple[int, int]:
        """Chunk of the table, and row of the chunk. Raises KeyError.

        Data are mostly read in the order in which they were scored: then no hash is needed.
        """
        chunk, row = self._next
        if chunk == len(self._keys) or row == len(self._keys[chunk]) or self._keys[chunk][row].as_py() != key:
            chunk, row = self._search(key)
        more = row + 1 < len(self._keys[chunk])
        self._next = (chunk, row + 1) if more else (chunk + 1, 0)
        return chunk, row

    def _search(self, key: str) -> tuple[int, int]:
        wanted = hash_keys(pa.array([key], pa.string()))[0]
        place = int(np.searchsorted(self._hashes, wanted))
        while place < len(self._hashes) and self._hashes[place] == wanted:
            row = int(self._order[place])
            chunk = int(np.searchsorted(self._ends, row, side="right"))
            row -= int(self._ends[chunk - 1]) if chunk else 0
            if self._keys[chunk][row].as_py() == key:
                return chunk, row
            place += 1
        raise KeyError(key)

    def _entry(self, chunk: int, row: int) -> Entry:
        keep, ids, kept = (self._chunks[name][chunk][row] for name in ("keep", "token_ids", "token_keep"))
        if not ids.is_valid:
            return Entry(keep.as_py(), np.empty(0, np.int32), np.empty(0, bool))
        return Entry(keep.as_py(), ids.values.to_numpy(), kept.values.to_numpy(zero_copy_only=False))


def selection_files(path: str | Path) -> list[Path]:
    """The files of a selection, in order."""
    path = Path(path)
    found = (
        [path] if path.is_file() else [f for f in path.glob("selection-*.parquet") if f.stem[10:].isdigit()]
    )
    if not found or (path.is_file() and (path.suffix != ".parquet" or other_kind(path, "selection"))):
        raise StoreError(lacking(path, "selection"))
    return sorted(found, key=lambda file: int(file.stem[10:]) if file.stem[10:].isdigit() else 0)


def selection_metadata(path: str | Path) -> dict:
    """Settings of the scores and, under "selection", p, level, tau, ..., counts."""
    file = selection_files(path)[0]
    try:
        document = (pq.read_metadata(file).metadata or {}).get(METADATA_KEY)
    except pa.ArrowException as error:
        raise StoreError(f"{file} cannot be read ({error}). Delete it and run `vig select` again.") from error
    if document is None:
        raise StoreError(f"{path} was not written by `vig select`: it has no 'vig' metadata")
    return json.loads(document)


def read_selection(path: str | Path) -> SelectionTable:
    """Open a selection for random access by key.

    Small ones are read into memory. From IN_MEMORY_BYTES (of decoded columns) on, an uncompressed copy is
    written once, beside the selection (or else in the user's cache folder), and mapped into memory.
    """
    path, files = Path(path), selection_files(path)
    document = json.dumps(selection_metadata(path))
    if sum(_decoded_bytes(file) for file in files) < IN_MEMORY_BYTES:
        table = pa.concat_tables([pq.read_table(file) for file in files])
    else:
        table = pa.ipc.open_file(pa.memory_map(str(_mapped_copy(path, files)))).read_all()
    found = SelectionTable(table.replace_schema_metadata({METADATA_KEY: document}), path)
    counts = found.metadata.get("selection", {}).get("counts")
    rows = counts and sum(counts[name] for name in ("samples_total", "text_only", "errors"))
    if path.is_dir() and counts and rows != len(table):
        raise StoreError(
            f"{path} holds {len(table):,} of {rows:,} rows: its writing was cut short. Run `vig select` again."
        )
    return found


def _decoded_bytes(file: Path) -> int:
    data = pq.read_metadata(file)
    groups = (data.row_group(index) for index in range(data.num_row_groups))
    return sum(group.total_byte_size for group in groups)


def _mapped_copy(path: Path, files: list[Path]) -> Path:
    """An Arrow file of all rows, remade when a file of the selection has changed."""
    stamp = "-".join(f"{s.st_size:x}.{s.st_mtime_ns:x}" for s in (file.stat() for file in files))
    name = f".selection-{int(hash_keys(pa.array([stamp]))[0]):016x}.arrow"
    home = files[0].parent
    if not os.access(home, os.W_OK):
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vig"
    copy = home / name
    if copy.exists():
        return copy
    partial = copy.with_suffix(f".{os.getpid()}.tmp")
    with explain_write_errors(home):
        home.mkdir(parents=True, exist_ok=True)
        try:
            with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, SELECTION_SCHEMA) as writer:
                for file in files:
                    for batch in pq.ParquetFile(file).iter_batches(8192, columns=SELECTION_SCHEMA.names):
                        writer.write_batch(batch.replace_schema_metadata(None))
            os.replace(partial, copy)  # several ranks may make it at once: the last one wins, all are equal
        finally:
            partial.unlink(missing_ok=True)
    return copy


def refuse_other_selection(folder: Path, metadata: dict) -> None:
    """Raises SettingsDiffer where the folder holds a selection that was made with other settings.

    metadata: of the scores, and under "selection" what was asked for.
    """
    if not any(folder.glob("selection-*.parquet")):
        return
    asked = json.loads(json.dumps(metadata, default=str))
    differences = [
        row
        for row in settings_differences(selection_metadata(folder), asked)
        if row[0] not in FOUND_OUT and not row[0].startswith(("selection.counts.", "notes."))
    ]
    if differences:
        raise SettingsDiffer(
            f"{folder} holds a selection made with other settings",
            ("the folder has", "this run has"),
            differences,
            "Give --overwrite (overwrite=True) to replace it, or another output folder.",
        )


def write_selection(folder: Path, batches: Iterable[pa.RecordBatch], metadata: Callable[[], dict]) -> None:
    """Write batches of SELECTION_SCHEMA to ``folder``, in place of a selection that is there.

    The files take their names only when all are whole. The folder is to be locked: what killed runs left there goes
    first. ``metadata`` is asked after the last batch, when the counts are known. Raises StoreError for a read-only
    folder or a full disk.
    """
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".selection-*.parquet.*.tmp"):
            leftover.unlink(missing_ok=True)
        files = _Files(folder)
        try:
            with ThreadPoolExecutor(1) as thread:  # compresses one batch while the next one is chosen
                for batch in batches:
                    files.write(thread, batch)
                files.finish(metadata)
            files.rename()
        finally:
            files.clear()


class _Files:
    """Selection files under temporary names, cut at FILE_TOKENS; all stay open for their final metadata."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.paths: list[Path] = []
        self.writers: list[pq.ParquetWriter] = []
        self.tokens = 0  # in the last file
        self.writing: Future | None = None

    def write(self, thread: ThreadPoolExecutor, batch: pa.RecordBatch) -> None:
        self._wait()
        tokens = len(batch["token_ids"].flatten())
        if not self.writers or self.tokens + tokens > FILE_TOKENS:
            self._begin()
        self.tokens += tokens
        self.writing = thread.submit(self.writers[-1].write_batch, batch)

    def _begin(self) -> None:
        path = self.folder / f".selection-{len(self.paths):05d}.parquet.{os.getpid()}.tmp"
        options = {"compression": "zstd", "compression_level": 1, "use_dictionary": False}
        self.writers.append(pq.ParquetWriter(path, SELECTION_SCHEMA, **options))
        self.paths.append(path)
        self.tokens = 0

    def _wait(self) -> None:
        if self.writing is not None:
            self.writing.result()

    def finish(self, metadata: Callable[[], dict]) -> None:
        self._wait()
        if not self.writers:  # no rows: still a selection
            self._begin()
        document = json.dumps(metadata(), sort_keys=True)
        for writer in self.writers:
            writer.add_key_value_metadata({METADATA_KEY: document})
            writer.close()

    def rename(self) -> None:
        for path in self.paths:
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        for pattern in ("selection-*.parquet", ".selection-*.arrow"):
            for old in self.folder.glob(pattern):
                old.unlink()
        for path in self.paths:
            os.replace(path, self.folder / (path.name[1:].partition(".parquet")[0] + ".parquet"))
        sync_folder(self.folder)

    def clear(self) -> None:
        """Remove what an interrupted write left."""
        for path, writer in zip(self.paths, self.writers, strict=False):
            if path.exists():
                with suppress(OSError):
                    writer.close()
                path.unlink(missing_ok=True)
