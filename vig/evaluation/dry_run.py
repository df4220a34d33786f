"""`vig eval --dry-run`: every record opened, decoded and tokenised; a few answered to take the time; nothing stored."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from vig.data.error_log import ErrorLog
from vig.evaluation.answering import Answerer, Asked
from vig.evaluation.run import OnProgress, answer_rows, batches, blocks, survey
from vig.evaluation.settings import AnswerSettings, EvalSpec
from vig.scoring.scorer import Progress


@dataclass
class Estimate:
    """What a dry run found, and how long the whole would take at the rate of the first batch."""

    progress: Progress = field(default_factory=Progress)
    answered: int = 0  # questions that the rate was measured on
    seconds: float = 0.0  # that they took

    @property
    def good(self) -> int:
        return self.progress.done - self.progress.failed

    @property
    def whole(self) -> float | None:
        """Seconds for all questions that can be asked."""
        return self.seconds * self.good / self.answered if self.answered else None

    def summary(self) -> dict[str, Any]:
        return {
            "done": self.progress.done, "failed": self.progress.failed, "answered": self.answered,
            "estimated_seconds": self.whole,
        }  # fmt: skip


def dry_run(
    model: str,
    spec: EvalSpec,
    answers: AnswerSettings,
    on_progress: OnProgress | None = None,
    errors: ErrorLog | None = None,
) -> Estimate:
    """errors: takes those of all records. Raises DataError and ModelError."""
    keys = set(survey(spec))
    answerer = Answerer(model, answers, spec.new_tokens(answers))
    estimate = Estimate()
    estimate.progress.total = len(keys)
    for block in blocks(spec, answerer, keys):
        bad = [row for row in block if not isinstance(row, Asked)]
        estimate.progress.done += len(block)
        estimate.progress.failed += len(bad)
        if errors is not None:
            errors.extend((row["key"], row["id"], row["error"]) for row in bad)
        planned = batches(block, answerer)
        if planned and not estimate.answered:
            started = time.perf_counter()
            answer_rows(answerer, planned[0])
            estimate.seconds = time.perf_counter() - started
            estimate.answered = len(planned[0])
        if on_progress is not None:
            on_progress(estimate.progress)
    return estimate
