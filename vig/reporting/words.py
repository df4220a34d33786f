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
from vig.selection.rule import GOLDEN
from vig.store.selections import mix64

SHOWN = 14  # rows of each table of words
TAGGED_ROWS = 2000  # answers whose parts of speech are told: a tagger reads some 10,000 words a second
SPECIAL = re.compile(
    r"<[^<>\s]{1,40}>|\[[A-Z_]{2,20}\]"
)  # </s>, <|im_end|>: part of the answer, not of its words
OTHER = "other words"
# Universal parts of speech (universaldependencies.org/u/pos) by the names that people read.
TAGS = {
    "ADJ": "adjective", "ADP": "preposition", "ADV": "adverb", "AUX": "auxiliary", "CCONJ": "conjunction",
    "DET": "determiner", "INTJ": "interjection", "NOUN": "noun", "NUM": "number", "PART": "particle",
    "PRON": "pronoun", "PROPN": "proper noun", "PUNCT": "punctuation", "SCONJ": "subordinator", "SYM": "symbol",
    "VERB": "verb", "X": "other",
}  # fmt: skip
LONGEST = 60  # characters of a word as shown
PART = 1 << 19  # tokens whose words are read at a time
NO_WORD = -1  # class of special tokens


class Piece(NamedTuple):
    """What one token adds, as far as the edges of words go."""

    begins: bool  # a word can begin here
    sign: bool  # ends the word before it and is one by itself, as punctuation
    blank: bool  # blanks alone: they belong to the word behind them
    ends: bool  # a word cannot go on behind it


