"""Scoring a dataset on disk, window by window: resumes where it stopped, loses nothing, repeats nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vig import plan
from vig.loader import LoadedRecord, load_records
from vig.samples import BrokenRecord, Sample, read_samples
from vig.score import NOISE_SAMPLES, Progress, Scorer, count_rows, error_row, fed_tokens
from vig.store import ScoreWriter


def score_dataset(
    scorer: Scorer,
    data: str | Path,
    out: str | Path,
    *,
    image_root: str | Path | None = None,
    limit: int | None = None,
    shard: tuple[int, int] | None = None,
    retry_failed: bool = False,
    window: int = plan.WINDOW,
    on_progress: Callable[[Progress], None] | None = None,
) -> Progress:
    """Scores `data` into the folder `out`; the same call resumes where an earlier one stopped.

    shard: (i, n), only windows whose number is i modulo n. retry_failed: score the error rows of finished
    windows again. Raises DataError, ModelError and StoreError (other settings, no permission, disk full).
    """
    progress = Progress(total=count_records(data, image_root=image_root, limit=limit))
    first = list(read_samples(data, image_root=image_root, limit=4 * NOISE_SAMPLES))
    settings = scorer.settings(data, image_root) | {
        "window": window,
        "limit": limit,
        "noise_floor": scorer.noise_floor(first),
    }
    with ScoreWriter(out, settings) as writer:
        failed = writer.failed() if retry_failed else {}
        records = read_samples(data, image_root=image_root, limit=limit)
        for number, chunk in enumerate(plan.chunks(records, window)):
            if not plan.in_shard(number, shard):
                progress.total -= len(chunk)
                continue
            again = set(failed.get(number, ()))
            if number not in writer.finished:
                writer.write(number, scorer.score_window(chunk, progress, on_progress))
                continue
            progress.done += len(chunk) - len(again)
            progress.resumed += len(chunk) - len(again)
            if again:
                chosen = [record for record in chunk if record.key in again]
                writer.replace(number, scorer.score_window(chosen, progress, on_progress))
        if shard is None:
            writer.mark_complete()
    return progress


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
    on_progress: Callable[[Progress], None] | None = None,
) -> Estimate:
    """Opens, decodes and tokenises every record, scores only a few to take the time, stores nothing."""
    estimate = Estimate(Progress(total=count_records(data, image_root=image_root, limit=limit)))
    records = read_samples(data, image_root=image_root, limit=limit)
    for block in _blocks(records, scorer):
        rows = [error_row(item) for item in block]
        count_rows(estimate.progress, [row for row in rows if row is not None], None)
        good = [item for item in block if item.encoded is not None]
        for item in good:
            estimate.multimodal += item.is_multimodal
            estimate.model_tokens += fed_tokens(item) * (2 if item.is_multimodal else 1)
            estimate.progress.tokens += len(item.encoded.answer_index)
        estimate.progress.text_only += sum(not item.is_multimodal for item in good)
        estimate.progress.done += len(good)
        if estimate.tokens_per_second is None and good:
            estimate.measured, estimate.tokens_per_second = scorer.measure_rate(good)
        if on_progress is not None:
            on_progress(estimate.progress)
    return estimate


def _blocks(records: Iterable[Sample | BrokenRecord], scorer: Scorer) -> Iterator[list[LoadedRecord]]:
    for window in plan.chunks(records, plan.WINDOW):
        yield from plan.chunks(load_records(window, scorer.encoder, "pixels", scorer.workers), plan.BLOCK)


def count_records(data: str | Path, *, image_root: str | Path | None = None, limit: int | None = None) -> int:
    """How many records there are, so that the time left can be told."""
    return sum(1 for _ in read_samples(data, image_root=image_root, limit=limit))
