"""Statistics of answer tokens that scores may hold beside the likelihoods: what each is stored as."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class StatColumn(NamedTuple):
    """One more list<float32> column of a score file, a value an answer token, in nats."""

    name: str  # the column
    label: str  # for people
    of_vig: str  # what `linear_vig` calls it
    # what `linear_nll` calls it; None: null in the row of a text-only sample, which has one pass
    of_nll: str | None


TOKEN_STATS: dict[str, tuple[StatColumn, ...]] = {
    "kl": (StatColumn("token_kl", "KL", "kl", None),),
    "entropy": (
        StatColumn("token_entropy_image", "entropy image", "entropy_image", "entropy"),
        StatColumn("token_entropy_null", "entropy null", "entropy_null", None),
    ),
}


def check_stats(stats: Iterable[str]) -> tuple[str, ...]:
    """The names in the order of the table, each once. Raises ValueError for a name that it does not have."""
    names = [stats] if isinstance(stats, str) else list(stats)
    for name in names:
        if name not in TOKEN_STATS:
            raise ValueError(f"stats: {name!r} is not one of {', '.join(TOKEN_STATS)}")
    return tuple(name for name in TOKEN_STATS if name in names)


def stat_columns(stats: Iterable[str]) -> list[StatColumn]:
    """The columns of these statistics, in the order of the table."""
    return [column for name in check_stats(stats) for column in TOKEN_STATS[name]]
