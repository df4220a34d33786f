"""What is asked of a selection, checked before any scores are read."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vig.selection.rule import check_easy
from vig.selection.stop_tokens import Stops, check_stops

LEVELS = ("both", "sample", "token", "random")


@dataclass(frozen=True)
class Choice:
    """What is asked of a selection. Raises ValueError for values that make no sense, whatever the scores."""

    p: float = 70.0
    level: str = "both"
    clip: float | None = None
    tau_floor: float | None = None
    seed: int = 0
    by: str | None = None
    stop_tokens: str = "keep"
    mean: str = "all"
    keep_easy: float | None = None

    def __post_init__(self):
        if not 0 < self.p <= 100:
            raise ValueError(f"p is the percentage of samples to keep, above 0 and up to 100; got {self.p!r}")
        if self.level not in LEVELS:
            raise ValueError(f"level {self.level!r} is not one of {', '.join(LEVELS)}")
        if self.clip is not None and not self.clip < 0:
            raise ValueError(
                f"clip is a log-probability in nats, below 0 (log 0.01 = -4.605); got {self.clip!r}"
            )
        if self.tau_floor is not None and not math.isfinite(self.tau_floor):
            raise ValueError(f"tau_floor is a finite number of nats; got {self.tau_floor!r}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed is an integer of 64 bits; got {self.seed!r}")
        if self.by not in (None, "source", "kl", "loss"):
            raise ValueError(
                f'by = {self.by!r}, expected "source", "kl" or "loss", or nothing for one tau over all samples'
            )
        if self.by in ("kl", "loss") and self.clip is not None:
            raise ValueError(
                f"clip bounds the log-probabilities of VIG, which by = {self.by!r} does not use; leave it out"
            )
        if self.by == "loss" and self.level != "sample":
            raise ValueError(
                f'level = {self.level!r}: by = "loss" filters whole samples. Give --level sample (level="sample")'
            )
        if self.by == "loss" and self.tau_floor is not None:
            raise ValueError("tau_floor is a lowest VIG, which by = 'loss' does not use; leave it out")
        if self.by == "source" and self.level == "random":
            raise ValueError("level random draws from all samples alike; leave out by (--by source)")
        check_easy(self.keep_easy)
        if self.keep_easy is not None and self.level == "random":
            raise ValueError(
                f"level random draws its tokens, and keep_easy = {self.keep_easy:g} names some of them; leave out "
                "keep_easy (--keep-easy)"
            )
        check_stops(self.stop_tokens, self.mean)

    def recorded(self, stops: Stops) -> dict[str, object]:
        """What a selection records of it: of the stop tokens what takes effect on its scores."""
        asked = {name: value for name, value in vars(self).items() if name not in ("stop_tokens", "mean")}
        return asked | stops.settings()
