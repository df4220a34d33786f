"""Match, partly, conflict: sample VIG of the same text beside pictures that fit it less and less (paper, Table 1)."""

from __future__ import annotations

from itertools import combinations, pairwise

from vig.data.sample import SampleError
from vig.evaluation.probes.answering import OnShare
from vig.evaluation.probes.data import ProbeData
from vig.evaluation.probes.findings import Findings, Unit, Values
from vig.evaluation.probes.scored import scored
from vig.evaluation.probes.settings import ProbeSettings
from vig.scoring.scorer import Scorer


def match(scorer: Scorer, data: ProbeData, settings: ProbeSettings, on_share: OnShare = None) -> Findings:
    """A unit is a pair: the same text beside one picture of each group. Pairs that lack a group are left out."""
    found = Findings([])
    pairs: dict[str, dict[str, float]] = {}
    for sample, row in scored(scorer, data, found, on_share):
        try:
            group, pair = data.of(sample, settings.group), data.of(sample, settings.pair)
            if group not in settings.order:
                known = ", ".join(settings.order)
                raise SampleError(
                    sample.key,
                    sample.id,
                    f"its {settings.group} is {group!r}, none of {known}",
                    "Name it in --order",
                )
            if group in pairs.setdefault(pair, {}):
                reason = f"pair {pair!r} has a sample of group {group!r} already"
                raise SampleError(sample.key, sample.id, reason, f"Give each its own {settings.pair}")
        except SampleError as error:
            found.errors.append((error.key, error.id, f"{error.reason}. {error.cure}"))
            continue
        pairs[pair][group] = row.vig
    for pair, vig in pairs.items():
        if len(vig) == len(settings.order):
            found.units.append(Unit(pair, pair, of_pair(vig, settings.order)))
    left_out = len(pairs) - len(found.units)
    if left_out:
        found.notes.append(
            f"{left_out:,} of {len(pairs):,} pairs lack one of {', '.join(settings.order)}: left out"
        )
    if found.units:
        found.notes.append(order_note(found.units, settings.order))
    return found


def of_pair(vig: dict[str, float], order: tuple[str, ...]) -> Values:
    """VIG of each group, the difference of every two, and whether VIG falls from each group to the next."""
    values: Values = {group: {"VIG": vig[group]} for group in order}
    for better, worse in combinations(order, 2):
        values[f"{better} - {worse}"] = {"VIG": vig[better] - vig[worse]}
    falls = all(vig[better] > vig[worse] for better, worse in pairwise(order))
    return values | {" > ".join(order): {"in order": float(falls)}}


def order_note(units: list[Unit], order: tuple[str, ...]) -> str:
    """Whether the means are in order: the paper's Table 1."""
    means = [sum(unit.values[group]["VIG"] for unit in units) / len(units) for group in order]
    holds = all(better > worse for better, worse in pairwise(means))
    return f"the order {' > '.join(order)} {'holds' if holds else 'DOES NOT HOLD'} in the means of {len(units):,} pairs"
