"""Multiple choice: MMBench's TSV with circular evaluation, CV-Bench's Parquet, any records with options."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from vig.data.sample import BrokenRecord
from vig.data.turns import Unusable
from vig.evaluation.figures import Figures, Tally
from vig.evaluation.questions import (
    DataSpec,
    Question,
    Record,
    image_name,
    raw_rows,
    read_records,
    with_prompt,
)

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
COLUMNS = LETTERS[:8]  # fields of options in MMBench's form
COPY = 1_000_000  # MMBench's files number the k-th rotation of question i as i + k * COPY
LONGEST_REFERENCE = 64  # characters: an image field as short is another row's index
LETTER_FIRST = re.compile(r"\W*\(?([A-Z])(?:[).:,]|\s*$)")
LETTER_NAMED = re.compile(r"\b(?i:answer|option|choice)(?i:\s+is)?(?:\s*:)?\s*\(?([A-Z])\b(?!['’])")
WORD = re.compile(r"[^\W_]+")
LETTER_ALONE = re.compile(r"[\s(\[]*([A-Z])[\s).\]:,]*", re.IGNORECASE)


class Known(NamedTuple):
    """What must be known of a whole file: how many rotations of a question it holds, and images that others share."""

    copies: Mapping[str, int]  # index of a question -> rows of it
    images: Mapping[str, str]  # index -> its image, for those that other rows refer to


def questions(spec: DataSpec) -> Iterator[Question | BrokenRecord]:
    """The question of each record, or one a rotation of its options; see `Task.prompt` for what is asked."""
    known = _known(spec)

    def make(record: Record) -> list[Question]:
        options = _options(record)
        place = _right_one(record.get("answer", "label"), options)
        index, given = str(record.get("index", default="")), record.get("image", "images")
        if isinstance(given, str) and given in known.images:
            given = record.fields["image"] = known.images[given]
        images = record.images("image", "images") if given is not None else []
        base = str(int(index) % COPY) if index.isdigit() else index
        circular = spec.rotate if spec.rotate is not None else "A" in record.fields
        has_copies = known.copies.get(base, 1) > 1
        turns = len(options) if circular and not has_copies and spec.way == "letter" else 1
        truth = {"category": record.get("category", "task"), "source": _source(record)}
        truth = {name: value for name, value in truth.items() if value is not None}
        truth["question_of"] = f"{record.source}#{base}" if has_copies and circular else record.key
        truth["rotations"] = known.copies[base] if has_copies and circular else turns
        made = []
        for turn in range(turns):
            shown = options[turn:] + options[:turn]
            right = (place - turn) % len(options)
            sample = record.ask(_prompt(record, shown, spec), images)
            if turns > 1:
                sample = replace(sample, key=f"{record.key}@{turn}")
            more = {"answer": LETTERS[right], "options": shown, **truth}
            candidates = tuple(shown) if spec.way == "likelihood" else ()
            made.append(
                Question(sample, image_name(given) if given is not None else record.key, more, candidates)
            )
        return made

    return read_records(spec, make)


def _known(spec: DataSpec) -> Known:
    copies: Counter[str] = Counter()
    references: set[str] = set()
    for _, _, _, record, problem in raw_rows(spec):
        if problem is None and isinstance(record, dict) and str(record.get("index", "")).isdigit():
            copies[str(int(record["index"]) % COPY)] += 1
            image = record.get("image")
            if isinstance(image, str) and len(image) <= LONGEST_REFERENCE:
                references.add(image)
    images: dict[str, str] = {}
    if references:
        for _, _, _, record, problem in raw_rows(spec):
            if problem is None and isinstance(record, dict) and str(record.get("index")) in references:
                image = record.get("image")
                if isinstance(image, str) and len(image) > LONGEST_REFERENCE:
                    images[str(record["index"])] = image
    return Known(copies, images)


def _options(record: Record) -> list[str]:
    """The texts of the options: in the fields A, B, ..., or in a list."""
    given = record.get("choices", "options")
    if isinstance(given, str) and given.lstrip().startswith("["):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise Unusable(f"the options are no JSON ({error})", "Write them as a list of texts") from None
    if given is None:
        given = []
        for letter in COLUMNS:
            if record.get(letter) is None:
                break
            given.append(record.get(letter))
    if not isinstance(given, list | tuple) or not 2 <= len(given) <= len(LETTERS):
        cure = "Give them in the fields A, B, ... or as a list in choices or options"
        raise Unusable(f"{len(given) if isinstance(given, list | tuple) else 'no list of'} options", cure)
    return [str(one).strip() for one in given]


def _right_one(answer: Any, options: Sequence[str]) -> int:
    """Which option an answer names: by letter ("B", "(B)"), place from 0, or text."""
    text = str(answer).strip() if answer is not None else ""
    letters = LETTERS[: len(options)]
    if isinstance(answer, str) and len(bare := text.strip("(). ")) == 1 and bare in letters:
        return letters.index(bare)
    if text in options:
        return options.index(text)
    if text.isdigit() and int(text) < len(options):
        return int(text)
    reason = f"the answer is {answer!r:.60}, which is none of the {len(options)} options"
    raise Unusable(reason, "Give a letter, a place from 0, or an option's text; the test split has none")


def _prompt(record: Record, options: Sequence[str], spec: DataSpec) -> str:
    hint = record.get("hint", "context")
    lines = [record.text("question")] if hint is None else [str(hint).strip(), record.text("question")]
    if spec.way == "letter":
        lines += [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return with_prompt(spec.prompt, "\n".join(lines))


def _source(record: Record) -> str | None:
    """CV-Bench's "2D COCO", of which its overall accuracy is made."""
    kind, source = record.get("type"), record.get("source")
    return f"{kind} {source}" if isinstance(kind, str) and isinstance(source, str) else None


