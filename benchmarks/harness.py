"""Verify, then time: contenders of one case, interleaved in one process.

A contender is checked against float64 before it is timed; what is wrong is not timed, and what cannot run is
listed with its reason. Timings are taken in rounds, one sample of every contender a round, in an order that is
rotated from round to round, so that slow drifts of a machine fall on all of them alike.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

FEW_ROUNDS = 3  # at least, whatever a case may cost
SETTLE_S = 0.004  # idle threads of the previous contender's runtime stop spinning meanwhile
SHORT_MS = 20.0  # calls shorter than this are repeated within a sample, after one untimed call
LONG_MS = 500.0  # a first call longer than this is warm enough
HOPELESS_MS = 3000.0  # what such a call lasts at least
SAMPLE_MS = 8.0  # what the repeated calls of a sample last at least
SLOW = 3.0  # a contender slower than this many baselines...
SLOW_ROUNDS = 2  # ...is timed in this many rounds only,
HOPELESS = 4.0  # and one slower than this, if a call is also long, has the call that was verified for its only sample
ONE_CALL = (
    f"more than {HOPELESS:.0f} times the baseline and over {HOPELESS_MS / 1e3:.0f} s in the call that was verified, "
    "which is then the only one, without a warm-up"
)


def can_run() -> str | None:
    """The `why_not` of a contender that runs anywhere."""
    return None


@dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    make(inputs) returns the callable that is timed; why_not() returns None or the reason why it cannot run here.
    `output` says what the callable returns and `exactness` by which rule it is judged; both are read by the suite's
    judge. The medians of all `baseline` contenders of a case, summed and times `work`, are what `ratio` divides by. A
    contender that `compiles` is warmed up once more after the call that is verified. `note` is printed beside the name.
    """

    name: str
    make: Callable[[Any], Callable[[], Any]]
    why_not: Callable[[], str | None] = can_run
    output: str = ""
    exactness: str = "own"
    ours: bool = False
    baseline: bool = False
    compiles: bool = False
    work: float = 1.0
    note: str = ""


@dataclass(frozen=True)
class Check:
    """Largest error against float64, and the largest part of the allowed error that was used (over 1: wrong)."""

    error: float
    used: float

    @property
    def passed(self) -> bool:
        return self.used <= 1.0  # False for NaN


@dataclass
class Entrant:
    """A contender that was found right, and its samples."""

    contender: Contender
    run: Callable[[], Any]
    warm_ms: float  # of the verified call, then of a warm one
    samples_ms: list[float]
    calls: int = 1  # in a sample


