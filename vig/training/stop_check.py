"""Whether training teaches the model to stop."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import torch

LOOKED_AT = 16  # micro-batches


def warn_if_nothing_stops(
    batches: Iterator[dict[str, Any]], stop_ids: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Hands the micro-batches on; warns where none of the first has a trained end-of-turn token."""
    ids, seen, found = torch.tensor(list(stop_ids), dtype=torch.int64), 0, False
    try:
        with closing(batches):
            for batch in batches:
                if not found and seen < LOOKED_AT:
                    seen += 1
                    found = bool(torch.isin(batch["labels"].cpu(), ids).any())
                    if not found and seen == LOOKED_AT:
                        _warn(seen)
                yield batch
    finally:  # perhaps before its end: a run takes as many batches as it has steps
        if not found and 0 < seen < LOOKED_AT:
            _warn(seen)


def _warn(seen: int) -> None:
    warnings.warn(
        f"none of the first {seen} batches has a trained end-of-turn token, so that the model may not learn to stop. "
        "Score with --end-of-turn add, and select with --stop-tokens keep",
        stacklevel=3,
    )
