"""The same windows on Ray Data: actors score, the driver keeps the manifest.

    windows to do -> [actor | actor | ...] -> manifest entries -> driver

A row that Ray carries is the number of a window, and what comes back is its entry in the manifest: no picture
enters the object store. Each actor reads the data's records by itself, in order, past the windows of others, and
writes its shard through `vig.store.scores.write_shard`, whole or not at all. So data, images and scores must lie where
every machine sees them, under the same paths.

An actor that dies is started anew and its window given to another; one that makes no headway for `stuck_after`
seconds ends itself, to the same effect. A window that has killed `TRIES` actors stops the run, and is named; the same
command goes on from there. Needs the extra "ray".
"""

from __future__ import annotations

import faulthandler
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from vig.data.files import StoreError, check_writable
from vig.data.reading import Source
from vig.data.sample import BrokenRecord, Sample
from vig.scoring import batching
from vig.scoring.record_count import RecordCount
from vig.scoring.run import end_of_turn_in, record_splits, refuse_renamed, run_provenance
from vig.scoring.scorer import KEPT_ERRORS, Progress, Scorer
from vig.scoring.settings import RunSpec, ScoreSettings
from vig.store.errors import log_errors
from vig.store.folder import output_folder
from vig.store.scores import ScoreWriter, replace_rows, write_shard

NO_RAY = 'the ray engine needs Ray Data. Install it: pip install "vig-kernels[ray]"'
TRIES = 5  # of a window whose actors die
STUCK_AFTER = 1800.0  # seconds without a scored batch


@dataclass(frozen=True)
class Job:
    """All that an actor needs to score any window of the data; paths are absolute."""

    model: str
    settings: ScoreSettings
    run: RunSpec
    folder: str
    stuck_after: float = STUCK_AFTER
    provenance: dict[str, Any] | None = None  # of the shards; not known before the model is loaded

    def scorer(self) -> Scorer:
        return Scorer(self.model, **vars(self.settings))