def quantile(samples: Sequence[float], q: float) -> float:
    """The q-quantile of the samples, linear between neighbours."""
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def wall_clock(run: Callable[[], Any], calls: int) -> float:
    """Milliseconds a call, over `calls` calls in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) * 1e3 / calls


class Timing(NamedTuple):
    """How contenders are timed."""

    rounds: int
    seconds: float = math.inf  # that all rounds may take together
    timer: Callable[[Callable[[], Any], int], float] = wall_clock
    probe: Callable[[], float] | None = None  # asked beside the rounds, such as for the peak of the moment
    # further fields of a row, and what finds each of them from the callable that was timed
    beside: Mapping[str, Callable[[Callable[[], Any]], Any]] | None = None
    settle_s: float = SETTLE_S
    say: Callable[[str], None] = lambda text: None


def measure(
    contenders: Sequence[Contender],
    inputs: Any,
    judge: Callable[[Contender, Any], Check],
    **timing: Any,  # the fields of `Timing`
) -> dict:
    """{"rows": one dict a contender, in the given order, "probe": median of what `probe` returned, or None}.

    A row holds name, ours, baseline, note, status ("ok", "wrong", "cannot run" or "failed") and either the reason
    or max_error, p20_ms, p50_ms, p80_ms, samples, and `ratio` to the baselines' summed medians (None without one);
    `beside` names further fields and what finds each of
    them from the callable that was timed. There are `rounds` rounds; where they would take longer than `seconds`,
    only baselines and our own rows are in all of them, and the others in as few as FEW_ROUNDS.
    """
    rounds, seconds, timer, probe, beside, settle_s, say = Timing(**timing)
    rows: dict[str, dict] = {}
    entrants: list[Entrant] = []
    for contender in contenders:
        say(f"verifying {contender.name}")
        row, entrant = _verify(contender, inputs, judge, timer)
        rows[contender.name] = row
        if entrant is not None:
            entrants.append(entrant)
    gc.collect()
    baseline_ms = sum(e.warm_ms for e in entrants if e.contender.baseline)
    for entrant in entrants:
        hopeless = entrant.warm_ms > max(HOPELESS * baseline_ms, HOPELESS_MS) and baseline_ms > 0
        if hopeless and not entrant.contender.compiles:
            entrant.samples_ms.append(entrant.warm_ms)
            continue
        say(f"warming {entrant.contender.name}")
        _warm(entrant, timer)
    live = [entrant for entrant in entrants if not entrant.samples_ms]
    round_s = sum(entrant.calls * entrant.warm_ms for entrant in live) * 1e-3
    common = min(rounds, max(FEW_ROUNDS, int(min(rounds, seconds / max(round_s, 1e-9)))))
    probed = _rounds(live, range(common), timer, probe, settle_s, say)
    judged = [entrant for entrant in live if entrant.contender.ours or entrant.contender.baseline]
    probed += _rounds(judged, range(common, rounds), timer, probe, settle_s, say)
    for entrant in entrants:
        rows[entrant.contender.name].update(_summary(entrant))
        for field, find in (beside or {}).items():
            say(f"{field} of {entrant.contender.name}")
            rows[entrant.contender.name][field] = find(entrant.run)
    add_ratios(rows.values())
    return {"rows": list(rows.values()), "probe": quantile(probed, 0.5) if probed else None}


def _verify(contender: Contender, inputs, judge, timer) -> tuple[dict, Entrant | None]:
    row = {
        "name": contender.name,
        "ours": contender.ours,
        "baseline": contender.baseline,
        "work": contender.work,
        "note": contender.note,
    }
    reason = contender.why_not()
    if reason is not None:
        return row | {"status": "cannot run", "reason": reason}, None
    try:
        run = contender.make(inputs)
        outputs = []
        first_ms = timer(lambda: outputs.append(run()), 1)
    except Exception as error:  # whatever a peer raises is what its row says; a suite goes on with the others
        text = (str(error).strip() or "no message").splitlines()[0]
        return row | {"status": "failed", "reason": f"{type(error).__name__}: {text:.200}"}, None
    check = judge(contender, outputs.pop())
    if not check.passed:
        reason = f"error {check.error:.3g}, {check.used:.3g} of what is allowed: not timed"
        return row | {"status": "wrong", "reason": reason, "max_error": check.error}, None
    return row | {"status": "ok", "max_error": check.error}, Entrant(contender, run, first_ms, [])


def _warm(entrant: Entrant, timer) -> None:
    """The verified call was a warm-up too, unless it compiled or was so short that first-time costs dominate it."""
    if entrant.contender.compiles or entrant.warm_ms < LONG_MS:
        entrant.warm_ms = timer(entrant.run, 1)
    if entrant.warm_ms < SHORT_MS:
        entrant.warm_ms = timer(entrant.run, 1)
        entrant.calls = max(1, math.ceil(SAMPLE_MS / max(entrant.warm_ms, 1e-3)))


def _rounds(entrants, rounds: range, timer, probe, settle_s, say) -> list[float]:
    baseline_ms = sum(e.warm_ms for e in entrants if e.contender.baseline) or math.inf
    probed = []
    for index in rounds:
        say(f"round {index + 1} of {rounds.stop}")
        if probe is not None:
            probed.append(probe())
        for place in range(len(entrants)):
            entrant = entrants[(place + index) % len(entrants)]
            if index >= SLOW_ROUNDS and entrant.warm_ms > SLOW * baseline_ms:
                continue
            time.sleep(settle_s)
            if entrant.calls > 1:
                timer(entrant.run, 1)
            entrant.samples_ms.append(timer(entrant.run, entrant.calls))
    return probed


def _summary(entrant: Entrant) -> dict:
    samples = entrant.samples_ms
    return {
        "p20_ms": quantile(samples, 0.2),
        "p50_ms": quantile(samples, 0.5),
        "p80_ms": quantile(samples, 0.8),
        "samples": len(samples),
        "ratio": None,
    }


def add_ratios(rows) -> None:
    """Sets `ratio` of the rows that were timed, where all baselines were."""
    rows = list(rows)
    baselines = [row for row in rows if row["baseline"]]
    if not baselines or any(row["status"] != "ok" for row in baselines):
        return
    total = sum(row["p50_ms"] for row in baselines)
    for row in rows:
        if row["status"] == "ok":
            row["ratio"] = row["p50_ms"] / (row["work"] * total)


def median_ratio(rows: Sequence[dict], name: str, other: str, times: float = 1.0) -> float | None:
    """p50 of row `name` over `times` p50 of row `other`; None when one of them was not timed."""
    by_name = {row["name"]: row for row in rows}
    pair = [by_name.get(name, {}).get("p50_ms"), by_name.get(other, {}).get("p50_ms")]
    return None if None in pair else pair[0] / (times * pair[1])
