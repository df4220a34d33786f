"""Score rows of the samples that are probed, with what greedy decoding would write at each answer token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from vig.data.sample import Sample
from vig.evaluation.probes.data import ProbeData
from vig.evaluation.probes.findings import Findings
from vig.scoring.scorer import Progress, Scorer
from vig.store.rows import ScoreRow
from vig.store.token_stats import StatColumn

ARGMAX = (
    StatColumn("token_argmax_image", "argmax image", "argmax_image", "argmax"),
    StatColumn("token_argmax_null", "argmax null", "argmax_null", None),
)


def scored(
    scorer: Scorer, data: ProbeData, found: Findings, on_share: Callable[[float], None] | None = None
) -> Iterator[tuple[Sample, ScoreRow]]:
    """Each sample with its row; samples that cannot be scored become errors of `found`."""

    def tell(progress: Progress) -> None:
        if on_share is not None:
            on_share(progress.done / len(data.samples))

    for sample, row in zip(data.samples, scorer.score(data.samples, tell), strict=True):
        if row.status == "ok":
            yield sample, row
        else:
            found.errors.append((sample.key, sample.id, row.status.removeprefix("error: ")))


@contextmanager
def most_probable_tokens(scorer: Scorer) -> Iterator[None]:
    """While it lasts, rows hold the most probable token at each answer token, of both passes, from the same sweep.

    Ids stand in float32 columns, exact up to 2^24.
    """
    before = scorer.passes.stat_columns
    scorer.passes.stat_columns = [*before, *ARGMAX]
    try:
        yield
    finally:
        scorer.passes.stat_columns = before


def right_answer(row: ScoreRow, column: StatColumn) -> bool:
    """Whether every answer token, end of turn included, is the most probable one after those before it.

    By induction greedy decoding writes just this answer.
    """
    return bool((np.asarray(row.token_stats[column.name]) == np.asarray(row.token_ids)).all())
