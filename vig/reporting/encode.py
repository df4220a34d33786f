"""What the page's script is given: samples and pictures as JSON that no text of theirs can leave."""

from __future__ import annotations

import json
from typing import Any

from markupsafe import Markup

from vig.reporting.views import KeepCurve, SampleView

UNIT = 1e-4  # nats; token values are whole numbers of it (core.js: UNIT)
ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def script_json(value: Any) -> Markup:
    """JSON for a <script type="application/json">: without <, > and &, so that nothing in it ends the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for char, escape in ESCAPES.items():
        text = text.replace(char, escape)
    return Markup(text)


def sample_json(view: SampleView, source: int) -> dict[str, Any]:
    """A sample for the script, without its pictures: `im` and `nu` take their numbers."""
    return {
        "k": view.key,
        "i": view.id,
        "s": source,
        "st": view.status,
        "q": view.question,
        "t": view.tokens,
        "v": [one.vig for one in view.passes] or [None],
        "a": [_units(one.nll_image) for one in view.passes],
        "b": [_units(one.nll_null) for one in view.passes],
        "x": [{name: _units(values) for name, values in one.stats.items()} for one in view.passes],
        "m": [None if one.kept is None else "".join("01"[kept] for kept in one.kept) for one in view.passes]
        or [None],
        "u": [list(turn) for turn in view.turns],
        "w": view.picked,
        "r": view.row,
        "e": view.stop,
        "c": view.selected_vig,
        "o": view.note,
        "d": view.move,
        "im": [],
        "nu": [],
    }


def _units(values: list[float]) -> list[int]:
    return [round(value / UNIT) for value in values]


def keep_json(keep: KeepCurve) -> dict[str, Any]:
    taus = [[None if tau != tau else tau for tau in row] for row in keep.taus.tolist()]
    return {
        "p": keep.p.tolist(),
        "sources": keep.sources,
        "taus": taus,
        "samples": {rule: counts.tolist() for rule, counts in keep.samples.items()},
        "tokens": {rule: counts.tolist() for rule, counts in keep.tokens.items()},
        "totals": keep.totals.tolist(),
    }
