"""Modality dependence: which sources need the image, and which are answered as well without it."""

from __future__ import annotations

from vig.data.sample import SampleError
from vig.evaluation.probes.answering import OnShare
from vig.evaluation.probes.data import ProbeData, image_name
from vig.evaluation.probes.findings import Findings, Unit
from vig.evaluation.probes.scored import ARGMAX, most_probable_tokens, right_answer, scored
from vig.evaluation.probes.settings import ProbeSettings
from vig.scoring.scorer import Scorer
from vig.store.rows import ScoreRow

ALL = "all"


def modality(scorer: Scorer, data: ProbeData, settings: ProbeSettings, on_share: OnShare = None) -> Findings:
    """Measures by source, and of all samples together."""
    found = Findings([], notes=[f"null image: {scorer.null.kind}"])
    with most_probable_tokens(scorer):
        rows = list(scored(scorer, data, found, on_share))
    for sample, row in rows:
        try:
            source = data.of(sample, settings.by)
        except SampleError as error:
            found.errors.append((error.key, error.id, f"{error.reason}. {error.cure}"))
            continue
        values = of_row(row, settings.near_zero)
        found.units.append(Unit(sample.key, image_name(sample), {ALL: values, source: values}))
    found.units.sort(key=lambda unit: list(unit.values)[-1])
    return found


def of_row(row: ScoreRow, near_zero: float) -> dict[str, float]:
    """The measures of one sample."""
    image, null = (float(right_answer(row, column)) for column in ARGMAX)
    return {
        "VIG": row.vig,
        "near zero": float(abs(row.vig) < near_zero),
        "right, image": image,
        "right, null": null,
        "gain": image - null,
    }
