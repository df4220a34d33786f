"""From plain views to one self-contained HTML file: colours, charts and pictures. Knows no files, no models."""

from __future__ import annotations

import base64
import io
import math
import re
from bisect import bisect_right
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from vig.reporting.views import Histogram, Page, SampleView

STEPS = (0.1, 0.5, 1.0, 2.0, 4.0)  # nats; edges of the colour scale, the same in every report
CHART = (560, 204, 24, 26, 40)  # width, height, top, bottom, left of the plot, in SVG units
EXACT_PIXELS = 160  # pictures up to this side are kept pixel by pixel (PNG) and enlarged without smoothing
LARGEST = 448  # side in pixels that larger pictures are reduced to
SPECIAL = re.compile(r"<\S+>|\[\S+\]")  # </s>, <|im_end|>: part of the answer, not of its words
PICTURE = 168  # width of a picture on the page, CSS pixels


def render(page: Page) -> str:
    """The page as HTML text: no script, no link to anything outside."""
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(picture=picture, signed=signed, rounded=rounded, grouped=lambda n: f"{n:,}")
    return environment.get_template("page.html.j2").render(
        page=page,
        css=Markup((here / "page.css").read_text(encoding="utf-8")),
        charts=_charts(page),
        legend=legend(),
        answer=answer,
        values=values,
        widest=max((abs(word.vig) for word in [*page.highest, *page.lowest]), default=1.0) or 1.0,
        shade=shade,
    )


def shade(vig: float) -> str:
    """CSS class of a VIG value: "z" near zero, "p1" to "p5" above, "n1" to "n5" below."""
    level = bisect_right(STEPS, abs(vig))
    return "z" if not level else f"{'p' if vig > 0 else 'n'}{level}"


def signed(value: float) -> str:
    """A value in nats with its sign, to two places; a true minus."""
    text = f"{value:+.2f}".replace("-", "−")
    return "0.00" if text in ("+0.00", "−0.00") else text


def rounded(value: float, digits: int = 3) -> str:
    """A value to so many digits, with a true minus and no padded exponent."""
    text = f"{value:.{digits}g}"
    mantissa, _, exponent = text.partition("e")
    text = f"{mantissa}e{int(exponent)}" if exponent else text
    return text.replace("-", "−")


def legend() -> list[tuple[str, str]]:
    """(class, label) of each step of the colour scale, from most negative to most positive."""
    edges = [f"{edge:g}" for edge in STEPS]
    below = [(f"n{level}", f"−{edges[level - 1]}") for level in range(len(STEPS), 0, -1)]
    above = [(f"p{level}", f"+{edges[level - 1]}") for level in range(1, len(STEPS) + 1)]
    return [*below, ("z", "0"), *above]


def answer(view: SampleView) -> Markup:
    """The answer's tokens as coloured spans. White space before a word stays outside its colour."""
    turns = dict(view.turns)
    out = []
    for index, text in enumerate(view.tokens):
        if index in turns:
            out.append(Markup('</p><p class="question">{}</p><p class="answer">').format(turns[index]))
        body = text.lstrip(" ") or text
        out.append("" if index in turns or not index else " " * (len(text) - len(body)))
        breaks = body.count("\n")
        body = body.replace("\n", "⏎") if body.strip("\n") == "" else body
        kind, title = _token_look(view, index)
        if body:
            out.append(Markup('<span class="t {}" title="{}">{}</span>').format(kind, title, body))
        if breaks and body.strip("⏎") == "":
            out.append("\n" * breaks)
    return Markup("").join(out)


def _token_look(view: SampleView, index: int) -> tuple[str, str]:
    """CSS classes and hover text of a token."""
    image = view.nll_image[index]
    if len(view.vig):
        kinds = [shade(view.vig[index])]
        parts = f"{view.nll_null[index]:.3f} (null) − {image:.3f} (image)"
        title = f"VIG {signed(view.vig[index])} = {parts} nats"
    else:
        kinds, title = ["z"], f"NLL {image:.3f} nats, one pass: no VIG"
    if SPECIAL.fullmatch(view.tokens[index].strip()):
        kinds.append("special")
    if view.kept is not None:
        kinds.append("kept" if view.kept[index] else "left")
        title += "; trained on" if view.kept[index] else "; not trained on"
    return " ".join(kinds), title


def values(view: SampleView) -> Markup:
    """The same values as a table that opens: for keyboards, touch screens and paper."""
    if not view.tokens:
        return Markup("")
    columns = [[text.strip(" ").replace("\n", "⏎") for text in view.tokens]]
    if len(view.vig):
        columns += [map(signed, view.vig), map(_thousandths, view.nll_null)]
    columns.append(map(_thousandths, view.nll_image))
    if view.kept is not None:
        columns.append("yes" if kept else "no" for kept in view.kept)
    names = ["token", *(["VIG", "NLL null"] if len(view.vig) else []), "NLL image"]
    names += ["trained on"] if view.kept is not None else []
    head = Markup("").join(Markup("<th>{}</th>").format(name) for name in names)
    rows = (
        Markup("").join(Markup("<td>{}</td>").format(cell) for cell in row)
        for row in zip(*columns, strict=True)
    )
    body = Markup("").join(Markup("<tr>{}</tr>").format(row) for row in rows)
    return Markup(
        '<details class="values"><summary>values of its tokens, nats</summary>'
        '<div tabindex="0"><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div></details>'
    ).format(head, body)


