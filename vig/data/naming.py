"""Fields under names that are not known: what to say of them, with a `--columns` that fits the record."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from PIL import Image

from vig.data.formats import FIELDS, FORMS, IMAGE_FIELDS, IMAGES, Form
from vig.data.reading import IGNORE, Reading, is_blank, names_of
from vig.data.sample import shortened
from vig.data.turns import Unusable, check_text

PICTURE_NAME = re.compile(r"image|img|picture|photo|pixel|file_name", re.IGNORECASE)
PAIRS = (("question", "answer"), ("query", "response"), ("instruction", "output"), ("prompt", "completion"))
ASKING = {"q", "question", "questions", "query", "prompt", "instruction", "ask", "user", "human", "input"}
ANSWERING = {
    *("a", "ans", "answer", "answers", "response", "reply", "output", "completion", "target", "label"),
    *("assistant", "gpt", "gt", "solution"),
}
DESCRIBING = {"caption", "captions", "text", "description", "desc", "alt", "title"}
TURNS = {field for form in FORMS for field in form.fields} - set(IMAGE_FIELDS)
NO_TEXT = {"id", "ids", "uid", "uuid", "key", "index", "source", "split", "date", "url", "hash", "license"}


def form_of(record: Mapping[str, Any]) -> Form | None:
    """The first form whose fields the record has."""
    for form in FORMS:
        known = record.get(form.fields[0]) is not None
        if known and all(record.get(field) is not None for field in form.fields[1:]):
            return form
    return None


def check_form(form: Form, given: Mapping[str, Any], reading: Reading) -> None:
    """Raises Unusable where `--columns` names turns of a record, as it is in the data, that `form` does not read."""
    for ours, names in names_of(reading.columns).items():
        unread = [name for name in names if not is_blank(given.get(name))]
        if unread and ours in TURNS and ours not in form.fields:
            raise Unusable(
                f"--columns {ours}={unread[0]} is not read, since the record has {' and '.join(form.fields)} too",
                f"Leave it out of --columns, or add ignore={form.fields[0]}",
            )


def holds_images(field: str, value: Any, has_images: bool) -> bool:
    """Pictures and their bytes always; names of files where no other images are there, or the field is called so."""
    value = value[0] if isinstance(value, list | tuple) and value else value
    if isinstance(value, dict):
        content = value.get("bytes")
        return isinstance(content, bytes) or (isinstance(content, str) and content.startswith("data:image/"))
    if not isinstance(value, str):
        return isinstance(value, Image.Image)
    is_name = value.lower().endswith(IMAGES) or value.startswith("data:image/")
    return is_name and (not has_images or PICTURE_NAME.search(field) is not None)


def empty_field(record: Mapping[str, Any], reading: Reading) -> str | None:
    """The data's name of a field that holds nothing, of a form whose fields the record all has."""
    forms = [form for form in FORMS if all(field in record for field in form.fields)]
    empty = [field for form in forms for field in form.fields if record[field] is None]
    if not empty:
        return None
    return next((name for name, ours in reading.column_of.items() if ours == empty[0]), empty[0])


def check_columns(given: Any, reading: Reading) -> None:
    """Raises Unusable where `--columns` names only fields that the record, as it is in the data, does not have."""
    if not isinstance(given, dict):
        return
    for ours, names in names_of(reading.columns).items():
        if ours == IGNORE or ours in given or any(name in given for name in names):
            continue
        _check_names(given)
        wrong, columns = f"{ours}={names[0]}", ", ".join(shortened(name, 60) for name in given)
        raise Unusable(
            f"--columns {wrong}: there is no column {names[0]}; the columns are {columns}",
            f"Write --columns {_example(given, reading)}",
        )


def unnamed_images(given: dict[str, Any], record: dict[str, Any], reading: Reading, field: str) -> Unusable:
    """The error for a field that seems to hold images; of turns too, where none are known by name."""
    check_columns(given, reading)
    if form_of(record | {"images": record[field]}) is None and empty_field(record, reading) is None:
        return unnamed_turns(given, reading, field)
    cure = f"Say so with --columns {_example(given, reading, field)}, or leave it out with --columns ignore={field}"
    return Unusable(f"the field {field} seems to hold images ({shortened(record[field], 60)})", cure)


