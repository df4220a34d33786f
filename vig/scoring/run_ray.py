"""The same windows on Ray Data: actors score, the driver keeps the manifest.

    windows to do -> [actor | actor | ...] -> manifest entries -> driver

A row that Ray carries is the number of a window, and what comes back is its entry in the manifest: no picture
enters the object store. Each actor reads the data's records by itself, in order, past the windows of others, and
writes its shard through `vig.store.scores.write_shard`, whole or not at all. So data, images and scores must lie where
every machine sees them, under the same paths.

An actor that dies is started anew and its window given to another; one that makes no headway for `stuck_after`
seconds ends itself, to the same effect. A window that has felled `TRIES` actors stops the run, and is named; the same
command goes on from there. Needs the extra "ray".
"""

from __future__ import annotations

import faulthandler
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from vig.data.files import StoreError, check_writable
from vig.data.reading import Source
from vig.data.sample import BrokenRecord, Sample
from vig.data.samples import read_samples
from vig.scoring import batching
from vig.scoring.run import RecordCount, check_data, part_of, record_splits, run_settings
from vig.scoring.scorer import KEPT_ERRORS, Progress, Scorer
from vig.store.errors import log_errors
from vig.store.folder import output_folder, recorded_setting
from vig.store.scores import ScoreWriter, replace_rows, write_shard

NO_RAY = 'the ray engine needs Ray Data. Install it: pip install "vig-kernels[ray]"'
TRIES = 5  # of a window whose actors die
STUCK_AFTER = 1800.0  # seconds without a scored batch


@dataclass(frozen=True)
class Job:
    """All that an actor needs to score any window of the data."""

    model: str
    options: dict[str, Any]  # of `Scorer`
    data: Source
    image_root: str | None
    limit: int | None
    window: int
    folder: str
    stuck_after: float
    settings: dict[str, Any] | None = None  # those of the shards; not known before the model is loaded


