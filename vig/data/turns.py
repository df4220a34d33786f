"""From a record's fields to its turns, one function a row of `vig.data.formats.FORMS`.

A turn is a dict of ``role`` and ``content`` (or ``from`` and ``value``); ``loss``, ``weight`` or ``train`` that is
false or 0 says that a trainer learns nothing from it. Raises Unusable where the fields do not hold turns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

from vig.data.sample import not_utf8

CAPTION_QUESTION = "Describe the image."
TURNS_CURE = "Give a list of {from, value} or {role, content}"
MARK, BARE_MARK = re.compile(r"<image>|<img>(.+?)</img>", re.DOTALL), re.compile("<image>")
UNREAD_OF_QUESTIONS = ("choices", "options", "hint", "context", "A", "B")


class Unusable(ValueError):
    """What is wrong with a record (`reason`), and what helps (`cure`)."""

    def __init__(self, reason: str, cure: str):
        self.reason, self.cure = reason, cure
        super().__init__(f"{reason}. {cure}")


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content} | more


def turn_list(turns: Any) -> list[dict[str, Any]]:
    """A list of turns: as it is, as JSON text, or as the dict of lists that tables may make of it."""
    if isinstance(turns, str) and turns.lstrip()[:1] in ("[", "{"):
        turns = decoded(turns, "turns")
    if isinstance(turns, dict) and all(isinstance(column, list) for column in turns.values()):
        turns = [dict(zip(turns, row, strict=False)) for row in zip(*turns.values(), strict=False)]
    if not isinstance(turns, list | tuple) or not all(isinstance(one, dict) for one in turns):
        raise Unusable("the turns are not a list of objects", TURNS_CURE)
    return list(turns)


def decoded(text: str, what: str) -> Any:
    """JSON text in a field of a table."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"the {what} are text, but not JSON ({error})", "Write them as JSON") from None


def check_text(where: str, text: str) -> None:
    """Raises Unusable for text that no UTF-8 can hold."""
    wrong = None if text.isascii() else not_utf8(where, text)
    if wrong is not None:
        raise Unusable(*wrong)


def image_marks(text: str) -> Iterator[re.Match[str]]:
    """Each ``<image>``, and each ``<img>path</img>`` with the path as its group 1.

    Behind the last ``</img>`` no ``<img>`` is tried: each would read to the end, in quadratic time altogether.
    """
    before, closed, _ = text.rpartition("</img>")
    end = len(before) + len(closed) if closed else 0
    return chain(MARK.finditer(text, 0, end), BARE_MARK.finditer(text, end))


def conversations(record: dict[str, Any]) -> list[dict[str, Any]]:
    return turn_list(record["conversations"])


def messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    return turn_list(record["messages"])


def prompt_completion(record: dict[str, Any]) -> list[dict[str, Any]]:
    """TRL trains on the completion alone: answers within the prompt do not count."""
    prompt, completion = (
        [turn(role, value)] if isinstance(value, str) and value.lstrip()[:2] != "[{" else turn_list(value)
        for role, value in (("user", record["prompt"]), ("assistant", record["completion"]))
    )
    return [one | {"loss": False} for one in prompt] + completion


def query_response(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [*_history(record), turn("user", record["query"]), turn("assistant", record["response"])]


def instruction_output(record: dict[str, Any]) -> list[dict[str, Any]]:
    asked = record["instruction"], record.get("input")
    if not all(isinstance(text, str | None) for text in asked):
        raise Unusable("the instruction or its input is no text", "Write it as text")
    question = "\n".join(text for text in asked if text)
    return [*_history(record), turn("user", question), turn("assistant", record["output"])]


def _history(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Earlier turns as pairs of question and answer."""
    pairs = record.get("history") or []
    if isinstance(pairs, str):
        pairs = decoded(pairs, "earlier turns (history)")
    if not isinstance(pairs, list | tuple) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs
    ):
        raise Unusable("the field history is not a list of pairs", "Write [question, answer] pairs")
    return [one for asked, said in pairs for one in (turn("user", asked), turn("assistant", said))]


def question_answer(record: dict[str, Any]) -> list[dict[str, Any]]:
    more = [name for name in UNREAD_OF_QUESTIONS if record.get(name) not in (None, "", [])]
    if more:
        cure = f"Write what they hold into the question, or leave them out with --columns ignore={more[0]}"
        raise Unusable(f"the question has the fields {', '.join(more)}, which are not read", cure)
    return [turn("user", record["question"]), turn("assistant", record["answer"])]


def texts(record: dict[str, Any]) -> list[dict[str, Any]]:
    pairs = turn_list(record["texts"])
    if not all(
        isinstance(pair.get("user"), str) and isinstance(pair.get("assistant"), str) for pair in pairs
    ):
        raise Unusable("the field texts does not hold user and assistant", "Give a list of {user, assistant}")
    return [
        one for pair in pairs for one in (turn("user", pair["user"]), turn("assistant", pair["assistant"]))
    ]


def captions(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Each caption answers the same question; several are as many turns."""
    name = next(name for name in ("caption", "captions", "text") if record.get(name) is not None)
    found = record[name]
    if isinstance(found, str) and name == "captions" and found.lstrip().startswith("["):
        found = decoded(found, name)
    found = list(found) if isinstance(found, list | tuple) else [found]
    wrong = next((one for one in found if not isinstance(one, str)), None)
    if wrong is not None or not found:
        what = f"is {type(wrong).__name__}" if found else "is an empty list"
        raise Unusable(f"the {name} {what}", "Write it as text, or remove the record")
    return [
        one for text in found for one in (turn("user", CAPTION_QUESTION), turn("assistant", text.strip()))
    ]


def source_of(record: dict[str, Any]) -> str | None:
    """What the record says of its source, or all of its `texts` alike (Cauldron)."""
    texts = record.get("texts")
    said = [record, *texts] if isinstance(texts, list) else [record]
    found = {
        one["source"] for one in said if isinstance(one, dict) and isinstance(one.get("source"), str)
    } - {""}
    return found.pop() if len(found) == 1 else None
