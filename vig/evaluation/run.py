"""`vig eval`: questions -> answers -> predictions on disk -> figures. Resumes where it stopped, answers nothing twice.

The questions are cut into chunks in reading order, a chunk into batches of similar length. The batches are a function
of the chunk's questions and the settings alone, and each is stored whole or not at all, so a run that was killed and
started again computes the same batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vig.data.error_log import ErrorLog
from vig.data.files import check_writable, lock_folder
from vig.data.sample import BrokenRecord, DataError, Sample
from vig.evaluation.answering import Answerer, Asked
from vig.evaluation.folder import PredictionFolder, Row, read_manifest
from vig.evaluation.measuring import Baseline, judged, measure
from vig.evaluation.questions import Question
from vig.evaluation.settings import AnswerSettings, EvalSpec
from vig.scoring import batching
from vig.scoring.loader import load_records, new_pixel_bytes, prefetch_in_thread
from vig.scoring.scorer import KEPT_ERRORS, Progress

CHUNK = 256  # questions

OnProgress = Callable[[Progress], None]


@dataclass
class Evaluation:
    """What `vig eval` did: the measures as measures.json holds them, the progress, the errors of all rows."""

    folder: Path
    measures: dict[str, Any]
    progress: Progress
    errors: ErrorLog


def evaluate(
    model: str,
    spec: EvalSpec,
    out: str | Path,
    answers: AnswerSettings | None = None,
    *,
    retry_failed: bool = False,
    baseline: str | Path | None = None,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Answers a task's questions into the folder `out` and measures; the same call resumes where one stopped.

    retry_failed: ask the error rows of earlier runs again. baseline: predictions of another model on the same
    questions, for paired tests. Raises DataError, ModelError and StoreError.
    """
    with EvalRun(model, spec, answers or AnswerSettings(), out, retry_failed, baseline) as run:
        if run.pending:
            run.load()
            run.answer(on_progress)
        return run.finish()


class EvalRun:
    """One evaluation, step by step: what it begins with reads the data and locks the folder, without a model."""

    def __init__(
        self,
        model: str,
        spec: EvalSpec,
        answers: AnswerSettings,
        out: str | Path,
        retry_failed: bool = False,
        baseline: str | Path | None = None,
    ):
        self.model, self.spec, self.answers = model, spec, answers
        self.folder, self.retry_failed = Path(out), retry_failed
        self.baseline = None if baseline is None else Baseline(baseline)
        self.progress = Progress()
        self.answerer: Answerer | None = None
        self._ending = ExitStack()

    def __enter__(self) -> EvalRun:
        self.truths = survey(self.spec)
        if self.baseline is not None:
            self.baseline.check(self.truths)
        read_manifest(self.folder)  # before anything is written there
        check_writable(self.folder)
        with ExitStack() as ending:
            self.lock = ending.enter_context(lock_folder(self.folder))
            self.store = PredictionFolder(self.folder, self.spec.binding(self.model, self.answers))
            self._ending = ending.pop_all()
        failed = {key for key, row in self.store.rows.items() if "error" in row}
        again = failed if self.retry_failed else set()
        self.pending = {key for key in self.truths if key not in self.store.rows or key in again}
        self.progress.total = len(self.truths)
        self.progress.done = self.progress.resumed = len(self.truths) - len(self.pending)
        self._failed_before = len(failed - again)
        return self

    def __exit__(self, *error: Any) -> None:
        self._ending.__exit__(*error)

    def load(self) -> None:
        """Loads the model. Raises ModelError, and SettingsDiffer where the folder's answers came from another."""
        self.answerer = Answerer(self.model, self.answers, self.spec.new_tokens(self.answers))
        if self.lock.after_death:  # perhaps at an image that crashed its decoder: a process apart dies alone
            self.answerer.workers = max(1, self.answerer.workers)
        self.store.begin(self.answerer.provenance())

    def answer(self, on_progress: OnProgress | None = None) -> None:
        """Answers what is pending, batch by batch."""
        self.progress.started = time.monotonic()
        if on_progress is not None:
            on_progress(self.progress)
        for block in blocks(self.spec, self.answerer, self.pending):
            for rows in self._answered(block):
                self.store.append(rows)
                self._count(rows, on_progress)
        self.progress.splits = self.answerer.splits

    def _answered(self, block: Sequence[Asked | Row]) -> Iterator[list[Row]]:
        errors = [row for row in block if isinstance(row, dict) and row["key"] in self.pending]
        if errors:
            yield errors
        for batch in batches(block, self.answerer):
            todo = [asked for asked in batch if asked.question.key in self.pending]
            if todo:
                yield answer_rows(self.answerer, todo)

    def _count(self, rows: Sequence[Row], on_progress: OnProgress | None) -> None:
        self.progress.done += len(rows)
        self.progress.tokens += sum(row.get("tokens", 0) for row in rows)
        for row in rows:
            if "error" in row:
                self.progress.failed += 1
                if len(self.progress.errors) < KEPT_ERRORS:
                    self.progress.errors.append(f"{row['key']} (id {row['id']!r}): {row['error']}")
        if on_progress is not None:
            on_progress(self.progress)

    def finish(self) -> Evaluation:
        """Reads the answers by the rule, measures, compares, and writes all of it."""
        rows = judged([self.store.rows[key] | truth for key, truth in self.truths.items()], self.spec)
        provenance = {**self.store.settings, "loaded": self.store.found}
        measures = measure(rows, self.spec, provenance)
        if self.baseline is not None:
            measures["comparison"] = self.baseline.comparison(rows, self.spec)
        errors = self.store.finish(rows, measures)
        self.progress.failed_before = self._failed_before
        return Evaluation(self.folder, measures, self.progress, errors)


