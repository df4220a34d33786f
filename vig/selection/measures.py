"""What samples and tokens are ranked by: one value a token, its mean a sample, and the highest are kept."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from vig.data.files import StoreError
from vig.selection.stop_tokens import NO_STOPS, Stops
from vig.store.rows import segment_means


class Measure(NamedTuple):
    label: str
    unit: str  # of tau


MEASURES = {  # the names are values of `by`, but for the first, which stands where none is given
    "vig": Measure("VIG", "nats"),
    "kl": Measure("KL", "nats of KL"),
    "loss": Measure("loss", "nats of log-likelihood"),
}


def measure_of(by: str | None) -> str:
    """The name of what a selection ranks by. by: of the selection."""
    return by if by in MEASURES else "vig"


def unit_of(by: str | None) -> str:
    return MEASURES[measure_of(by)].unit


def token_and_sample_values(
    batch: pa.RecordBatch,
    column: str,  # float32 list<T>, a value an answer token
    ok: np.ndarray,  # (R,) bool
    lengths: np.ndarray,  # of the ok rows
    stops: Stops = NO_STOPS,
) -> tuple[np.ndarray, np.ndarray]:
    """A stored value of the multimodal samples' tokens, float64, and its mean over each sample's answer."""
    rows = batch if ok.all() else batch.filter(pa.array(ok))
    values = rows[column].flatten().to_numpy().astype(np.float64)
    if len(values) != lengths.sum():
        first = rows["key"][0].as_py() if rows.num_rows else "?"
        raise StoreError(
            f"{column} and n_tokens disagree in the batch that begins with {first}: score it again"
        )
    means = segment_means(values, lengths) if stops.in_mean else stops.sample_vig(batch, ok, lengths, values)
    return values, means
