"""Measures against three packages of others, on 2,000 random predictions; docs/evaluate.md lists where they differ."""

from __future__ import annotations

import random
import re

import pytest

from vig.evaluation.similarity import similarity
from vig.evaluation.yes_no import RULES, said, yes_no

WORDS = (
    "total", "amount", "due", "2014", "$1,250.00", "Dr.", "university", "of", "california", "san", "diego", "page",
    "3", "net", "weight", "blue", "0.5", "No",
)  # fmt: skip
COUNT = 2000


def edited(rng: random.Random, text: str) -> str:
    """With some characters changed, lost or doubled: from equal to all wrong."""
    rate = rng.choice((0.0, 0.1, 0.3, 0.5, 0.7))
    made = []
    for character in text:
        drawn = rng.random()
        if drawn > rate:
            made.append(character)
        elif drawn > rate / 2:
            made.append(rng.choice("abcdefg 0123"))
        elif drawn > rate / 4:
            made += [character, character]
    return "".join(made)


@pytest.fixture(scope="module")
def answers() -> list[tuple[str, list[str]]]:
    """(answer, accepted truths): short ones too, so that a distance of exactly one half is common."""
    rng = random.Random("anls")
    found = []
    for _ in range(COUNT):
        truths = [" ".join(rng.sample(WORDS, rng.randint(1, 3))) for _ in range(rng.randint(1, 3))]
        truth = rng.choice(truths)
        answer = edited(rng, truth[: rng.randint(2, 24)])
        found.append((rng.choice((answer, answer.upper(), f" {answer} ", answer.replace(" ", "  "))), truths))
    return found


def has_runs(text: str) -> bool:
    return re.search(r"\s\s", text.strip()) is not None


def test_anls_of_shunk031(answers):
    """Its ANLS is the paper's, on texts whose runs of white space are one space each."""
    peer = pytest.importorskip("anls").anls_score
    differ = [
        (answer, truths) for answer, truths in answers if similarity(answer, truths) != peer(answer, truths)
    ]
    assert all(has_runs(answer) for answer, _ in differ) and 0 < len(differ) < 300
    for answer, truths in answers:
        one_space = " ".join(answer.split())
        assert similarity(one_space, truths) == pytest.approx(peer(one_space, truths), abs=1e-12)


def test_anls_star(answers):
    """It keeps a similarity of exactly one half, as lmms-eval does; else it is the paper's ANLS."""
    peer = pytest.importorskip("anls_star").anls_score
    halves = 0
    for answer, truths in answers:
        one_space = " ".join(answer.split())
        theirs = peer(tuple(truths), one_space)
        assert similarity(one_space, truths, rule="lmms-eval") == pytest.approx(theirs, abs=1e-12)
        ours = similarity(one_space, truths)
        if ours != pytest.approx(theirs, abs=1e-12):
            assert (ours, theirs) == (0.0, 0.5)
            halves += 1
    assert halves > 20


PHRASES = (
    "Yes", "yes.", "No", "no", "No, there is none.", "Yes, a dog is there.", "There is not.", "I see a cat", "",
    "NO", "It isn't there", "Nothing", "Yes. No?", "a red cup",
)  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_pope_audit(rule):
    """Equal where every answer is yes or no. Where some are neither, its recall forgives them, and so does its F1."""
    peer = pytest.importorskip("pope_audit").compute_f1
    rng = random.Random("pope")
    answers = rng.choices(PHRASES, k=COUNT)
    labels = rng.choices(("yes", "no"), k=COUNT)
    read = [said(answer, rule) or "neither" for answer in answers]
    ours, theirs = yes_no(answers, labels, rule)._asdict(), peer(read, labels)
    assert ours["precision"] == pytest.approx(theirs["precision"], abs=5e-5)  # it rounds to four places
    silent = sum(r == "neither" and label == "yes" for r, label in zip(read, labels, strict=True))
    assert ours["recall"] == pytest.approx(theirs["tp"] / (theirs["tp"] + theirs["fn"] + silent))
    if rule == "pope":
        assert silent == 0
        assert (ours["recall"], ours["f1"]) == pytest.approx((theirs["recall"], theirs["f1"]), abs=5e-5)
    else:
        assert silent > 100 and ours["recall"] < theirs["recall"]
