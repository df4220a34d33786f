"""From plain values to one self-contained HTML file. Knows no files of scores, no models."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

import jinja2
from markupsafe import Markup

from vig.reporting import charts
from vig.reporting.encode import keep_json, script_json
from vig.reporting.scale import STEPS, legend, readable, rounded, shade, signed
from vig.reporting.views import FEW, Page

HERE = Path(__file__).parent
SCRIPTS = ("core.js", "sample.js", "zoom.js", "keep.js", "marks.js", "list.js")


def render(page: Page, samples: list[dict], pictures: list[dict], template: str = "page.html.j2") -> str:
    """The page as HTML text: its own script and style, allowed by their hashes alone, and nothing from outside.

    samples: as `encode.sample_json` makes them, with the numbers of their pictures.
    """
    script, css = _asset(*SCRIPTS), _asset("page.css")
    state = {
        "steps": STEPS, "passes": [""], "nullNames": page.null_names, "tau": page.tau, "order": "lowest",
        "strata": {name: label for name, label, _ in page.strata},
        "keep": None if page.keep is None else keep_json(page.keep), **page.state,
    }  # fmt: skip
    return (
        _environment()
        .get_template(template)
        .render(
            page=page,
            css=Markup(css),
            script=Markup(script),
            script_hash=_hash(script),
            style_hash=_hash(css),
            state=script_json(state),
            samples=script_json(samples),
            pictures=script_json(pictures),
            charts=_histograms(page),
            legend=legend(),
            widest=max((abs(word.vig) for word in [*page.words.highest, *page.words.lowest]), default=1.0)
            or 1.0,
        )
    )


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        signed=signed, rounded=rounded, shade=shade, readable=readable, grouped=lambda n: f"{n:,}"
    )
    environment.globals.update(
        box_range=charts.box_range,
        box_row=charts.box_row,
        few=FEW,
        box_axis=charts.box_axis,
        curves=charts.curves,
        scatter=charts.scatter,
    )
    return environment


@cache
def _asset(*names: str) -> str:
    text = "\n".join((HERE / name).read_text(encoding="utf-8") for name in names)
    return f'(() => {{\n"use strict";\n{text}}})();\n' if names[0].endswith(".js") else text


def _hash(text: str) -> str:
    """For a Content-Security-Policy: what the browser computes of the element's text."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _histograms(page: Page) -> list[tuple[str, str, Markup]]:
    """(heading, remark, svg) of the histograms that there are."""
    found: list[tuple[str, str, Markup]] = []
    of_samples, of_tokens = (f" as selected ({measure})" if measure else "" for measure in page.measures)
    if page.sample_histogram is not None:
        drawn = charts.histogram(page.sample_histogram, page.tau, "samples")
        found.append(("Samples", "samples by VIG" + of_samples, drawn))
    if page.token_histogram is not None:
        drawn = charts.histogram(page.token_histogram, page.tau, "tokens", logarithmic=True)
        found.append(("Tokens", f"answer tokens by VIG{of_tokens}; logarithmic height", drawn))
    return found