def unnamed_turns(given: dict[str, Any], reading: Reading, images: str | None = None) -> Unusable:
    """The error for a record of no known form. images: a field that seems to hold them."""
    check_columns(given, reading)
    _check_names(given)
    known = "; ".join(dict.fromkeys(" and ".join(form.fields) for form in FORMS))
    more = "" if images is None else f"; {images} seems to hold images ({shortened(given[images], 60)})"
    cure = f"Say which are which, such as --columns {_example(given, reading, images)}. Known names: {known}"
    return Unusable(f"no turns among the fields {[shortened(name, 60) for name in given]}{more}", cure)


def _check_names(given: dict[str, Any]) -> None:
    for name in given:
        check_text("name of a field", str(name))


# --- a guess ---


def _example(given: dict[str, Any], reading: Reading, images: str | None = None) -> str:
    """`--columns` with what was said of them that is true, and a name for each role that is missing."""
    record = reading.renamed(given)
    free = {
        name: value
        for name, value in given.items()
        if isinstance(name, str) and name not in reading.column_of and name not in FIELDS
    }
    if images is None and not any(record.get(field) for field in IMAGE_FIELDS):
        images = next((name for name, value in free.items() if holds_images(name, value, False)), None)
    roles = {} if images is None else {"images": images}
    if form_of(record if images is None else record | {"images": given[images]}) is None:
        free = {name: value for name, value in free.items() if name != images and _is_text(name, value)}
        roles |= _roles_of(free, record)
        if "caption" in roles and images is None and not any(record.get(field) for field in IMAGE_FIELDS):
            roles = {"images": "NAME"} | roles
    said = names_of(reading.columns).items()
    pairs = [f"{ours}={name}" for ours, names in said for name in names if name in given]
    pairs += [f"{ours}={name}" for ours, name in roles.items()]
    return ",".join(dict.fromkeys(sorted(pairs, key=lambda pair: not pair.startswith("images="))))


def _is_text(name: str, value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and isinstance(value[0], dict)
    return isinstance(value, str) and not _words(name) & NO_TEXT and not value.replace(".", "", 1).isdigit()


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()))


def _roles_of(free: dict[str, Any], record: Mapping[str, Any]) -> dict[str, str]:
    """Our names of turns -> the likeliest of the fields that are free, NAME where none is likely."""
    for name, value in free.items():
        turns = value[0] if isinstance(value, list | tuple) else value
        if isinstance(turns, dict):
            return {"conversations" if "from" in turns else "messages": name}
        if turns.lstrip().startswith("[{"):
            return {"conversations" if '"from"' in turns else "messages": name}
    for asks, answers in PAIRS:
        if record.get(asks) is not None:
            return {answers: _likeliest(free, ANSWERING | DESCRIBING, answers)}
        if record.get(answers) is not None:
            return {asks: _likeliest(free, ASKING, asks)}
    asking = next((name for name in free if _words(name) & ASKING), None)
    answering = next((name for name in free if name != asking and _words(name) & ANSWERING), None)
    others = [name for name in free if name not in (asking, answering)]
    if asking is None and answering is None:
        described = next((name for name in others if _words(name) & DESCRIBING), None)
        if described is not None or len(others) == 1:
            return {"caption": described or others[0]}
        asking, answering = others if len(others) == 2 else ("NAME", "NAME")
    rest = others[0] if len(others) == 1 else "NAME"
    return {"question": asking or rest, "answer": answering or rest}


def _likeliest(free: Mapping[str, Any], words: set[str], ours: str) -> str:
    named = [name for name in free if _words(name) & words]
    close = difflib.get_close_matches(ours, free, 1, 0.5)
    return next(iter([*named, *close, *(free if len(free) == 1 else ())]), "NAME")
