"""From one record, a dict of fields, to one `Sample`: its turns, and its images in the order in which they stand.

Forms of records: `vig.data.formats.FORMS`. What a record holds and a sample cannot (videos, sound, images under names
that are not known) is refused, never left out in silence.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from vig.data.formats import FIELDS, IMAGE_FIELDS, MEDIA_FIELDS, SYSTEM_FIELDS, Form
from vig.data.image_sources import image_source
from vig.data.naming import check_form, empty_field, form_of, holds_images, unnamed_images, unnamed_turns
from vig.data.reading import SPEAKERS, Reading, is_blank
from vig.data.sample import Sample, SampleError, check_characters, is_answer, text_of
from vig.data.turns import Unusable, check_text, decoded, image_marks, source_of, turn_list

ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
IMAGE_MARK = "<image>"
OTHER_MEDIA = re.compile(r"<(?:video|audio)>|<\|(?:video|audio|VIDEO|AUDIO)\w*\|>")
BOXES = re.compile(r"<bbox>|<ref-object>")
NOT_TRAINED = ("loss", "weight", "train")  # fields of a turn that say so where they are false or 0
TURN_FIELDS = {"from", "value", "role", "content", *NOT_TRAINED}
PLAIN = {"id", "image", "images", "conversations", "messages", "source"}
MEDIA_CURE = "Only images are scored: leave the record out, or what is not an image out of it"
AS_USUAL = Reading()
HERE = object()  # stands for the next image of the record's own field


def sample_from_record(
    record: Any,
    *,
    key: str,
    image_root: Path | str | None = None,
    source: str = "",
    reading: Reading = AS_USUAL,
) -> Sample:
    """Makes a `Sample` of one record, a dict of one of the forms in `vig.data.formats.FORMS`. Raises SampleError."""
    if not isinstance(record, dict):
        raise SampleError(
            key, "", f"the record is a {type(record).__name__}, not an object", "Give one object a record"
        )
    given, id = record, _id_of(record, key)
    try:
        record = reading.renamed(record)
        id = _id_of(record, key)
        check_characters("id", id, key, id)
        root = None if image_root is None else _absolute(image_root)
        return _sample(given, record, key, id, root, source, reading)
    except Unusable as error:
        raise SampleError(key, id, error.reason, error.cure) from None


def _id_of(record: dict[str, Any], key: str) -> str:
    return str(key if record.get("id") is None else record["id"])


@functools.lru_cache(maxsize=64)
def _absolute(folder: Path | str) -> str:
    return str(Path(folder).absolute())


def _sample(
    given: dict[str, Any],
    record: dict[str, Any],
    key: str,
    id: str,
    root: str | None,
    source: str,
    reading: Reading,
) -> Sample:
    """given: the record under the data's names of its fields."""
    own = _image_values(record)
    if not record.keys() <= PLAIN:
        _refuse_what_is_not_read(given, record, bool(own), reading)
    form = _form_of(given, record, reading)
    placed: list[Any] = []  # the images in the order in which they stand
    turns = form.turns_of(record)
    roles = ROLES | reading.role_of if reading.role_of else ROLES
    messages = [_message(turn, roles, placed) for turn in [*_system_turn(record, turns), *turns]]
    _place_images(messages, placed, own, form)
    following = iter(own)
    values = [next(following) if value is HERE else value for value in placed]
    images = tuple(image_source(value, root, key, id) for value in values)
    _check_answers(messages)
    if record.get("objects") and any(BOXES.search(text_of(message)) for message in messages):
        raise Unusable(
            "<bbox> and <ref-object> stand for the field objects, which is not read", "Write it out"
        )
    return Sample(key, id, images, tuple(messages), source_of(record) or source, _tools(record))


def check_sample(sample: Sample) -> None:
    """Raises SampleError where a sample, perhaps made by hand, is not what `Sample` says."""
    try:
        placed: list[Any] = []
        for message in turn_list(sample.messages):
            if message.get("role") not in SPEAKERS:
                raise Unusable(f"unknown role {message.get('role')!r}", f"Use one of {', '.join(SPEAKERS)}")
            if not isinstance(message.get("content"), list | tuple):
                kind = type(message.get("content")).__name__
                reason = f"a {message['role']} turn's content is {kind}, not a list of parts"
                raise Unusable(reason, "Write parts, or make the sample with sample_from_record")
            _message(message, ROLES, placed)
        if len(placed) != len(sample.images):
            raise _wrong_count(len(sample.images), len(placed))
        _check_answers(sample.messages)
    except Unusable as error:
        raise SampleError(sample.key, sample.id, error.reason, error.cure) from None


# --- fields ---


def _form_of(given: dict[str, Any], record: dict[str, Any], reading: Reading) -> Form:
    if record.get("conversations") and record.get("messages"):
        cure = "Leave one out with --columns ignore=messages or ignore=conversations"
        raise Unusable("it has both conversations and messages", cure)
    form = form_of(record)
    if form is not None:
        check_form(form, given, reading)
        return form
    empty = empty_field(record, reading)
    if empty is not None:
        raise Unusable(f"the field {empty} is empty", "Fill it, or remove the record")
    raise unnamed_turns(given, reading)


