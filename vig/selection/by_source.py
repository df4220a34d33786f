"""A tau within each source, so that none is emptied: text-heavy sources have a lower VIG than others.

tau_s = the (100 - p)-th percentile of sample VIG over the multimodal samples of source s
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from vig.store.rows import segment_means


def taus_of(
    vig: np.ndarray,  # (M,) sample VIG, nats
    codes: np.ndarray,  # (M,) of their sources
    names: list[str],
    p: float,
    tau_floor: float | None,
) -> dict[str, float]:
    """The tau of each source that has a multimodal sample, nats."""
    taus = {}
    for code, name in enumerate(names):
        mine = vig[codes == code]
        if len(mine):
            tau = float(np.percentile(mine, 100 - p))
            taus[name] = tau if tau_floor is None else max(tau, float(tau_floor))
    return taus


class SourceCounts:
    """Of each source: its tau, multimodal samples and their tokens, and how many of them are kept."""

    def __init__(self, taus: dict[str, float]):
        zeros = {"samples_total": 0, "samples_kept": 0, "tokens_total": 0, "tokens_kept": 0}
        self.rows: dict[str, dict[str, Any]] = {
            name: {"source": name, "tau": tau, **zeros} for name, tau in taus.items()
        }

    def add(self, batch: pa.RecordBatch, ok: np.ndarray, lengths: np.ndarray, chosen: pa.RecordBatch) -> None:
        """batch: of scores; ok, lengths (R,): its multimodal rows and their tokens; chosen: its selection rows."""
        every = np.where(chosen["token_keep"].is_valid().to_numpy(zero_copy_only=False), lengths, 0)
        marks = chosen["token_keep"].flatten().to_numpy(zero_copy_only=False)
        kept = np.rint(segment_means(marks.astype(np.float64), every) * every).astype(np.int64)
        keep = chosen["keep"].to_numpy(zero_copy_only=False)
        names = batch["source"].fill_null("").to_pylist()
        for row in np.flatnonzero(ok).tolist():
            counts = self.rows[names[row]]
            counts["samples_total"] += 1
            counts["samples_kept"] += int(keep[row])
            counts["tokens_total"] += int(lengths[row])
            counts["tokens_kept"] += int(kept[row])

    def table(self) -> list[dict[str, Any]]:
        return list(self.rows.values())


def source_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Lines for a terminal, one a source."""
    width = max((len(row["source"]) for row in rows), default=0)
    return [
        f"  {row['source']:{width}}  tau = {row['tau']:.6g} nats; samples {row['samples_kept']:,} of "
        f"{row['samples_total']:,}, tokens {row['tokens_kept']:,} of {row['tokens_total']:,}"
        for row in rows
    ]
