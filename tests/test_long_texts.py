"""What reads texts takes time in proportion to their length, and finds what the plain pattern finds: the oracle."""

from __future__ import annotations

import random
import re
import time

import pytest

from vig.data.error_log import PARTICULARS
from vig.data.turns import image_marks
from vig.evaluation.choice import LETTER_NAMED
from vig.models.answer_spans import own_text

LONG = 20_000  # characters; the oracles take from 5 s on
ENDS = ("<|im_end|>", "</s> x", "<pad>", "</s>", " x</", "s>")  # of which some end in others
MARK = re.compile(r"<image>|<img>(.+?)</img>", re.DOTALL)
NAMED = re.compile(r"\b(?i:answer|option|choice)(?i:\s+is)?\s*:?\s*\(?([A-Z])\b(?!['’])")


def drawn(pieces: list[str], most: int, seed: int) -> str:
    draw = random.Random(seed)
    return "".join(draw.choices(pieces, k=draw.randint(0, most)))


def plain_own_text(text: str, span: tuple[int, int], answer: str) -> tuple[int, int]:
    start, end = span
    tail = re.compile(rf"(?:\s|{'|'.join(map(re.escape, ENDS))})*\Z").search(text[start:end])
    body = start + tail.start()
    if text[start:body].endswith(answer.rstrip()):
        start = body - len(answer.rstrip())
    elif text[start:body].endswith(answer.strip()):
        start = body - len(answer.strip())
    else:
        start = max(text.rfind(answer, start, end), start)
    return start, start + len(answer) if text.startswith(answer, start) else body


def test_the_end_of_an_answer_is_where_the_plain_search_finds_it():
    pieces = [*ENDS, " ", "\n", "\u2003", "\x1f", "a", "x", "<", "/", "s"]
    for seed in range(5000):
        answer = drawn(pieces, 6, seed)
        before, after = (drawn(pieces, 6, seed + offset) for offset in (10**6, 10**7))
        text, cut = before + answer + after, random.Random(seed).randint(0, 3)
        span = max(len(before) - cut, 0), len(text) - cut if cut <= len(after) else len(text)
        assert own_text(text, span, answer, ENDS) == plain_own_text(text, span, answer), (text, span, answer)


def test_image_marks_are_those_of_the_plain_pattern():
    pieces = ["<image>", "<img>", "</img>", "a", "\n", "<", "img>"]
    for seed in range(5000):
        text = drawn(pieces, 12, seed)
        found = [(mark.span(), mark[0], mark.lastindex and mark[1]) for mark in image_marks(text)]
        assert found == [(mark.span(), mark[0], mark[1]) for mark in MARK.finditer(text)], text


def test_named_letters_are_those_of_the_plain_pattern():
    pieces = ["answer", "Option", " is", " ", "\n", ":", "(", "A", "B", ")", "'", "x"]
    for seed in range(5000):
        text = drawn(pieces, 10, seed)
        found, wanted = ([(m.span(), m[1]) for m in p.finditer(text)] for p in (LETTER_NAMED, NAMED))
        assert found == wanted, text


def test_particulars_are_those_that_are_looked_for_at_each_character():
    everywhere = re.compile(PARTICULARS.pattern.replace(r"(?<![^\s'\")])", ""), PARTICULARS.flags)
    assert everywhere.pattern != PARTICULARS.pattern
    pieces = ["'", '"', "(", ")", "/", "\\", ".png", ".tiff", " ", "\n", "a", "1", "-", ".", ",", "e"]
    for seed in range(5000):
        text = drawn(pieces, 15, seed)
        assert PARTICULARS.sub("…", text) == everywhere.sub("…", text), text


@pytest.mark.parametrize(
    "read",
    [
        lambda: own_text(f"a{' ' * LONG}b</s>", (0, LONG + 6), f"a{' ' * LONG}b", ENDS),
        lambda: own_text(f"a{'</s> ' * (LONG // 5)}", (0, LONG + 1), "a", ENDS),
        lambda: own_text(f"a{' <pad>' * (LONG // 6)}b", (0, LONG - 1), "b", ENDS),
        lambda: list(image_marks("<img>" * LONG)),
        lambda: list(image_marks("<img>a</img>" + "<img>" * LONG)),
        lambda: LETTER_NAMED.search(f"answer{' ' * LONG}x"),
        lambda: PARTICULARS.sub("…", "a" * LONG),
    ],
    ids=[
        "spaces in an answer",
        "ends behind it",
        "ends in it",
        "marks",
        "marks behind one",
        "spaces",
        "a word",
    ],
)
def test_long_texts_are_read_at_once(read):
    started = time.perf_counter()
    read()
    assert time.perf_counter() - started < 1
