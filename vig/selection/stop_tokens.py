"""End-of-turn tokens in a selection: kept whatever their VIG, and left out of the sample's mean where asked.

The VIG of an end-of-turn token is near 0, since the model knows from the text alone that an answer is over. The paper's
rule would therefore hardly ever train one, and a model that is never taught to stop does not stop. Which tokens they
are the scores say: ids (``stop_ids`` of their metadata) at the end of a turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from vig.data.files import StoreError
from vig.store.rows import segment_means

STOP_TOKENS = (
    "keep",
    "select",
)  # in every kept sample; or by their VIG like any token, as the paper's rule does
# Answer tokens that a sample's VIG is the mean of: all, as the paper's; or without those that end turns.
MEANS = ("all", "content")


def check_stops(stop_tokens: str, mean: str) -> None:
    """Raises ValueError for other words."""
    for name, given, known in (("stop_tokens", stop_tokens, STOP_TOKENS), ("mean", mean, MEANS)):
        if given not in known:
            raise ValueError(f"{name} {given!r} is not one of {', '.join(known)}")


@dataclass(frozen=True)
class Stops:
    """ids: tokens that end turns. keep: in every kept sample. in_mean: they count in the sample's mean."""

    ids: tuple[int, ...] = ()
    keep: bool = False
    in_mean: bool = True

    columns = ("token_ids", "positions")

    @classmethod
    def of(cls, metadata: dict[str, Any], stop_tokens: str, mean: str) -> Stops:
        """For scores of this metadata. Raises ValueError for other words, StoreError where the scores do not tell."""
        check_stops(stop_tokens, mean)
        ids = metadata.get("stop_ids")
        if mean == "content" and ids is None:
            raise StoreError(
                "the scores do not say which tokens end turns, which mean = 'content' needs: score again"
            )
        return cls(tuple(ids or ()), bool(ids) and stop_tokens == "keep", mean == "all" or not ids)

    def settings(self) -> dict[str, str]:
        """What a selection records; nothing where it is the paper's rule, as selections of old have it."""
        kept = {"stop_tokens": "keep"} if self.keep else {}
        return kept | ({} if self.in_mean else {"mean": "content"})

    def mask(self, batch: pa.RecordBatch, rows: np.ndarray) -> np.ndarray:
        """Which answer tokens of these rows, one behind the other, end a turn: (n,) bool."""
        chosen = batch if rows.all() else batch.filter(pa.array(rows))
        return self.ends_of_turns(*(chosen[name].flatten().to_numpy() for name in self.columns))

    def ends_of_turns(self, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """(n,) bool: the last token of a turn, where it is one that ends turns. The next turn begins at position 0."""
        ends = np.ones(len(ids), bool)
        ends[:-1] = positions[1:] == 0
        last = np.flatnonzero(ends)
        ends[last] = np.isin(ids[last], self.ids)
        return ends

    def sample_vig(
        self, batch: pa.RecordBatch, rows: np.ndarray, lengths: np.ndarray, token_vig: np.ndarray
    ) -> np.ndarray:
        """Mean VIG of each row's tokens but those that end turns; of all where there are no others."""
        content = ~self.mask(batch, rows)
        share = segment_means(content, lengths)
        means = segment_means(np.where(content, token_vig, 0.0), lengths)
        return np.where(share > 0, means / np.where(share > 0, share, 1.0), segment_means(token_vig, lengths))


NO_STOPS = Stops()
