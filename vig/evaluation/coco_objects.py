"""Which of COCO's objects a caption mentions, as CHAIR reads it.

Source: Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018, and utils/chair.py of its repository.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from vig.data.sample import DataError

TOKEN = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
LONGEST = 3  # words of a synonym
# Words that name no person before these.
ANIMALS = frozenset(
    ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
)
VEHICLES = frozenset(("jet", "train"))
QUALIFIERS = {"baby": ANIMALS, "adult": ANIMALS, "passenger": VEHICLES}
# Compounds that are another object than one of their words, or none: what they are read as.
COMPOUNDS = {"bow tie": "tie", "toilet seat": "toilet", "home plate": None, "train track": None}
IRREGULAR = {
    "men": "man", "women": "woman", "children": "child", "people": "person", "mice": "mouse", "geese": "goose",
    "knives": "knife", "wolves": "wolf", "calves": "calf", "feet": "foot", "teeth": "tooth", "policemen": "policeman",
    "firemen": "fireman", "oxen": "ox",
}  # fmt: skip


def singular(word: str) -> str:
    """An English noun's singular, by suffix: "buses" -> "bus", "cherries" -> "cherry"; others as they are."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if len(word) > 4 and word.endswith("ies"):
        return f"{word[:-3]}y"
    if len(word) > 4 and word.endswith(("ches", "shes", "sses", "xes", "zes", "oes", "uses")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


class Synonyms:
    """The words for each category: one category a line, its name first, synonyms behind it, parted by commas.

    Raises DataError for a file without a line.
    """

    def __init__(self, path: Path):
        self.path = path
        self.category: dict[str, str] = {}
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, ValueError) as error:
            raise DataError(
                f"cannot read the synonyms {path} ({error}). Give the benchmark's synonyms.txt"
            ) from None
        for line in lines:
            words = [" ".join(word.lower().split()) for word in line.split(",")]
            words = [word for word in words if word]
            for word in words:
                self.category.setdefault(word, words[0])
        if not self.category:
            raise DataError(f"{path} holds no synonyms. Write one category a line: person, man, woman, child")

    def mentioned(self, caption: str) -> list[str]:
        """The categories that a caption names, each mention once, in order."""
        words = TOKEN.findall(caption.lower())
        found: list[tuple[str, str]] = []  # (word, category)
        at = 0
        while at < len(words):
            length, word, category = self._at(words, at)
            if category is not None:
                found.append((word, category))
            at += length
        seats = "toilet" in {word for word, _ in found}  # a toilet's seat is no chair
        return [category for word, category in found if not (seats and word == "seat")]

    def _at(self, words: list[str], at: int) -> tuple[int, str, str | None]:
        """How many words are read here, as what, and its category."""
        following = singular(words[at + 1]) if at + 1 < len(words) else ""
        if following in QUALIFIERS.get(words[at], ()):
            return 1, words[at], None
        for length in range(min(LONGEST, len(words) - at), 0, -1):
            phrase = " ".join(words[at : at + length])
            *first, last = words[at : at + length]
            for form in (phrase, " ".join([*first, singular(last)])):
                if form in COMPOUNDS:
                    word = COMPOUNDS[form]
                    return length, form, None if word is None else self.category.get(word)
                if form in self.category:
                    return length, form, self.category[form]
        return 1, words[at], None


@functools.lru_cache(maxsize=4)
def synonyms_of(path: Path) -> Synonyms:
    return Synonyms(path)