def survey(spec: EvalSpec) -> dict[str, dict[str, Any]]:
    """key -> what a row will hold of its truth, of every question in reading order.

    Raises DataError for data that hold no question, or two of one key.
    """
    found: dict[str, dict[str, Any]] = {}
    first = None
    broken = 0
    for question in spec.questions():
        if question.key in found:
            raise DataError(f"two questions have the key {question.key}. Give each file a name of its own")
        found[question.key] = {} if isinstance(question, BrokenRecord) else truth_row(question)
        if isinstance(question, BrokenRecord):
            broken += 1
            first = first or question.error
    if not found:
        raise DataError(f"{spec.data} holds no records. Task {spec.task} reads {spec.row.reads}")
    if broken == len(found):
        reads = f"Task {spec.task} reads {spec.row.reads}"
        raise DataError(f"none of the {broken:,} records can be asked. The first is {first}. {reads}")
    return found


def truth_row(question: Question) -> Row:
    return {"key": question.key, "id": question.id, "image": question.image, **question.truth}


# --- questions -> blocks -> batches ---


def blocks(spec: EvalSpec, answerer: Answerer, pending: set[str]) -> Iterator[list[Asked | Row]]:
    """Encoded questions, and error rows for those that cannot be asked, of the chunks that hold pending ones."""

    def made() -> Iterator[list[Asked | Row]]:
        for chunk in batching.chunks(spec.questions(), CHUNK):
            if any(question.key in pending for question in chunk):
                yield from _encoded(chunk, answerer)

    return prefetch_in_thread(made()) if answerer.workers else made()


def _encoded(chunk: Sequence[Question | BrokenRecord], answerer: Answerer) -> Iterator[list[Asked | Row]]:
    samples: list[Sample | BrokenRecord] = []
    owners: list[int] = []
    for number, question in enumerate(chunk):
        own = _samples(question)
        samples += own
        owners += [number] * len(own)
    waiting = {number: owners.count(number) for number in dict.fromkeys(owners)}
    items: dict[int, dict[int, Any]] = {number: {} for number in waiting}
    new_bytes = new_pixel_bytes()
    block: list[Asked | Row] = []
    held = 0
    for item in load_records(samples, answerer.encoder, "pixels", answerer.workers):
        number = owners[item.place]
        items[number][item.place] = item
        held += new_bytes(item)
        if len(items[number]) < waiting[number]:
            continue
        block.append(_asked(chunk[number], [one for _, one in sorted(items.pop(number).items())]))
        if held >= batching.BLOCK_BYTES:
            yield block
            block, held = [], 0
    if block:
        yield block


def _samples(question: Question | BrokenRecord) -> list[Sample | BrokenRecord]:
    """What is encoded: the question, or it with each of its candidates for an answer."""
    if isinstance(question, BrokenRecord) or not question.candidates:
        return [question if isinstance(question, BrokenRecord) else question.sample]
    sample = question.sample
    found = []
    for number, text in enumerate(question.candidates):
        answer = {"role": "assistant", "content": [{"type": "text", "text": text}]}
        found.append(replace(sample, key=f"{sample.key}/{number}", messages=(*sample.messages[:-1], answer)))
    return found


def _asked(question: Question | BrokenRecord, items: list[Any]) -> Asked | Row:
    error = next((item.error for item in items if item.error is not None), None)
    if error is not None:
        return error_row(question, f"{error.reason}. {error.cure}")
    return Asked(question, items)


def error_row(question: Question | BrokenRecord, message: str) -> Row:
    truth = {"key": question.key, "id": question.id}
    return (truth if isinstance(question, BrokenRecord) else truth_row(question)) | {"error": message}


def batches(block: Sequence[Asked | Row], answerer: Answerer) -> list[list[Asked]]:
    """The good questions of a block, cut into batches of similar length."""
    good = [asked for asked in block if isinstance(asked, Asked)]
    settings = answerer.settings
    lengths = [asked.length(answerer.new_tokens) for asked in good]
    planned = batching.batches(lengths, settings.batch_tokens, settings.batch_size)
    return [[good[place] for place in batch] for batch in planned]


def answer_rows(answerer: Answerer, batch: Sequence[Asked]) -> list[Row]:
    """The rows of a batch; a question that alone does not fit into memory is an error row."""
    try:
        answers = answerer.answer(batch)
    except MemoryError as error:
        if len(batch) > 1:
            return [row for asked in batch for row in answer_rows(answerer, [asked])]
        cure = "Answer it on a larger device, or lower --max-new-tokens"
        return [error_row(batch[0].question, f"{error}. {cure}")]
    return [truth_row(asked.question) | answer for asked, answer in zip(batch, answers, strict=True)]