def _thousandths(value: float) -> str:
    return f"{value:.3f}"


def picture(image: Image.Image, alt: str) -> Markup:
    """An <img> with the picture inside. Small pictures keep every pixel and are enlarged with hard edges."""
    buffer = io.BytesIO()
    small = max(image.size) <= EXACT_PIXELS
    image = image.convert("RGB")
    if small:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
        image.save(buffer, "JPEG", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    width, height = image.size
    scale = PICTURE / max(width, height)
    return Markup('<img class="{}" width="{}" height="{}" alt="{}" src="data:image/{};base64,{}">').format(
        "pixels" if small else "photo",
        max(1, round(width * scale)),
        max(1, round(height * scale)),
        alt,
        "png" if small else "jpeg",
        data,
    )


# --- charts ---


def _charts(page: Page) -> list[tuple[str, str, Markup]]:
    """(heading, remark, svg) of the histograms that there are."""
    found = []
    if page.sample_histogram is not None:
        found.append(("Samples", "samples by VIG", histogram(page.sample_histogram, page.tau, "samples")))
    if page.token_histogram is not None:
        remark = "answer tokens by VIG; logarithmic height"
        found.append(
            ("Tokens", remark, histogram(page.token_histogram, page.tau, "tokens", logarithmic=True))
        )
    return found


def histogram(data: Histogram, tau: float | None, unit: str, *, logarithmic: bool = False) -> Markup:
    """Bars coloured by the tokens' scale, a line at zero and one at tau."""
    width, height, top, bottom, left = CHART
    floor, tall = height - bottom, height - bottom - top
    most = max(int(data.counts.max(initial=0)), 1)
    heights = np.log1p(data.counts) / np.log1p(most) if logarithmic else data.counts / most
    step = (width - left) / len(data.counts)

    def across(value: float) -> float:
        return left + (value - data.low) / (data.high - data.low) * (width - left)

    parts = []
    for index, (count, share) in enumerate(zip(data.counts.tolist(), heights.tolist(), strict=True)):
        if count:
            start = data.low + index * data.width
            label = f"{signed(start)} to {signed(start + data.width)} nats: {count:,} {unit}"
            rise = max(tall * share, 1.0)
            shape = (
                shade(start + data.width / 2),
                left + index * step,
                floor - rise,
                step - 0.8,
                rise,
                label,
            )
            parts.append(
                '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>'.format(
                    *shape
                )
            )
    parts.append(f'<path class="axis" d="M{left} {floor}H{width}"/>')
    for value in ticks(data.low, data.high):
        parts.append(
            f'<text x="{across(value):.1f}" y="{floor + 17}" text-anchor="middle">{_tick(value)}</text>'
        )
        parts.append(f'<path class="axis" d="M{across(value):.1f} {floor}v4"/>')
    for count in height_ticks(most, logarithmic):
        share = math.log1p(count) / math.log1p(most) if logarithmic else count / most
        parts.append(
            f'<text x="{left - 6}" y="{floor - tall * share + 4:.1f}" text-anchor="end">{short(count)}</text>'
        )
        parts.append(f'<path class="grid" d="M{left} {floor - tall * share:.1f}H{width}"/>')
    if tau is not None and data.low < tau < data.high:
        end = across(tau) > width - 90
        place = f'x="{across(tau) + (-5 if end else 5):.1f}" y="{top - 8}" text-anchor="{"end" if end else "start"}"'
        parts.append(f'<path class="tau" d="M{across(tau):.1f} {top - 18}V{floor}"/>')
        parts.append(f'<text class="taulabel" {place}>τ = {rounded(tau)}</text>')
    label = f"Histogram of VIG in nats, {int(data.counts.sum()):,} {unit}"
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    )


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """About so many round values between the ends."""
    rough = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def height_ticks(most: int, logarithmic: bool) -> list[int]:
    if logarithmic:
        factors = (1, 2, 5) if most < 50 else (1,)
        values = [10**power * factor for power in range(12) for factor in factors]
        values = [value for value in values if (value > 1 or most < 50) and value <= most]
        return values[:: max(1, math.ceil(len(values) / 4))]
    return [int(value) for value in ticks(0, most, 4) if value >= 1 and value == int(value)]


def short(count: int) -> str:
    """12,000 -> 12k."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:g}{letter}"
    return str(count)


def _tick(value: float) -> str:
    return f"{value:g}".replace("-", "−")
