"""How values of VIG and text look: the colour scale, signs, rounding, ticks. The same in every report."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from typing import Any

STEPS = (0.1, 0.5, 1.0, 2.0, 4.0)  # nats; edges of the colour scale, the same in every report
HIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202d\u202e]")


def shade(vig: float) -> str:
    """CSS class of a VIG value: "z" near zero, "p1" to "p5" above, "n1" to "n5" below."""
    level = bisect_right(STEPS, abs(vig))
    return "z" if not level else f"{'p' if vig > 0 else 'n'}{level}"


def legend() -> list[tuple[str, str]]:
    """(class, label) of each step of the colour scale, from most negative to most positive."""
    edges = [f"{edge:g}" for edge in STEPS]
    below = [(f"n{level}", f"−{edges[level - 1]}") for level in range(len(STEPS), 0, -1)]
    above = [(f"p{level}", f"+{edges[level - 1]}") for level in range(1, len(STEPS) + 1)]
    return [*below, ("z", "0"), *above]


def signed(value: float, digits: int = 2) -> str:
    """A value in nats with its sign, to so many places; a true minus. What rounds to zero has no sign."""
    text = f"{value:+.{digits}f}".replace("-", "−")
    return text if text.strip("+−0.") else text[1:]


def places(width: float) -> int:
    """Decimal places that tell values of this distance apart; at least 2."""
    return max(2, min(9, 1 - math.floor(math.log10(width)))) if width > 0 else 2


def rounded(value: float, digits: int = 3) -> str:
    """A value to so many digits, with a true minus and no padded exponent."""
    text = f"{value:.{digits - 1}e}" if 0 < abs(value) < 1e-3 else f"{value:.{digits}g}"
    mantissa, _, exponent = text.partition("e")
    if exponent:
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        text = f"{mantissa}e{int(exponent)}"
    return text.replace("-", "−")


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """About so many round values between the ends."""
    rough = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * (1 - 1e-9))
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def height_ticks(most: int, logarithmic: bool) -> list[int]:
    """Counts to be marked beside bars of which the highest holds `most`."""
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


def tick_label(value: float) -> str:
    return rounded(value, 4)


def readable(text: Any) -> str:
    """Text with characters that cannot be seen, or that turn the text around them, shown by name."""

    def named(match: re.Match) -> str:
        code = ord(match[0])
        if code > 127:
            return f"⟨U+{code:04X}⟩"
        return "\u2421" if code == 127 else chr(0x2400 + code)

    return HIDDEN.sub(named, str(text))
