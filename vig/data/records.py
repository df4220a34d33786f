"""From one record, a dict of fields, to one `Sample`: ``conversations`` (LLaVA, ShareGPT) and ``messages``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vig.data.image_sources import image_source
from vig.data.sample import Sample, SampleError, check_characters, text_of

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}
SPEAKERS = tuple(sorted(set(ROLES.values())))
IMAGE_MARK = "<image>"
TURNS = {"conversations", "messages"}
CAPTION_QUESTION = "Describe the image."


def sample_from_record(
    record: Any, *, key: str, image_root: Path | str | None = None, source: str = ""
) -> Sample:
    """Makes a `Sample` of one LLaVA, ShareGPT or ``messages`` record (a dict). Raises SampleError."""
    if not isinstance(record, dict):
        raise SampleError(
            key, "", f"the record is a {type(record).__name__}, not an object", "Give one object a record"
        )
    id = str(key if record.get("id") is None else record["id"])
    check_characters("id", id, key, id)
    root = None if image_root is None else str(Path(image_root).absolute())
    images = tuple(image_source(value, root, key, id) for value in _image_values(record))
    if "conversations" in record:
        turns = [(turn, "from", "value") for turn in _turns(record["conversations"], key, id)]
    elif "messages" in record:
        turns = [(turn, "role", "content") for turn in _turns(record["messages"], key, id)]
    else:
        raise SampleError(
            key,
            id,
            f"no turns among the fields {sorted(map(str, record))}",
            "Name them `conversations` or `messages`",
        )
    messages = tuple(_message(*turn, key, id) for turn in turns)
    _check_turns(messages, len(images), key, id)
    return Sample(key, id, images, messages, source)


def check_sample(sample: Sample) -> None:
    """Raises SampleError where a sample, perhaps made by hand, is not what `Sample` says."""
    key, id = sample.key, sample.id
    for message in _turns(sample.messages, key, id):
        if message.get("role") not in SPEAKERS:
            cure = f"Use one of {', '.join(SPEAKERS)}"
            raise SampleError(key, id, f"unknown role {message.get('role')!r}", cure)
        if not isinstance(message.get("content"), list | tuple):
            kind = type(message.get("content")).__name__
            reason = f"a {message['role']} turn's content is {kind}, not a list of parts"
            raise SampleError(key, id, reason, "Write parts, or make the sample with sample_from_record")
        _message(message, "role", "content", key, id)
    _check_turns(sample.messages, len(sample.images), key, id)


# --- one record ---


def _image_values(record: dict[str, Any]) -> list[Any]:
    for field in ("images", "image"):
        value = record.get(field)
        if value is not None:
            return list(value) if isinstance(value, list | tuple) else [value]
    return []


def _turns(turns: Any, key: str, id: str) -> list[dict[str, Any]]:
    if isinstance(turns, dict) and all(isinstance(column, list) for column in turns.values()):
        turns = [dict(zip(turns, turn, strict=False)) for turn in zip(*turns.values(), strict=False)]
    if not isinstance(turns, list | tuple) or not all(isinstance(turn, dict) for turn in turns):
        raise SampleError(
            key, id, "the turns are not a list of objects", "Give a list of {from, value} or {role, content}"
        )
    return list(turns)


def _message(turn: dict[str, Any], role_field: str, text_field: str, key: str, id: str) -> dict[str, Any]:
    name = turn.get(role_field)
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise SampleError(key, id, f"unknown role {name!r}", f"Use one of {', '.join(sorted(ROLES))}")
    content = turn.get(text_field)
    if isinstance(content, str):
        check_characters(f"{role} turn's {text_field}", content, key, id)
        return {"role": role, "content": _parts(content)}
    if isinstance(content, list | tuple):
        parts = [_part(part, key, id) for part in content]
        return {"role": role, "content": [part for part in parts if part.get("text") != ""]}
    raise SampleError(
        key, id, f"a {role} turn's {text_field} is {type(content).__name__}", "Give text or a list of parts"
    )


def _part(part: Any, key: str, id: str) -> dict[str, Any]:
    if isinstance(part, dict) and part.get("type") == "image":
        return {"type": "image"}
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        check_characters("text of a content part", part["text"], key, id)
        return {"type": "text", "text": part["text"]}
    raise SampleError(
        key, id, f"a content part is {part!r:.80}", 'Use {"type": "image"} or {"type": "text", "text": ...}'
    )


def _parts(text: str) -> list[dict[str, Any]]:
    """Splits text at ``<image>``; the newline that LLaVA writes beside it belongs to the mark."""
    if IMAGE_MARK not in text:
        return [{"type": "text", "text": text}]
    parts: list[dict[str, Any]] = []
    pieces = text.split(IMAGE_MARK)
    for number, piece in enumerate(pieces):
        if number > 0:
            parts.append({"type": "image"})
            piece = piece.removeprefix("\n")
        if number < len(pieces) - 1:
            piece = piece.removesuffix("\n")
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _check_turns(messages: tuple[dict[str, Any], ...], n_images: int, key: str, id: str) -> None:
    marks = sum(part["type"] == "image" for message in messages for part in message["content"])
    if marks != n_images:
        raise SampleError(
            key,
            id,
            f"{n_images} images but {marks} {IMAGE_MARK} marks",
            f"Write one {IMAGE_MARK} for each image",
        )
    spoken = [message for message in messages if message["role"] == "assistant"]
    if not spoken:
        raise SampleError(key, id, "no answer turn", "Give at least one gpt / assistant turn")
    for message in spoken:
        if any(part["type"] == "image" for part in message["content"]):
            raise SampleError(key, id, f"an answer holds {IMAGE_MARK}", "Put images into user turns")
        if not text_of(message).strip():
            raise SampleError(key, id, "an answer is empty", "Remove the turn or write its answer")


def caption_turns(caption: str) -> list[dict[str, str]]:
    """A caption as the answer to a question about its image."""
    return [
        {"from": "human", "value": f"{IMAGE_MARK}\n{CAPTION_QUESTION}"},
        {"from": "gpt", "value": caption.strip()},
    ]


def turns_of_caption(record: dict[str, Any], key: str) -> list[dict[str, str]]:
    caption, id = record["caption"], str(key if record.get("id") is None else record["id"])
    if not isinstance(caption, str):
        reason = f"the caption is {type(caption).__name__}"
        raise SampleError(key, id, reason, "Write it as text, or remove the record")
    return caption_turns(caption)
