"""Each row of docs/wrong-inputs.md is tried, and gives what the page says."""

from __future__ import annotations

import re

import tiny
import wrong_inputs

CURE = "docs/wrong-inputs.md is not what the code says now: run `python tests/wrong_inputs.py`, and read the difference"


def without_asides(text: str) -> str:
    """What stands in brackets comes from other libraries and changes with their versions."""
    shorter = re.sub(r" \([^()]*\)", "", text)
    return text if shorter == text else without_asides(shorter)


def test_the_page_says_what_wrong_inputs_give(tmp_path):
    rows = wrong_inputs.table(tiny.save_llava(tmp_path))
    assert len(rows) >= 24
    page = wrong_inputs.page(rows)
    lines, kept = page.splitlines(), wrong_inputs.PAGE.read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(kept), CURE
    for line, expected in zip(lines, kept, strict=True):
        assert without_asides(line) == without_asides(expected), CURE
    for case, code, said in rows:
        assert code in (1, 2, 3), f"{case.name}: exit code {code}"
        assert said and "Traceback" not in said, case.name
