"""Words of answers instead of sub-word pieces: which gain most from the image, and which kinds of words do.

    VIG of a word = the sum over its tokens = log p(word | image) - log p(word | null image)

by the chain rule. Classes come from the committed list `word_classes.txt`, which is English; parts of speech from spaCy
where it and a model for it are installed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vig.reporting.counters import Counter
from vig.reporting.views import Word, WordFigures

SHOWN = 14  # rows of each table of words
TAGGED_ROWS = 2000  # answers whose parts of speech are told: a tagger reads some 10,000 words a second
SPECIAL = re.compile(
    r"<[^<>\s]{1,40}>|\[[A-Z_]{2,20}\]"
)  # </s>, <|im_end|>: part of the answer, not of its words
OTHER = "other words"
LONGEST = 60  # characters of a word as shown


class Piece(NamedTuple):
    """What one token adds: its text, and whether a word can begin there."""

    text: str
    begins: bool
    sign: bool  # ends the word before it and is one by itself, as punctuation


class Words:
    """Joins tokens to words. Without a tokenizer each id is a word."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._pieces: dict[int, Piece] = {}
        self._texts: dict[tuple[int, ...], str] = {}
        self._anchor = self._anchor_ids()

    def _anchor_ids(self) -> list[int]:
        if self.tokenizer is None:
            return []
        ids = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        return list(ids)[:1]

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def piece(self, id: int) -> Piece:
        found = self._pieces.get(id)
        if found is None:
            found = self._pieces[id] = self._read(id)
        return found

    def _read(self, id: int) -> Piece:
        if self.tokenizer is None:
            return Piece(str(id), True, False)
        before = self._decode(self._anchor)
        text = self._decode([*self._anchor, id])
        text = text[len(before) :] if text.startswith(before) else self._decode([id])
        bare = text.strip()
        if SPECIAL.fullmatch(bare):
            return Piece(text, True, True)
        sign = bool(bare) and not any(char.isalnum() or char == "\ufffd" for char in bare)
        sign = sign and bare not in ("'", "’")  # within a word
        return Piece(text, sign or not text or text[0].isspace() or _is_ideograph(text[0]), sign)

    def runs(self, ids: Sequence[int]) -> Iterator[tuple[int, int]]:
        """(first token, token behind the last) of each word."""
        first = 0
        for place in range(1, len(ids) + 1):
            if place == len(ids) or self._splits(ids[place - 1], ids[place]):
                yield first, place
                first = place

    def _splits(self, left: int, right: int) -> bool:
        left, right = self.piece(left), self.piece(right)
        if not left.text.strip(" "):  # a blank by itself belongs to the word behind it
            return right.sign
        return right.begins or left.sign or left.text[-1:].isspace() or _is_ideograph(left.text[-1:])

    def text(self, ids: tuple[int, ...]) -> str:
        """A word as it reads, blanks around it left out."""
        found = self._texts.get(ids)
        if found is None:
            joined = self._decode(ids) if self.tokenizer is not None else " ".join(map(str, ids))
            found = self._texts[ids] = joined.strip()[:LONGEST] or repr(joined).strip("'").replace(" ", "␣")
        return found


def _is_ideograph(char: str) -> bool:
    """Of scripts without blanks between words each character counts as a word."""
    return bool(char) and ("\u3040" <= char <= "\u30ff" or "\u3400" <= char <= "\u9fff")


@cache
def word_classes() -> dict[str, str]:
    """word -> class, from word_classes.txt. The first class that lists a word has it."""
    text = (Path(__file__).parent / "word_classes.txt").read_text(encoding="utf-8")
    classes: dict[str, str] = {}
    for paragraph in re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).strip().split("\n\n"):
        name, _, members = paragraph.partition(":")
        for word in members.split():
            classes.setdefault(word, name.strip())
    return classes


