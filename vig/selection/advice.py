"""What a reader of a selection should know: a tau that tells little apart, a model that barely looks, a mistaken p."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LOW_TAU = 1e-3  # nats; at or under it tau hardly tells tokens apart
NEAR_FLOOR = 10  # times the noise floor


def share_of(part: int, whole: int) -> str:
    """ "3 of 4 (75.0 %)\""""
    return f"{part:,} of {whole:,} ({100 * part / whole if whole else 0:.1f} %)"


def noise_floor(metadata: dict) -> float | None:
    """|VIG_t| in nats that arithmetic alone makes, as the scoring run measured it; None where it could not."""
    return metadata.get("noise_floor", metadata.get("notes", {}).get("noise_floor"))


def tau_warnings(
    tau: float | None,
    metadata: dict,
    counts: Mapping[str, Any] | None = None,
    sources: Sequence[Mapping[str, Any]] | None = None,
    measure: str = "vig",
) -> list[str]:
    """What a reader of the selection should know of its tau, or of each source's.

    metadata: of the scores; counts: of the selection; sources: their rows, each with tau and counts of its own.
    measure: of `MEASURES`; a likelihood is below 0, and tells nothing of the image.
    """
    if sources:
        return [
            f"source {row['source']}: {line}"
            for row in sources
            for line in tau_warnings(row["tau"], metadata, row)
        ]
    if tau is None:
        return ["no scored sample has an image: there is no tau, and only text-only samples are kept"]
    if measure == "loss":
        return []
    floor = noise_floor(metadata)
    if tau <= LOW_TAU:
        passing = ""
        if counts is not None:
            kept = share_of(counts["tokens_kept"], counts["tokens_total"])
            passing = f": {kept} of the answer tokens with an image are kept"
        return [
            f"tau = {tau:.3g} is at or under {LOW_TAU:g} nats{passing}. --tau-floor (tau_floor=) sets a lowest tau"
        ]
    if floor is not None and tau <= floor:
        return [f"tau = {tau:.3g} is at or under the scores' noise floor, {floor:.3g} nats"]
    return []


def barely_used(vig: np.ndarray, metadata: dict) -> list[str]:
    """Where half of the samples gain hardly more from their image than arithmetic alone makes."""
    floor = noise_floor(metadata)
    if floor is None or not len(vig):
        return []
    median = float(np.median(np.abs(vig)))
    if median > NEAR_FLOOR * floor:
        return []
    return [
        f"this model barely uses the image: of half of the samples |VIG| is at most {median:.3g} nats, and the noise "
        f"floor is {floor:.3g}"
    ]


def mistaken_share(p: float) -> list[str]:
    """A p that looks like a fraction of 1."""
    return (
        [f"p = {p:g} keeps {p:g} % of the samples with an image. Was --p {100 * p:g} meant?"] if p < 1 else []
    )
