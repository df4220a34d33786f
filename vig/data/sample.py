"""`Sample`, one conversation about images, and what stands in the place of one that cannot be used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from vig.data.printable import printable

ImageSource = Path | bytes | Image.Image

LONGEST_NAME = 500  # characters


@dataclass(frozen=True)
class Sample:
    """One conversation about zero or more images.

    `key` is unique (source file name and record number), `id` is what the data says and may repeat.
    `messages` have ``role`` (user, assistant, system, tool) and ``content``, a list of parts:
    ``{"type": "image"}`` or ``{"type": "text", "text": ...}``; image parts stand in the order of `images`. An assistant
    turn with ``"trained": False`` is no answer: it is part of the prompt. `tools`: JSON schemas for the chat template.
    """

    key: str
    id: str
    images: tuple[ImageSource, ...]
    messages: tuple[dict[str, Any], ...]
    source: str
    tools: tuple[dict[str, Any], ...] = ()


class SampleError(ValueError):
    """A sample that cannot be used: says which (`key`, `id`), why (`reason`) and what helps (`cure`)."""

    def __init__(self, key: str, id: str, reason: str, cure: str):
        self.key, self.id, self.reason, self.cure = (writable(str(part)) for part in (key, id, reason, cure))
        self.reason = printable(self.reason)
        super().__init__(f"{printable(self.key)} (id {shortened(self.id)!r}): {self.reason}. {self.cure}")

    def __reduce__(self):
        return SampleError, (self.key, self.id, self.reason, self.cure)


def writable(text: str) -> str:
    """With lone surrogates, which no file takes, written out: a name whose bytes are not UTF-8 holds them."""
    return text.encode("utf-8", "backslashreplace").decode()


SAVE_AS_UTF8 = "Save it as UTF-8: iconv -f LATIN1 -t UTF-8 OLD > NEW"


def check_characters(what: str, text: str, key: str, id: str) -> None:
    """Raises SampleError for text that no UTF-8 can hold."""
    wrong = not_utf8(what, text)
    if wrong is not None:
        raise SampleError(key, id, *wrong)


def not_utf8(what: str, text: str) -> tuple[str, str] | None:
    """(reason, cure) for text that no UTF-8 can hold, else None. Readers keep a byte that is not UTF-8 as the surrogate
    \\udc80 to \\udcff; other surrogates are escapes that stand alone."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        lone = text[error.start]
        if "\udc80" <= lone <= "\udcff":
            byte = len(text[: error.start].encode())
            return f"the {what} is not UTF-8 (byte {byte} is {ord(lone) - 0xDC00:#04x})", SAVE_AS_UTF8
        return (
            f"the {what} holds the lone surrogate {lone!r} at character {error.start}",
            "Write it in UTF-8, and characters beyond \\uffff as pairs of surrogates",
        )
    return None


class BrokenRecord(NamedTuple):
    """What a reader yields in the place of a record that cannot become a `Sample`."""

    key: str
    id: str
    source: str
    error: SampleError


class DataError(ValueError):
    """The data as a whole cannot be read: no such file, or a format that no reader knows."""


def is_answer(message: dict[str, Any]) -> bool:
    """Whether a message is scored and trained: an assistant turn, unless the data say that it is not."""
    return message["role"] == "assistant" and message.get("trained", True)


def answers(sample: Sample) -> list[str]:
    """The text of every answer, in order."""
    return [text_of(message) for message in sample.messages if is_answer(message)]


def text_of(message: dict[str, Any]) -> str:
    """The text parts of one message, joined."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def shortened(name: Any, longest: int = LONGEST_NAME) -> str:
    """A name for a message: pictures written as text run to megabytes."""
    name = str(name)
    return name if len(name) <= longest else f"{name[: min(longest, 100)]}... ({len(name):,} characters)"
