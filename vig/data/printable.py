"""What a terminal can be shown of other people's texts."""

from __future__ import annotations

import re

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """With control characters written out, all but line ends and tabs: a name or a text that holds them would steer the
    terminal that shows it."""
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