@lru_cache(1 << 16)
def class_of(word: str) -> str:
    """Class of a word; numbers in figures are numbers, plurals are looked up without their ending."""
    classes, bare = word_classes(), word.lower().strip()
    for form in (bare, bare.removesuffix("s"), bare.removesuffix("es")):
        if form in classes:
            return classes[form]
    return "number" if re.fullmatch(r"\d[\d.,]*", bare) else OTHER


def word_figures(rows: Sequence, tokenizer: Any, sampled: bool, tagger: Any = None) -> WordFigures:
    """rows: with `ids` and `vig` along the answer's tokens (`facts.WordRow`). tagger: as `find_tagger` gives."""
    words = Words(tokenizer)
    sums: dict[str, list[float]] = {}
    names = [*dict.fromkeys(word_classes().values()), OTHER]
    codes = {name: code for code, name in enumerate(names)}
    by_class = Counter(len(names))
    for row in rows:
        values, kinds = [], []
        for word, vig in _words_of(words, row):
            total = sums.setdefault(word, [0.0, 0])
            total[0] += vig
            total[1] += 1
            if not SPECIAL.fullmatch(word):
                values.append(vig)
                kinds.append(codes[class_of(word)])
        by_class.add(np.array(values), np.array(kinds, np.int64))
    highest, lowest = _extremes(sums)
    tagged = rows[:TAGGED_ROWS] if tagger is not None and tokenizer is not None else []
    return WordFigures(
        highest,
        lowest,
        by_class.boxes(names) if tokenizer is not None else [],
        _parts_of_speech(tagged, words, tagger),
        rows=len(rows),
        tagged_rows=len(tagged),
        sampled=sampled,
    )


def _words_of(words: Words, row: Any) -> Iterator[tuple[str, float]]:
    ids = row.ids.tolist()
    runs = list(words.runs(ids))
    sums = np.add.reduceat(row.vig, [first for first, _ in runs]) if runs else ()
    for (first, last), vig in zip(runs, np.asarray(sums).tolist(), strict=True):
        yield words.text(tuple(ids[first:last])), vig


def _extremes(sums: dict[str, list[float]]) -> tuple[list[Word], list[Word]]:
    """Words with the highest and the lowest mean VIG, among those that are not too rare to judge."""
    total = sum(count for _, count in sums.values())
    least = max(3, int(total**0.5 / 20))
    found = [Word(text, vig / count, int(count)) for text, (vig, count) in sums.items() if count >= least]
    found.sort(key=lambda word: (-word.vig, word.text))
    half = min(SHOWN, len(found) // 2)
    return found[:half], found[::-1][:half]


def find_tagger() -> Any:
    """A spaCy pipeline for English parts of speech; None where spaCy or a model for it is not installed."""
    try:
        import spacy
    except ImportError:
        return None
    models = sorted(name for name in spacy.util.get_installed_models() if name.startswith("en_"))
    return spacy.load(models[0], disable=["ner", "lemmatizer"]) if models else None


def _parts_of_speech(rows: Sequence, words: Words, tagger: Any) -> list[tuple[str, Any]]:
    """Box of word VIG by universal part of speech. A word of ours has the tag of the tagger's token at its start."""
    if not rows:
        return []
    tags: list[str] = []
    codes: list[int] = []
    values: list[float] = []
    for row in rows:
        pairs = [(text, vig) for text, vig in _words_of(words, row) if not SPECIAL.fullmatch(text)]
        starts, text = [], ""
        for word, _ in pairs:
            starts.append(len(text))
            text += word + " "
        at = {token.idx: token.pos_ for token in tagger(text)}
        for start, (_, vig) in zip(starts, pairs, strict=True):
            tag = at.get(start)
            if tag is None:
                continue
            if tag not in tags:
                tags.append(tag)
            codes.append(tags.index(tag))
            values.append(vig)
    counter = Counter(max(1, len(tags)))
    counter.add(np.array(values), np.array(codes, np.int64))
    return counter.boxes(tags)