class Actors(NamedTuple):
    """How many processes with a model each, and what each takes of the cluster; None: as the cluster has GPUs."""

    count: int | None = None
    gpus: float | None = None
    cpus: float = 1

    def resources(self, cluster: dict[str, float]) -> dict[str, float]:
        """What Ray is asked for, for each of them."""
        return {
            "num_cpus": self.cpus,
            "num_gpus": float("GPU" in cluster) if self.gpus is None else self.gpus,
        }

    def how_many(self, cluster: dict[str, float], windows: int) -> int:
        """At most one a window."""
        if self.count is not None:
            return min(self.count, windows)
        resources = self.resources(cluster)
        kind, each = ("GPU", resources["num_gpus"]) if resources["num_gpus"] else ("CPU", self.cpus)
        return min(max(1, int(cluster.get(kind, 1) // each)), windows)


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
    run = RunSpec(data, image_root, limit, shard, window, retry_failed)
    settings = ScoreSettings(**(options or {}))
    job = Job(str(model), settings, run, str(out), stuck_after)
    return run_scoring_on_ray(job, Actors(actors, gpus_per_actor, cpus_per_actor), on_progress)


def run_scoring_on_ray(
    job: Job, actors: Actors, on_progress: Callable[[Progress], None] | None = None
) -> Progress:
    """`score_dataset_on_ray`, with what it scores as one value. job: its folder is the output folder of all jobs."""
    ray = _ray()
    job = _placed(job)
    run, folder = job.run, Path(job.folder)
    run.check_data()
    refuse_renamed(folder, run)
    check_writable(folder)
    job = replace(job, settings=replace(job.settings, end_of_turn=end_of_turn_in(folder, job.settings)))
    resources = actors.resources(ray.cluster_resources())
    job = replace(job, provenance=_ask(ray, ray.remote(**resources)(_provenance).remote(job)))
    with ScoreWriter(folder, job.provenance) as writer, RecordCount(run.data, run.limit) as count:
        progress = Progress()
        failed = writer.failed() if run.retry_failed else {}
        for old in folder.glob(".window-*.tries"):
            old.unlink()
        total = count.wait() or run.count()
        progress.total = run.part_of(total)
        progress.done = writer.counts()["rows"] - sum(len(keys) for keys in failed.values())
        progress.resumed = progress.done
        if on_progress is not None:
            on_progress(progress)
        todo = [number for number in range(-(-total // run.window)) if run.takes(number)]
        rows = [
            {"window": number, "again": failed.get(number, [])}
            for number in todo
            if number not in writer.finished or number in failed
        ]
        for result in _scored(ray, job, rows, actors) if rows else ():
            writer.register(result["window"], json.loads(result["entry"]))
            _add(progress, json.loads(result["progress"]))
            record_splits(writer, result["window"], progress)
            if on_progress is not None:
                on_progress(progress)
        missing = [number for number in todo if number not in writer.finished]
        if missing:
            raise StoreError(f"{folder}: windows {missing} were not scored. Run the same command again")
        log_errors(folder)  # before it is complete: a run that is killed here is run again
        writer.mark_complete()
        progress.failed_before = writer.counts()["errors"] - progress.failed
    return progress


def _placed(job: Job) -> Job:
    """The job with absolute paths, and the folder that this part of the data is written to."""
    run, model = job.run, job.model
    root = None if run.image_root is None else str(Path(run.image_root).absolute())
    return replace(
        job,
        model=str(Path(model).resolve()) if Path(model).is_dir() else model,
        run=replace(run, data=Source.of(run.data).absolute(), image_root=root),
        folder=str(output_folder(Path(job.folder).resolve(), run.shard)),
    )


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


def _provenance(job: Job) -> dict[str, Any]:
    """Run where the model will run, since dtype and backend depend on the machine."""
    return run_provenance(job.scorer(), job.run, Path(job.folder))


def _scored(ray, job: Job, rows: list[dict], actors: Actors) -> Iterator[dict]:
    """The results of the windows, as they come."""
    cluster = ray.cluster_resources()
    pool = ray.data.ActorPoolStrategy(size=actors.how_many(cluster, len(rows)))
    windows = ray.data.from_items(rows, override_num_blocks=len(rows))  # a block, and so a task, is a window
    scored = windows.map_batches(
        ScoreWindows, fn_constructor_args=(job,), batch_size=1, compute=pool, **actors.resources(cluster)
    )
    try:
        yield from scored.iter_rows()
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None


class ScoreWindows:
    """An actor: a model, and a place in the data."""

    def __init__(self, job: Job):
        self.job = job
        self.scorer = job.scorer()
        self.scorer.self_check.follow((job.provenance or {}).get("sharing"))
        self._rewind()

    def _rewind(self) -> None:
        self.records = self.job.run.records(lambda record: record // self.job.run.window == self.window)
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
            self.scorer.probe_memory(chunk, window)
            rows = self.scorer.score_window(chunk, progress, self._watch, window)
        finally:
            faulthandler.cancel_dump_traceback_later()
        store = replace_rows if again else write_shard
        entry = store(self.job.folder, number, rows, self.job.provenance)
        tries.unlink(missing_ok=True)
        told = {name: value for name, value in vars(progress).items() if name not in ("started", "total")}
        return {"window": [number], "entry": [json.dumps(entry)], "progress": [json.dumps(told)]}

    def _read(self, number: int) -> list[Sample | BrokenRecord]:
        if number < self.next:  # a window of an actor that died
            self._rewind()
        self.window = number
        size = self.job.run.window
        skipped = (number - self.next) * size
        chunk = list(islice(self.records, skipped, skipped + size))
        self.next = number + 1
        return chunk

    def _try(self, number: int) -> Path:
        """Counts in a file that outlives this process how often the window was begun."""
        tries = Path(self.job.folder) / f".window-{number:05d}.tries"
        with tries.open("ab") as file:
            file.write(b".")
        if tries.stat().st_size > TRIES:
            raise StoreError(
                f"{self.job.folder}: window {number} (records {number * self.job.run.window} and on) has killed "
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
