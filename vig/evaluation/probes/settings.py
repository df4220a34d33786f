"""What the probes are asked for, as one value that is stored with their figures and compared with a baseline's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vig.evaluation.probes.table import JUDGES, MATCHES, NEAR_ZERO, PROBES

STATEMENT = "The answer is: {claim}"
SOURCE = "source"  # a field that every sample has
FIELD_NAMES = ("by", "claim", "group", "pair")  # settings that name a field of the records


@dataclass(frozen=True)
class ProbeSettings:
    """Raises ValueError for values that mean nothing.

    by: field of the records whose values are the sources of `modality`, and within which `misleading-text` draws its
        wrong answers; "source" is the sample's own.
    fields: a JSON file {id: {field: value}}, for data whose records do not hold the fields themselves.
    claim: field that holds the claimed wrong answer; None draws it from the other answers.
    statement: what is put before the question, with {claim} in it.
    judges: any of "likelihood" and "generation". max_new_tokens: of a generated answer.
    group, pair, order: fields of `match`, and the groups from best to worst fit.
    near_zero: nats under which |sample VIG| counts as none. seed: of claims and of the bootstrap.
    """

    by: str = SOURCE
    fields: Path | None = None
    claim: str | None = None
    statement: str = STATEMENT
    judges: tuple[str, ...] = JUDGES
    max_new_tokens: int = 64
    group: str = "match"
    pair: str = "pair"
    order: tuple[str, ...] = MATCHES
    near_zero: float = NEAR_ZERO
    seed: int = 0
    resamples: int = 2000

    def __post_init__(self):
        if "{claim}" not in self.statement:
            raise ValueError(f"statement = {self.statement!r}, expected a text with {{claim}} in it")
        wrong = [name for name in self.judges if name not in JUDGES]
        if wrong or not self.judges:
            raise ValueError(f"judges = {self.judges!r}, expected one or both of {', '.join(JUDGES)}")
        if len(set(self.order)) != len(self.order) or len(self.order) < 2:
            raise ValueError(f"order = {','.join(self.order)!r}, expected two or more different groups")
        for name, least in (("max_new_tokens", 1), ("resamples", 100)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}, expected at least {least}")
        if not self.near_zero > 0:
            raise ValueError(f"near_zero = {self.near_zero}, expected more than 0 nats")

    def stored(self, probe: str) -> dict[str, Any]:
        """Those that `probe` depends on."""
        return {name: getattr(self, name) for name in PROBES[probe].settings}

    def fields_of(self, probe: str) -> list[str]:
        """The fields of the records that `probe` asks for."""
        names = [getattr(self, name) for name in PROBES[probe].settings if name in FIELD_NAMES]
        return [name for name in names if name not in (None, SOURCE)]