class Words:
    """Joins tokens to words, and numbers the words by their text. Without a tokenizer each id is a word."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.texts: list[str] = []  # of the words met so far, by number
        self._numbers: dict[str, int] = {}
        self._pieces: dict[int, Piece] = {}
        self._runs: dict[int, int] = {}  # hash of a run of tokens -> number of its word
        self._anchor = self._anchor_ids()

    def _anchor_ids(self) -> list[int]:
        if self.tokenizer is None:
            return []
        ids = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        return list(ids)[:1]

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _piece(self, id: int) -> Piece:
        found = self._pieces.get(id)
        if found is None:
            found = self._pieces[id] = self._read(id)
        return found

    def _read(self, id: int) -> Piece:
        if self.tokenizer is None:
            return Piece(begins=True, sign=False, blank=False, ends=False)
        before = self._decode(self._anchor)
        text = self._decode([*self._anchor, id])
        text = text[len(before) :] if text.startswith(before) else self._decode([id])
        bare = text.strip()
        sign = bool(bare) and not any(char.isalnum() or char == "\ufffd" for char in bare)
        sign = bool(SPECIAL.fullmatch(bare)) or (sign and bare not in ("'", "’"))  # these stand within words
        begins = sign or not text or text[0].isspace() or _is_ideograph(text[0])
        last = text[-1:]
        return Piece(begins, sign, not text.strip(" "), last.isspace() or _is_ideograph(last))

    def starts(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Places in ids (n,) at which words begin, (W,). lengths: of the answers, one behind the other."""
        kinds, which = np.unique(ids, return_inverse=True)
        begins, sign, blank, ends = np.array([self._piece(id) for id in kinds.tolist()]).T[:, which]
        first = np.ones(len(ids), bool)
        first[1:] = np.where(blank[:-1], sign[1:], begins[1:] | sign[:-1] | ends[:-1])
        first[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
        return np.flatnonzero(first)

    def read(self, rows: Sequence) -> tuple[np.ndarray, np.ndarray]:
        """Numbers (W,) and VIG (W,) of all words of the rows, which have `ids` and `vig` along their tokens."""
        numbers, starts = self.find(rows)
        if not len(starts):
            return numbers, np.empty(0)
        return numbers, np.add.reduceat(np.concatenate([row.vig for row in rows]), starts)

    def find(self, rows: Sequence) -> tuple[np.ndarray, np.ndarray]:
        """Numbers (W,) of all words of the rows, which have `ids`, and the places (W,) of their first tokens among the
        tokens of all rows, one behind the other."""
        lengths = np.array([len(row.ids) for row in rows], np.int64)
        if not lengths.sum():
            return np.empty(0, np.int64), np.empty(0, np.int64)
        ids = np.concatenate([row.ids for row in rows])
        starts = self.starts(ids, lengths)
        sizes = np.diff(np.append(starts, len(ids)))
        # 64 bits that depend on a run's ids and their order: two of a million runs collide once in 10^7 folders
        place = (np.arange(len(ids)) - np.repeat(starts, sizes)).astype(np.uint64)
        scattered = mix64(mix64(ids.astype(np.uint64) + np.uint64(1)) + place * GOLDEN)
        hashes, firsts, which = np.unique(
            np.add.reduceat(scattered, starts), return_index=True, return_inverse=True
        )
        numbers = [
            self._number(hash, ids[starts[first] : starts[first] + sizes[first]])
            for hash, first in zip(hashes.tolist(), firsts.tolist(), strict=True)
        ]
        return np.array(numbers, np.int64)[which], starts

    def _number(self, hash: int, ids: np.ndarray) -> int:
        found = self._runs.get(hash)
        if found is None:
            text = self._text(ids.tolist())
            found = self._runs[hash] = self._numbers.setdefault(text, len(self.texts))
            if found == len(self.texts):
                self.texts.append(text)
        return found

    def _text(self, ids: list[int]) -> str:
        """A word as it reads, blanks around it left out."""
        joined = self._decode(ids) if self.tokenizer is not None else " ".join(map(str, ids))
        return joined.strip()[:LONGEST] or repr(joined).strip("'").replace(" ", "␣")


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
    names = [*dict.fromkeys(word_classes().values()), OTHER]
    codes = {name: code for code, name in enumerate(names)}
    by_class = Counter(len(names))
    sums, counts, kinds = np.empty(0), np.empty(0, np.int64), np.empty(0, np.int64)
    for part in parts(rows):
        numbers, vig = words.read(part)
        new = words.texts[len(kinds) :]
        kinds = np.append(
            kinds, [NO_WORD if SPECIAL.fullmatch(text) else codes[class_of(text)] for text in new]
        )
        kinds = kinds.astype(np.int64)
        sums, counts = (np.append(old, np.zeros(len(new), old.dtype)) for old in (sums, counts))
        sums += np.bincount(numbers, vig, len(sums))
        counts += np.bincount(numbers, minlength=len(counts))
        kind = kinds[numbers]
        by_class.add(vig[kind != NO_WORD], kind[kind != NO_WORD])
    highest, lowest = _extremes(words.texts, sums, counts)
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


def parts(rows: Sequence) -> Iterator[Sequence]:
    """The rows in parts of about PART tokens, so that memory stays small beside theirs."""
    first = size = 0
    for place, row in enumerate(rows):
        size += len(row.ids)
        if size >= PART or place == len(rows) - 1:
            yield rows[first : place + 1]
            first, size = place + 1, 0


def _extremes(texts: list[str], sums: np.ndarray, counts: np.ndarray) -> tuple[list[Word], list[Word]]:
    """Words with the highest and the lowest mean VIG, among those that are not too rare to judge."""
    least = max(3, int(int(counts.sum()) ** 0.5 / 20))
    common = np.flatnonzero(counts >= least)
    found = [
        Word(texts[place], vig, count)
        for place, vig, count in zip(
            common.tolist(), (sums[common] / counts[common]).tolist(), counts[common].tolist(), strict=True
        )
    ]
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
    """Box of word VIG by part of speech, the most frequent first.

    A word of ours has the tag of the tagger's token at its start.
    """
    if not rows:
        return []
    tags: list[str] = []
    codes: list[int] = []
    values: list[float] = []
    for row in rows:
        read = zip(*(part.tolist() for part in words.read([row])), strict=True)
        pairs = [(words.texts[number], vig) for number, vig in read]
        pairs = [(text, vig) for text, vig in pairs if not SPECIAL.fullmatch(text)]
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
    boxes = counter.boxes([TAGS.get(tag, tag) for tag in tags])
    return sorted(boxes, key=lambda pair: -pair[1].count)
