"""The text that each token adds: byte pieces of a character joined, the spaces of SentencePiece kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BEHIND = 6  # texts that are decoded again with each token, since a token alone may lose its space
LONGEST = 6  # tokens that a character may be split into
UNFINISHED = "\ufffd"  # what a decoder writes for the first bytes of a character


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """One text a token; they join to the decoded whole. The pieces of a split character stand with its last token."""

    def decode(start: int, end: int) -> str:
        return tokenizer.decode(ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    texts: list[str] = []
    known = [
        0
    ]  # where texts begin and end: one byte of a character left out, and SentencePiece loses its neighbours
    for end in range(1, len(ids) + 1):
        start, done = known[-1 - BEHIND :][0], known[-1]
        before, text = decode(start, done), decode(start, end)
        unfinished = text.endswith(UNFINISHED) and not before.endswith(UNFINISHED) and end < len(ids)
        if unfinished and end - done < LONGEST:
            texts.append("")
            continue
        texts.append(text[len(before) :] if text.startswith(before) else decode(done, end))
        known.append(end)
    return texts
