"""Scoring a dataset on disk, window by window: resumes where it stopped, loses nothing, repeats nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from vig.data.error_log import ErrorLog
from vig.data.files import StoreError, check_writable, lock_folder
from vig.data.sample import BrokenRecord, Sample
from vig.models.end_of_turn import DEFAULT
from vig.scoring import batching
from vig.scoring.loader import LoadedRecord, load_records, new_pixel_bytes
from vig.scoring.progress_bar import bar
from vig.scoring.record_count import FIRST_WAIT, RecordCount
from vig.scoring.scorer import NOISE_SAMPLES, Progress, Scorer, error_row, longest_pass, tally
from vig.scoring.settings import RunSpec, ScoreSettings
from vig.store.errors import log_errors, stored_errors
from vig.store.fingerprints import renamed
from vig.store.folder import output_folder, read_manifest, recorded_setting, shards_in, siblings
from vig.store.scores import ScoreWriter, first_key

MEASURED = {"noise_floor", "sharing"}  # settings that a run finds out, and a resumed one takes over
LOOK_AHEAD = 1 << 17  # records that are searched for the first ones with images
END = None  # what the other ranks of a tensor-parallel model are told behind the last window


def score_dataset(
    scorer: Scorer,
    data: str | Path,
    out: str | Path,
    *,
    image_root: str | Path | None = None,
    limit: int | None = None,
    shard: tuple[int, int] | None = None,
    retry_failed: bool = False,
    window: int = batching.WINDOW,
    on_progress: Callable[[Progress], None] | None = None,
    progress_bar: bool = True,
) -> Progress:
    """Scores `data` into the folder `out`; the same call resumes where an earlier one stopped.

    shard: (i, n), only windows whose number is i modulo n, into the folder ``shard-i-of-n`` within `out`: n jobs
    may run at the same time, and `out` is complete when all have ended. retry_failed: score the error rows of
    finished windows again. Raises ValueError for a window, shard or limit that makes no sense, DataError, ModelError
    and StoreError (other settings, data under another name, no permission, disk full).
    progress_bar: on a terminal, unless on_progress is given. Samples that could not be scored are warned of; all of
    them stand in `_errors.jsonl` of the folder.
    """
    run = RunSpec(data, image_root, limit, shard, window, retry_failed)
    if on_progress is not None:
        return run_scoring(scorer, run, out, on_progress)
    with bar(progress_bar and scorer.loaded.ranks.is_first) as on_bar:
        done = run_scoring(scorer, run, out, on_bar)
    if done.failed or done.failed_before:
        lines = ErrorLog().extend(stored_errors(output_folder(out, shard))).lines()
        failed = f"{done.failed + done.failed_before:,} samples could not be scored:"
        warnings.warn("\n".join([failed, *lines]), stacklevel=2)
    return done


def run_scoring(
    scorer: Scorer,
    run: RunSpec,
    out: str | Path,
    on_progress: Callable[[Progress], None] | None = None,
    count: RecordCount | None = None,
) -> Progress:
    """`score_dataset`, with what it scores as one value. count: of its records, begun before; it ends with the run.

    Of the ranks of a tensor-parallel model the first reads and writes; for the others the result counts nothing.
    """
    if not scorer.loaded.ranks.is_first:
        return _compute_along(scorer)
    run.check_data()
    folder, progress = output_folder(out, run.shard), Progress()
    refuse_renamed(folder, run)
    check_writable(folder)
    with count or RecordCount(run.data, run.limit) as count:

        def tell(state: Progress, within: float = 0.0) -> None:
            if on_progress is not None:
                state.total = run.part_of(count.known(within))
                on_progress(state)

        tell(progress, FIRST_WAIT)
        _score_windows(scorer, run, folder, progress, tell)
    scorer.loaded.ranks.tell(END)
    progress.total = progress.done
    if on_progress is not None:
        on_progress(progress)
    return progress


def _score_windows(
    scorer: Scorer, run: RunSpec, folder: Path, progress: Progress, tell: Callable[[Progress], None]
) -> None:
    with _writing(folder, scorer, run) as writer:
        ranks, failed = scorer.loaded.ranks, writer.failed() if run.retry_failed else {}
        for number, chunk in run.windows(lambda window: window not in writer.finished or window in failed):
            again = set(failed.get(number, ()))
            if number not in writer.finished:
                ranks.tell(len(chunk))
                scorer.probe_memory(chunk)
                writer.write(number, scorer.score_window(chunk, progress, tell))
                record_splits(writer, number, progress)
                continue
            progress.done += len(chunk) - len(again)
            progress.resumed += len(chunk) - len(again)
            if again:
                chosen = [record for record in chunk if record.key in again]
                ranks.tell(len(chosen))
                scorer.probe_memory(chosen, chunk)
                writer.replace(number, scorer.score_window(chosen, progress, tell, chunk))
                record_splits(writer, number, progress)
        log_errors(folder)  # before it is complete: a run that is killed here is run again
        writer.mark_complete()
        progress.failed_before = writer.counts()["errors"] - progress.failed


def _compute_along(scorer: Scorer) -> Progress:
    """What a rank does that is not the first of its model: it calls the model whenever the first says that it does."""
    ranks = scorer.loaded.ranks
    floor, sharing = ranks.told()
    if floor:
        scorer.noise_floor([])
    else:
        scorer.self_check.follow(sharing)
    while (records := ranks.told()) is not END:
        scorer.probe_memory([None] * records)
        scorer.score_window([None] * records)
    return Progress()


@contextmanager
def _writing(folder: Path, scorer: Scorer, run: RunSpec) -> Iterator[ScoreWriter]:
    """The folder, locked before its settings are found out, which takes a while."""
    workers = scorer.workers
    with lock_folder(folder) as lock:
        scorer.encoder.end_of_turn = end_of_turn_in(folder, scorer.settings)
        if lock.after_death:  # perhaps at an image that crashed its decoder: a process apart dies alone
            scorer.workers = max(1, workers)
        try:
            yield ScoreWriter(folder, run_provenance(scorer, run, folder), lock)
        finally:
            scorer.workers = workers


def refuse_renamed(folder: Path, run: RunSpec) -> None:
    """Raises StoreError where the folder, or another job of its array, holds scores of data of another name."""
    for place in (folder, *siblings(folder)):
        key = None
        for shard in shards_in(place):
            with suppress(StoreError):  # a damaged one is scored again
                key = key or first_key(shard)
        problem = None if key is None else renamed(key, run.data)
        if problem is not None:
            raise StoreError(f"{place}: {problem}, or give another output folder")


def end_of_turn_in(folder: Path, settings: ScoreSettings) -> str:
    """As the settings say; else as the scores in `folder`, or of another job of its array, were made; else "add"."""
    if settings.end_of_turn is not None:
        return settings.end_of_turn
    recorded = (recorded_setting(place, "end_of_turn") for place in (folder, *siblings(folder)))
    return next(filter(None, recorded), DEFAULT)


def run_provenance(scorer: Scorer, run: RunSpec, folder: Path) -> dict[str, Any]:
    """What the scores of a run come from, for their metadata.

    The noise floor, and whether samples share computation, are found out on the first records, unless `folder` or
    another job of its array knows them: then this run does as that one did.
    """
    provenance = scorer.provenance(run.data, run.image_root) | run.part()
    for place in (folder, *siblings(folder)):
        manifest = read_manifest(place)
        known = {} if manifest is None or not manifest["shards"] else manifest["settings"]
        if known.keys() >= MEASURED:
            scorer.loaded.ranks.tell((False, known["sharing"]))
            scorer.self_check.follow(known["sharing"])
            return provenance | {name: known[name] for name in MEASURED}
    scorer.loaded.ranks.tell((True, None))
    floor = scorer.noise_floor(first_records(run.records()))
    return provenance | {"noise_floor": floor, "sharing": scorer.self_check.sharing}


def first_records(records: Iterable[Sample | BrokenRecord]) -> list[Sample | BrokenRecord]:
    """The first records with images, which decide for the whole run; others where the data begins without images."""
    most, with_images, others = 4 * NOISE_SAMPLES, [], []
    for record in islice(records, LOOK_AHEAD):
        if getattr(record, "images", ()):
            with_images.append(record)
        elif len(others) < most:
            others.append(record)
        if len(with_images) == most:
            break
    return with_images or others


def record_splits(writer: ScoreWriter, window: int, progress: Progress) -> None:
    """Notes in the manifest how many batches of a window did not fit into memory and were halved."""
    noted = dict(writer.notes.get("splits", {}))
    here = progress.splits - progress.splits_noted
    if here:
        writer.note("splits", noted | {str(window): noted.get(str(window), 0) + here})
        progress.splits_noted = progress.splits


@dataclass
class Estimate:
    """What a dry run found: counts, and how fast this machine went through the first samples."""

    progress: Progress
    multimodal: int = 0
    model_tokens: int = 0  # that the model will read, both passes
    measured: int = 0  # samples that the rate was measured on
    tokens_per_second: float | None = None


def dry_run_dataset(
    scorer: Scorer,
    data: str | Path,
    *,
    image_root: str | Path | None = None,
    limit: int | None = None,
    shard: tuple[int, int] | None = None,
    window: int = batching.WINDOW,
    on_progress: Callable[[Progress], None] | None = None,
    errors: ErrorLog | None = None,
) -> Estimate:
    """Opens, decodes and tokenises every record, scores only a few to take the time, stores nothing.

    shard: (i, n), only the records of that job's windows, what is scored already included. errors: takes those of all
    records.
    """
    return run_dry(scorer, RunSpec(data, image_root, limit, shard, window), on_progress, errors)


def run_dry(
    scorer: Scorer,
    run: RunSpec,
    on_progress: Callable[[Progress], None] | None = None,
    errors: ErrorLog | None = None,
    count: RecordCount | None = None,
) -> Estimate:
    """`dry_run_dataset`, with what it reads as one value. count: of its records, begun before; it ends with the run."""
    ranks, estimate = scorer.loaded.ranks, Estimate(Progress())
    if not ranks.is_first:
        for good in iter(ranks.told, END):
            scorer.measure_rate(good)
        return estimate
    run.check_data()
    windows = (chunk for _, chunk in run.windows())
    with count or RecordCount(run.data, run.limit) as count:

        def tell(within: float = 0.0) -> None:
            if on_progress is not None:
                estimate.progress.total = run.part_of(count.known(within))
                on_progress(estimate.progress)

        tell(FIRST_WAIT)
        for block in _blocks(windows, scorer):
            rows = [row for row in map(error_row, block) if row is not None]
            tally(estimate.progress, rows, None)
            if errors is not None:
                errors.extend((row.key, row.id, row.status.removeprefix("error: ")) for row in rows)
            good = [item for item in block if item.encoded is not None]
            for item in good:
                estimate.multimodal += item.is_multimodal
                estimate.model_tokens += longest_pass(item) * (2 if item.is_multimodal else 1)
                estimate.progress.tokens += len(item.encoded.answer_index)
                estimate.progress.unknown += item.encoded.unknown
            estimate.progress.text_only += sum(not item.is_multimodal for item in good)
            estimate.progress.done += len(good)
            if estimate.tokens_per_second is None and good:
                ranks.tell(good)
                estimate.measured, estimate.tokens_per_second = scorer.measure_rate(good)
            tell()
    ranks.tell(END)
    return estimate


def _blocks(
    windows: Iterable[Sequence[Sample | BrokenRecord]], scorer: Scorer
) -> Iterator[list[LoadedRecord]]:
    for window in windows:
        loading = load_records(window, scorer.encoder, scorer.null.stage, scorer.workers)
        yield from batching.blocks(loading, new_pixel_bytes())