def score_dataset_on_ray(
    model: str,
    data: str | Path,
    out: str | Path,
    *,
    options: dict[str, Any] | None = None,
    actors: int | None = None,
    gpus_per_actor: float | None = None,
    cpus_per_actor: float = 1,
    image_root: str | Path | None = None,
    limit: int | None = None,
    shard: tuple[int, int] | None = None,
    retry_failed: bool = False,
    window: int = batching.WINDOW,
    stuck_after: float = STUCK_AFTER,
    on_progress: Callable[[Progress], None] | None = None,
) -> Progress:
    """`vig.scoring.run.score_dataset` on the Ray cluster of this process (a local one if there is none): same files.

    model: a checkpoint folder or a name on the hub; options: what `Scorer` takes beyond it.
    actors: processes with a model each; one a GPU unless given, or one a CPU where the cluster has no GPU.
    gpus_per_actor: 1 where the cluster has GPUs unless given.
    Raises ImportError (no Ray), DataError, ModelError and StoreError like the plain engine.
    """
    ray = _ray()
    batching.check_part(window, shard, limit)
    folder = output_folder(Path(out).resolve(), shard)
    check_writable(folder)
    check_data(data, image_root)
    root = None if image_root is None else str(Path(image_root).absolute())
    here = str(Path(model).resolve()) if Path(model).is_dir() else model
    recorded = {"end_of_turn": recorded_setting(folder, "end_of_turn")}
    options = recorded | {name: value for name, value in (options or {}).items() if value is not None}
    job = Job(here, options, Source.of(data).absolute(), root, limit, window, str(folder), stuck_after)
    if gpus_per_actor is None:
        gpus_per_actor = float("GPU" in ray.cluster_resources())
    resources = {"num_cpus": cpus_per_actor, "num_gpus": gpus_per_actor}
    job = replace(job, settings=_ask(ray, ray.remote(**resources)(_settings).remote(job, shard)))
    with ScoreWriter(folder, job.settings) as writer, RecordCount(data, limit) as count:
        progress = Progress()
        failed = writer.failed() if retry_failed else {}
        for old in folder.glob(".window-*.tries"):
            old.unlink()
        progress.total = part_of(count.wait() or _count(job), window, shard)
        progress.done = writer.counts()["rows"] - sum(len(keys) for keys in failed.values())
        progress.resumed = progress.done
        windows = -(-(count.known() or _count(job)) // window)
        todo = [number for number in range(windows) if batching.in_shard(number, shard)]
        rows = [
            {"window": number, "again": failed.get(number, [])}
            for number in todo
            if number not in writer.finished or number in failed
        ]
        for result in _scored(ray, job, rows, actors, resources) if rows else ():
            writer.register(result["window"], json.loads(result["entry"]))
            _add(progress, json.loads(result["progress"]))
            record_splits(writer, result["window"], progress)
            if on_progress is not None:
                on_progress(progress)
        missing = [number for number in todo if number not in writer.finished]
        if missing:
            raise StoreError(f"{folder}: windows {missing} were not scored. Run the same command again")
        writer.mark_complete()
        progress.failed_before = writer.counts()["errors"] - progress.failed
        log_errors(folder)
    return progress


def _ray():
    try:
        import ray
        import ray.data
    except ImportError:
        raise ImportError(NO_RAY) from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    return ray


def _ask(ray, reference) -> Any:
    """The result of a task; its own exception, not Ray's wrapping."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def _settings(job: Job, shard: tuple[int, int] | None) -> dict[str, Any]:
    """Run where the model will run, since dtype and backend depend on the machine."""
    return run_settings(
        Scorer(job.model, **job.options), job.data, Path(job.folder),
        image_root=job.image_root, limit=job.limit, shard=shard, window=job.window,
    )  # fmt: skip


def _count(job: Job) -> int:
    return sum(1 for _ in _records(job, lambda _: False))


def _records(job: Job, wanted: Callable[[int], bool] | None = None) -> Iterator[Sample | BrokenRecord | None]:
    return read_samples(job.data, image_root=job.image_root, limit=job.limit, wanted=wanted)


def _scored(ray, job: Job, rows: list[dict], actors: int | None, resources: dict) -> Iterator[dict]:
    """The results of the windows, as they come."""
    if actors is None:
        kind, each = (
            ("GPU", resources["num_gpus"]) if resources["num_gpus"] else ("CPU", resources["num_cpus"])
        )
        actors = max(1, int(ray.cluster_resources().get(kind, 1) // each))
    pool = ray.data.ActorPoolStrategy(size=min(actors, len(rows)))
    windows = ray.data.from_items(rows, override_num_blocks=len(rows))  # a block, and so a task, is a window
    scored = windows.map_batches(
        ScoreWindows, fn_constructor_args=(job,), batch_size=1, compute=pool, **resources
    )
    try:
        yield from scored.iter_rows()
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None


class ScoreWindows:
    """An actor: a model, and a place in the data."""

    def __init__(self, job: Job):
        self.job = job
        self.scorer = Scorer(job.model, **job.options)
        self.scorer.proofs.follow((job.settings or {}).get("sharing"))
        self._rewind()

    def _rewind(self) -> None:
        self.records = _records(self.job, lambda record: record // self.job.window == self.window)
        self.window = self.next = 0

    def __call__(self, batch: dict) -> dict:
        """One window, given and told about in columns of length 1, as Ray Data passes them."""
        number, again = int(batch["window"][0]), set(batch["again"][0])
        progress = Progress()
        window = self._read(number)
        chunk = [record for record in window if record.key in again] if again else window
        self._watch(progress)
        tries = self._try(number)
        try:
            self.scorer.rehearse(chunk, window)
            rows = self.scorer.score_window(chunk, progress, self._watch, window)
        finally:
            faulthandler.cancel_dump_traceback_later()
        store = replace_rows if again else write_shard
        entry = store(self.job.folder, number, rows, self.job.settings)
        tries.unlink(missing_ok=True)
        told = {name: value for name, value in vars(progress).items() if name not in ("started", "total")}
        return {"window": [number], "entry": [json.dumps(entry)], "progress": [json.dumps(told)]}

    def _read(self, number: int) -> list[Sample | BrokenRecord]:
        if number < self.next:  # a window of an actor that died
            self._rewind()
        self.window = number
        skipped = (number - self.next) * self.job.window
        chunk = list(islice(self.records, skipped, skipped + self.job.window))
        self.next = number + 1
        return chunk

    def _try(self, number: int) -> Path:
        """Counts in a file that outlives this process how often the window was begun."""
        tries = Path(self.job.folder) / f".window-{number:05d}.tries"
        with tries.open("ab") as file:
            file.write(b".")
        if tries.stat().st_size > TRIES:
            raise StoreError(
                f"{self.job.folder}: window {number} (records {number * self.job.window} and on) has felled "
                f"{TRIES} processes. Look into the logs of Ray, or lower batch_tokens"
            )
        return tries

    def _watch(self, _: Progress) -> None:
        """Without another call within `stuck_after` seconds the process ends, whatever it hangs in."""
        faulthandler.dump_traceback_later(self.job.stuck_after, exit=True)


def _add(progress: Progress, told: dict[str, Any]) -> None:
    """Adds the counts of one window; lists are joined."""
    for name, value in told.items():
        setattr(progress, name, getattr(progress, name) + value)
    del progress.errors[KEPT_ERRORS:]