def _system_turn(record: dict[str, Any], turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The system field as the first turn."""
    said = [field for field in SYSTEM_FIELDS if record.get(field)]
    if not said:
        return []
    given = said[0]
    if any(record[field] != record[given] for field in said):
        cure = f"Use one, with --columns ignore={said[1]}"
        raise Unusable(f"it has different texts in the fields {' and '.join(said)}", cure)
    first = turns[0] if turns else {}
    if ROLES.get(first.get("role") or first.get("from")) == "system":
        if (first.get("content") or first.get("value")) == record[given]:
            return []
        raise Unusable(f"it has a system turn and another text in the field {given}", "Leave one of them out")
    return [{"role": "system", "content": record[given]}]


def _image_values(record: dict[str, Any]) -> list[Any]:
    """The images of the record's own fields, of which one may be used."""
    found: dict[str, list[Any]] = {}
    for field in IMAGE_FIELDS:
        value = record.get(field)
        if isinstance(value, str) and value.lstrip().startswith("["):
            value = decoded(value, field)
        if value is not None and not (isinstance(value, list | tuple) and not value):
            found[field] = list(value) if isinstance(value, list | tuple) else [value]
    first = next(iter(found.values()), [])
    if any(images != first for images in found.values()):
        _, *others = found
        cure = f"Use one, with --columns {','.join(f'ignore={field}' for field in others)}"
        raise Unusable(f"it has different images in the fields {' and '.join(found)}", cure)
    return first


def _refuse_what_is_not_read(
    given: dict[str, Any], record: dict[str, Any], has_images: bool, reading: Reading
) -> None:
    for field in [field for field in record if field not in PLAIN]:
        value = record[field]
        if is_blank(value):
            continue
        if field in MEDIA_FIELDS and _is_media(value):
            raise Unusable(f"the field {field} holds {field.removesuffix('s')}", MEDIA_CURE)
        if field not in FIELDS and holds_images(field, value, has_images):
            raise unnamed_images(given, record, reading, field)


def _is_media(value: Any) -> bool:
    return not (isinstance(value, list | tuple) and all(one is None for one in value))


def _tools(record: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    tools = record.get("tools")
    if not tools:
        return ()
    if isinstance(tools, str):
        tools = decoded(tools, "tools")
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, dict) for tool in tools):
        raise Unusable(
            "the field tools is not a list of objects", "Write it as JSON schemas, or leave it out"
        )
    return tuple(tools)


# --- turns ---


def _message(turn: dict[str, Any], roles: dict[str, str], placed: list[Any]) -> dict[str, Any]:
    """One message; its images are added to `placed`, HERE where the record's own field holds the next one."""
    name, text_field = turn.get("from"), "value"
    if name is None:
        name, text_field = turn.get("role"), "content"
    role = roles.get(name) or roles.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        cure = f"Use one of {', '.join(sorted(roles))}, or say which it is with --roles assistant={name}"
        raise Unusable(f"unknown role {name!r}", cure)
    content = turn.get(text_field)
    if content is None:
        other = "content" if text_field == "value" else "value"
        text_field, content = (other, turn[other]) if turn.get(other) is not None else (text_field, None)
    plain = len(turn) == 2
    inline = [] if plain or turn.keys() <= TURN_FIELDS else _more_of_turn(turn, role)
    where = f"{role} turn's {text_field}"
    if isinstance(content, str):
        parts = _text_parts(content, where, placed, inline)
    elif isinstance(content, list | tuple):
        parts = [made for part in content for made in _parts_of(part, placed, inline)]
        parts = _joined(parts)
    else:
        raise Unusable(f"a {where} is {type(content).__name__}", "Give text or a list of parts")
    if inline:
        placed += inline
        parts = [{"type": "image"}] * len(inline) + parts
    message = {"role": role, "content": parts}
    if role == "assistant" and not plain and _is_untrained(turn):
        message["trained"] = False
    return message


def _is_untrained(turn: dict[str, Any]) -> bool:
    return turn.get("trained") is False or any(
        turn.get(name) is not None and turn[name] in (False, 0) for name in NOT_TRAINED
    )


def _more_of_turn(turn: dict[str, Any], role: str) -> list[Any]:
    """The images that a turn holds in a field of its own; refuses calls of tools, videos and sound."""
    for field in ("tool_calls", "function_call"):
        if turn.get(field):
            cure = "Write the call as the text of the turn, or leave the record out"
            raise Unusable(f"a {role} turn calls tools in the field {field}, which is not read", cure)
    for field in MEDIA_FIELDS:
        if turn.get(field):
            raise Unusable(f"the field {field} of a turn holds {field.removesuffix('s')}", MEDIA_CURE)
    return _image_values(turn)


