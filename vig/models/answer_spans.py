"""Where the answers are: in a chat template, in the text rendered with it, and among its tokens."""

from __future__ import annotations

import bisect
import functools
import re
from collections.abc import Sequence
from typing import Any

from vig.models.image_tokens import PREFIX_TEMPLATE, has_bidirectional_prefix

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]


class PromptError(ValueError):
    """The processor as a whole cannot be used: no chat template, or no character offsets."""


# --- templates ---


def answer_template(processor: Any) -> tuple[str, str]:
    """The chat template to render with, and where the answers come from in it."""
    template = getattr(processor, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    if template is None and has_bidirectional_prefix(processor):
        template = PREFIX_TEMPLATE
    if template is None:
        raise PromptError(
            f"{type(processor).__name__} has no chat template. Set processor.chat_template, "
            "best with {% generation %} marks around the answers"
        )
    if GENERATION_MARK.search(template):
        return template, "generation marks"
    try:
        from trl.chat_template_utils import get_training_chat_template
    except ImportError:
        return template, "sentinels"
    try:
        training = get_training_chat_template(processor)
    except (
        Exception
    ):  # TRL probes templates by rendering tool calls, which a template may refuse in its own way
        training = None
    return (training, "TRL's training template") if training else (template, "sentinels")


def turn_end_tokens(tokenizer: Any, image_token: str | None) -> tuple[str, ...]:
    """The tokens that may end a turn, longest first."""
    ends = {str(token) for token in tokenizer.all_special_tokens}
    ends |= {
        token
        for token in tokenizer.get_added_vocab()
        if re.fullmatch(r"<\|?(im_end|end[\w|]*|eot\w*)\|?>", token)
    }
    ends -= {image_token, tokenizer.unk_token, tokenizer.bos_token}
    return tuple(sorted(ends, key=lambda token: (-len(token), token)))


@functools.cache
def any_of(tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def end_turns(
    text: str,
    spans: list[Span],  # one an answer, in order
    answers: Sequence[str],
    end_of_turn: str,
    turn_ends: tuple[str, ...],
    eos: str | None,
) -> tuple[str, list[Span]]:
    """Moves the edges of each answer's span as `end_of_turn` says; "add" may write an end-of-sequence token."""
    if end_of_turn == "template":
        return text, spans
    moved, shift = [], 0
    for (start, end), answer in zip(spans, answers, strict=True):
        start, body = own_text(text, (start + shift, end + shift), answer, turn_ends)
        if end_of_turn == "drop":
            moved.append((start, body))
            continue
        following = re.compile(rf"\s*(?:{any_of(turn_ends).pattern})").match(text, body)
        if following:
            moved.append((start, following.end()))
            continue
        if eos is None:
            raise PromptError(
                "end_of_turn = 'add', but the tokenizer has no end-of-sequence token. Use --end-of-turn template"
            )
        text = text[:body] + eos + text[body:]
        shift += len(eos)
        moved.append((start, body + len(eos)))
    return text, moved


def own_text(text: str, span: Span, answer: str, turn_ends: Sequence[str]) -> Span:
    """Where the answer's own text stands in what a mark holds; template text beside it is left out."""
    start, end = span
    body = _text_end(text, start, end, turn_ends)
    if text[start:body].endswith(answer.rstrip()):
        start = body - len(answer.rstrip())
    elif text[start:body].endswith(answer.strip()):  # some templates strip what they are given
        start = body - len(answer.strip())
    else:
        start = max(text.rfind(answer, start, end), start)
    if text.startswith(answer, start):
        body = start + len(answer)  # with white space that is its own
    return start, body


def _text_end(text: str, start: int, end: int, turn_ends: Sequence[str]) -> int:
    """Where the answer's own text ends, without white space and end-of-turn tokens behind it.

    From the end on, through every place that these lead to, since a token may end in another: linear in their length,
    where a search for (space | token)* up to the end is quadratic in each run of spaces within the answer.
    """
    reached, waiting = {end}, [end]
    while waiting:
        at = waiting.pop()
        before = {at - len(token) for token in turn_ends if text.endswith(token, start, at)}
        if at > start and text[at - 1].isspace():
            before.add(at - 1)
        waiting += before - reached
        reached |= before
    return min(reached)


# --- offsets ---


def expanded_spans(spans: list[Span], replacements: list[list[dict]] | None) -> list[Span]:
    """Moves spans of the rendered text past the image placeholders that were expanded before them."""
    if replacements is None or len(replacements) == 0 or len(replacements[0]) == 0:  # a tensor, where empty
        return spans
    ends = [item["span"][1] for item in replacements[0]]
    gained = [0] + [item["new_span"][1] - item["span"][1] for item in replacements[0]]
    return [tuple(char + gained[bisect.bisect_right(ends, char)] for char in span) for span in spans]


def overlapping(offsets: list[list[int]], span: Span) -> list[int]:
    """Indices of the tokens that overlap a span. Added special tokens have no width and never do."""
    start, end = span
    return [index for index, (low, high) in enumerate(offsets) if low < end and high > start]


def count_boundary_tokens(text: str, span: Span, expanded: Span, first: list[int], last: list[int]) -> int:
    """How many of an answer's two edge tokens hold characters, other than white space, from outside it."""
    before = max(expanded[0] - first[0], 0)
    after = max(last[1] - expanded[1], 0)
    outside = (text[span[0] - before : span[0]], text[span[1] : span[1] + after])
    return sum(bool(characters.strip()) for characters in outside)