# --- answers ---


def judge(row: Mapping[str, Any], rule: str | None, spec: DataSpec) -> dict[str, Any]:
    """parsed: the option's letter, or None. By likelihood: least nats a token, and beside it least nats in all."""
    if "nll" in row:
        each = [nll / count for nll, count in zip(row["nll"], row["token_counts"], strict=True)]
        parsed, by_sum = LETTERS[int(np.argmin(each))], LETTERS[int(np.argmin(row["nll"]))]
        found = {"parsed": parsed, "right": parsed == row["answer"], "right_by_sum": by_sum == row["answer"]}
        return {"prediction": row["options"][LETTERS.index(parsed)], **found}
    letters = LETTERS[: len(row["options"])]
    if rule == "strict":
        parsed = _letter(row["prediction"], letters, LETTER_ALONE.fullmatch)
    else:
        parsed = _lenient(row["prediction"], letters, row["options"])
    return {"parsed": parsed, "right": parsed == row["answer"], "abstained": parsed is None}


def _letter(answer: str, letters: str, find: Callable[[str], re.Match[str] | None]) -> str | None:
    found = find(answer)
    return found[1].upper() if found and found[1].upper() in letters else None


def _lenient(answer: str, letters: str, options: Sequence[str]) -> str | None:
    """A letter that the answer is, begins with or names; else the only option whose text it holds."""
    for find in (LETTER_ALONE.fullmatch, LETTER_FIRST.match, LETTER_NAMED.search):
        if letter := _letter(answer, letters, find):
            return letter
    text = _words(answer)
    held = [place for place, option in enumerate(options) if _words(option) in text]
    if len(held) > 1:  # "red" stands in "dark red" too
        texts = {place: _words(options[place]) for place in held}
        held = [
            place
            for place in held
            if not any(texts[place] in texts[other] for other in held if other != place)
        ]
    return letters[held[0]] if len(held) == 1 else None


def _words(text: str) -> str:
    words = " ".join(WORD.findall(text.lower()))
    return f" {words} "


# --- figures ---


def tally(rows: Sequence[Mapping[str, Any]]) -> Tally:
    """A unit is a question with all of its rotations, all of which must be right; incomplete ones are left out."""
    units: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        units.setdefault(row["question_of"], []).append(row)
    whole = {key: unit for key, unit in units.items() if len(unit) == unit[0]["rotations"]}
    first = [unit[0] for unit in whole.values()]
    circular = any(row["rotations"] > 1 for row in first)
    every = np.array([all(row["right"] for row in unit) for unit in whole.values()], bool)
    sums = {"right": every.astype(float), "first": np.array([row["right"] for row in first], float)}
    if first and "right_by_sum" in first[0]:
        sums["by_sum"] = np.array([row["right_by_sum"] for row in first], float)
    groups = [tuple(row[name] for name in ("category", "source") if name in row) for row in first]
    sources = sorted({row["source"] for row in first if "source" in row})
    categories = sorted({row["category"] for row in first if "category" in row})

    def figures(found: Mapping[str, np.ndarray]) -> Figures:
        if circular:
            return {"circular_accuracy": found["right"] / found["n"], "accuracy": found["first"] / found["n"]}
        more = {"accuracy_by_sum": found["by_sum"] / found["n"]} if "by_sum" in found else {}
        return {"accuracy": found["right"] / found["n"], **more}

    return Tally(
        list(whole), [row["image"] for row in first], sums, figures, right=every, groups=groups,
        order=[*sources, *categories], combine=_cv_bench if len(sources) > 1 else None,
    )  # fmt: skip


def _cv_bench(groups: Mapping[str, Figures]) -> dict[str, Figures]:
    """2D: the mean over its sources; 3D likewise; CV-Bench: the mean of the two."""
    kinds: dict[str, list[Figures]] = {}
    for name, figures in groups.items():
        kind, _, source = name.partition(" ")
        if source and kind in ("2D", "3D"):
            kinds.setdefault(kind, []).append(figures)
    means = {kind: _mean(several) for kind, several in sorted(kinds.items())}
    return ({"CV-Bench": _mean(list(means.values()))} if len(means) > 1 else {}) | means


def _mean(several: Sequence[Figures]) -> Figures:
    return {name: np.mean([one[name] for one in several], axis=0) for name in several[0]}