def _text_parts(text: str, where: str, placed: list[Any], inline: list[Any]) -> list[dict[str, Any]]:
    """Splits text at image marks; the newline that LLaVA writes beside ``<image>`` belongs to the mark."""
    check_text(where, text)
    if "<" not in text:
        return [{"type": "text", "text": text}]
    other = OTHER_MEDIA.search(text)
    if other is not None:
        raise Unusable(f"a text holds the mark {other[0]} of {_medium(other[0])}", MEDIA_CURE)
    parts: list[dict[str, Any]] = []
    at, newline = 0, False
    for mark in image_marks(text):
        piece, is_mark = text[at : mark.start()], mark.lastindex is None
        _add_text(parts, piece, newline, is_mark)
        parts.append({"type": "image"})
        placed.append(mark[1] if not is_mark else (inline.pop(0) if inline else HERE))
        at, newline = mark.end(), is_mark
    if not parts:
        return [{"type": "text", "text": text}]
    _add_text(parts, text[at:], newline, False)
    return parts


def _add_text(parts: list[dict[str, Any]], piece: str, after_mark: bool, before_mark: bool) -> None:
    piece = piece.removeprefix("\n") if after_mark else piece
    piece = piece.removesuffix("\n") if before_mark else piece
    if piece:
        parts.append({"type": "text", "text": piece})


def _medium(mark: str) -> str:
    return "audio" if "audio" in mark.lower() else "video"


def _parts_of(part: Any, placed: list[Any], inline: list[Any]) -> list[dict[str, Any]]:
    """What one content part means; fields that a table filled with None are not there."""
    given = (
        {name: value for name, value in part.items() if value is not None} if isinstance(part, dict) else {}
    )
    kind = given.get("type") or next(
        (name for name in ("image", "text", "video", "audio") if name in given), None
    )
    if isinstance(part, str):
        given, kind = {"text": part}, "text"
    kind = str(kind).removeprefix("input_").removeprefix("output_")
    if kind == "text" and isinstance(given.get("text"), str):
        check_text("text of a content part", given["text"])
        other = OTHER_MEDIA.search(given["text"]) if "<" in given["text"] else None
        if other is not None:
            raise Unusable(f"a text holds the mark {other[0]} of {_medium(other[0])}", MEDIA_CURE)
        return [{"type": "text", "text": given["text"]}]
    if kind in ("image", "image_url"):
        fields = ("image", "image_url", "url", "path", "bytes", "base64", "data", "source")
        value = next((given[name] for name in fields if name in given), None)
        placed.append(value if value is not None else (inline.pop(0) if inline else HERE))
        return [{"type": "image"}]
    if kind.startswith(("video", "audio")):
        raise Unusable(f"a content part is {kind}", MEDIA_CURE)
    cure = 'Use {"type": "image"} or {"type": "text", "text": ...}'
    raise Unusable(f"a content part is {part!r:.80}", cure)


def _joined(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adjacent texts as one, empty ones left out."""
    joined: list[dict[str, Any]] = []
    for part in parts:
        if part.get("text") == "":
            continue
        if part["type"] == "text" and joined and joined[-1]["type"] == "text":
            joined[-1] = {"type": "text", "text": joined[-1]["text"] + part["text"]}
        else:
            joined.append(part)
    return joined


# --- images and answers ---


def _place_images(messages: list[dict[str, Any]], placed: list[Any], own: list[Any], form: Form) -> None:
    """Puts the record's own images first where it says nowhere where they stand; refuses other counts of marks."""
    marks = sum(value is HERE for value in placed)
    if marks == len(own):
        return
    if not placed:
        _split_marks_of_parts(messages, placed)
        if len(placed) == len(own):
            return
        asked = next((message for message in messages if message["role"] == "user"), None)
        if not placed and asked is not None and not form.marks_needed:
            asked["content"] = [{"type": "image"}] * len(own) + asked["content"]
            placed += [HERE] * len(own)
            return
        marks = len(placed)
    raise _wrong_count(len(own), marks)


def _split_marks_of_parts(messages: list[dict[str, Any]], placed: list[Any]) -> None:
    """Marks in the text of content parts, where no part is an image."""
    for message in messages:
        parts = message["content"]
        if any(IMAGE_MARK in part.get("text", "") for part in parts):
            message["content"] = [
                made for part in parts for made in _text_parts(part["text"], "text", placed, [])
            ]


def _wrong_count(n_images: int, marks: int) -> Unusable:
    images, said = "image" if n_images == 1 else "images", "mark" if marks == 1 else "marks"
    return Unusable(
        f"{n_images} {images} but {marks} {IMAGE_MARK} {said}", f"Write one {IMAGE_MARK} for each image"
    )


def _check_answers(messages: Any) -> None:
    spoken = scored = False
    for message in messages:
        if message["role"] != "assistant":
            continue
        spoken = True
        for part in message["content"]:
            if part["type"] == "image":
                raise Unusable(f"an answer holds {IMAGE_MARK}", "Put images into user turns")
        if is_answer(message):
            scored = True
            if not text_of(message).strip():
                raise Unusable("an answer is empty", "Remove the turn or write its answer")
    if not spoken:
        raise Unusable("no answer turn", "Give at least one gpt / assistant turn")
    if not scored:
        raise Unusable("no answer is trained: each has loss, weight or train false", "Leave the record out")
