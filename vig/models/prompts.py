"""From a sample to token ids and the mask of its answer tokens, for scoring and training alike.

The answer of a turn is a span of characters in the rendered prompt. It comes, in this order, from the
template's own ``{% generation %}`` marks; from TRL's training template for the family; else from sentinels
put in the place of the answers, accepted only if putting the answers back reproduces the prompt exactly.
The processor expands the image placeholders, the tokenizer gives character offsets, and a token belongs to an
answer when it overlaps the answer's span. What was found is checked against the decoded text.
"""

from __future__ import annotations

import bisect
import itertools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.utils.chat_template_utils import render_jinja_template

from vig.data.images import open_images
from vig.data.sample import Sample, SampleError, answers, is_answer
from vig.models.answer_spans import (
    PromptError,
    Span,
    answer_template,
    any_of,
    count_boundary_tokens,
    end_turns,
    expanded_spans,
    overlapping,
    turn_end_tokens,
)
from vig.models.end_of_turn import DEFAULT, check_end_of_turn
from vig.models.image_tokens import (
    has_bidirectional_prefix,
    image_token_id,
    placeholders,
    prefix_inputs,
    prefix_marks,
)
from vig.models.lm_head import IGNORE

TOKEN_LEVEL = ("mm_token_type_ids", "token_type_ids")  # processor outputs of shape (1, T)
NOT_MODEL_INPUT = ("input_ids", "attention_mask", "offset_mapping", "text_replacement_offsets")
MAX_OUTSIDE = 8  # characters that the boundary tokens of an answer may hold from outside it


@dataclass
class Encoded:
    """One sample as the model sees it. T is its number of tokens, image placeholders expanded."""

    sample: Sample
    input_ids: list[int]  # (T,)
    answer_index: list[int]  # positions in input_ids of the answer tokens, ascending
    turn_position: list[int]  # position of each answer token in its turn's answer; 0 starts a turn
    pixels: dict[str, Tensor]  # pixel_values and what goes with them; {} for a text-only sample
    sizes: list[tuple[int, int]] = field(default_factory=list)  # (height, width) of each decoded image
    truncated: int = 0  # answer tokens cut off by max_length
    boundary_tokens: int = 0  # answer tokens that hold characters from outside their answer
    unknown: int = 0  # answer tokens that are the tokenizer's unknown token
    image_end: int = 0  # position behind the last image token
    null_pixels: dict[str, Tensor] | None = field(default=None, repr=False)  # nulls made from other images

    @property
    def answer_ids(self) -> list[int]:
        return [self.input_ids[index] for index in self.answer_index]

    @property
    def n_fed(self) -> int:
        """How many of its tokens scoring feeds the model: no answer depends on what follows the last one.

        Image tokens behind it are fed too. How an image is cut may depend on how many there are (LLaVA-OneVision), so
        none can be left out.
        """
        return max(self.answer_index[-1] + 1, self.image_end)


class Encoder:
    """Renders, tokenises and marks samples with a transformers processor (or a tokenizer, for text alone).

    end_of_turn: "add" supervises the answer's text and the end-of-turn token after it (written there if the template
        writes none); "template" exactly what the template marks; "drop" the answer's text alone.
    max_length: the longest sequence in tokens. Longer ones raise, or with `truncate` lose their end.
    Raises PromptError where the processor has no chat template or its tokenizer no character offsets.
    """

    def __init__(
        self,
        processor: Any,
        *,
        end_of_turn: str = DEFAULT,
        max_length: int | None = None,
        truncate: bool = False,
    ):
        check_end_of_turn(end_of_turn)
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        if not self.tokenizer.is_fast:
            raise PromptError(
                f"{type(self.tokenizer).__name__} gives no character offsets. Load it with use_fast=True"
            )
        self.end_of_turn, self.max_length, self.truncate = end_of_turn, max_length, truncate
        self.template, self.source_of_answers = answer_template(processor)
        self.image_token = getattr(processor, "image_token", None)
        self.image_token_id = image_token_id(processor)
        self.placeholders = placeholders(processor)
        self.has_bidirectional_prefix = has_bidirectional_prefix(processor)
        self._turn_ends = turn_end_tokens(self.tokenizer, self.image_token)
        self.stop_ids = sorted(
            self.tokenizer.convert_tokens_to_ids(list(self._turn_ends))
        )  # of the tokens that may end a turn

    def encode(self, sample: Sample, images: list[Image.Image] | None = None) -> Encoded:
        """Encodes one sample. images: its decoded images; opened from the sample unless given.

        Raises SampleError for images that cannot be read, answers that cannot be located, and sequences
        longer than max_length.
        """
        if images is None:
            images = open_images(sample)
        refuse = partial(SampleError, sample.key, sample.id)
        self._check_text(sample, refuse)
        text, spans = self._render(sample, refuse)
        self._check_rendered(sample, text, refuse)
        text, spans = end_turns(
            text, spans, answers(sample), self.end_of_turn, self._turn_ends, self.tokenizer.eos_token
        )
        outputs = self._tokenise(text, images, refuse)
        input_ids = outputs["input_ids"][0].tolist()
        offsets = outputs["offset_mapping"][0].tolist()
        expanded = expanded_spans(spans, outputs.get("text_replacement_offsets"))
        turns = [overlapping(offsets, span) for span in expanded]
        if not all(turns):
            raise refuse("an answer has no tokens", "Check the chat template and the answer's text")
        self._check_decoded(sample, input_ids, turns, refuse)
        pixels = {key: value for key, value in outputs.items() if key not in NOT_MODEL_INPUT}
        if self.has_bidirectional_prefix:
            pixels |= prefix_marks(len(input_ids), turns[0][0])
        encoded = Encoded(
            sample,
            input_ids,
            answer_index=[index for turn in turns for index in turn],
            turn_position=[position for turn in turns for position in range(len(turn))],
            pixels=pixels,
            sizes=[(image.height, image.width) for image in images],
            boundary_tokens=sum(
                count_boundary_tokens(text, span, moved, offsets[turn[0]], offsets[turn[-1]])
                for span, moved, turn in zip(spans, expanded, turns, strict=True)
            ),
            unknown=sum(input_ids[index] == self.tokenizer.unk_token_id for turn in turns for index in turn),
            image_end=_end_of(self.image_token_id, input_ids) if images else 0,
        )
        return self._fit(encoded, refuse)

    def collate(self, encoded: Sequence[Encoded], *, until_last_answer: bool = False) -> dict[str, Tensor]:
        """Right-pads a batch: input_ids, attention_mask, labels (B, T) int64, and the pixel inputs.

        labels[b, t] is input_ids[b, t] where it is an answer token, else -100; they are not shifted.
        until_last_answer: leave out what follows the last answer token and the images (`Encoded.n_fed`).
        """
        lengths = [item.n_fed if until_last_answer else len(item.input_ids) for item in encoded]
        shape = (len(encoded), max(lengths))
        input_ids = torch.full(shape, self.pad_id(), dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORE, dtype=torch.int64)
        for row, (item, length) in enumerate(zip(encoded, lengths, strict=True)):
            input_ids[row, :length] = _integers(item.input_ids[:length])
            attention_mask[row, :length] = 1
            index = _integers(item.answer_index)
            labels[row, index] = input_ids[row, index]
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        return batch | collate_pixels([item.pixels for item in encoded], lengths)

    def pad_id(self) -> int:
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(id for id in ids if id is not None)

    def _check_text(self, sample: Sample, refuse) -> None:
        if not self.image_token:
            if sample.images:
                raise refuse(
                    "it has images, but the processor takes none", "Use the processor of a vision model"
                )
            return
        for message in sample.messages:
            for part, token in itertools.product(message["content"], self.placeholders):
                if token in part.get("text", ""):
                    raise refuse(f"a text holds the image token {token!r}", "Remove it from the text")

    def _render(self, sample: Sample, refuse) -> tuple[str, list[Span]]:
        if self.source_of_answers == "sentinels":
            return self._render_by_sentinels(sample, refuse)
        text, spans = self._apply_template(sample.messages, sample.tools, marks=True)
        spoken = [message for message in sample.messages if message["role"] == "assistant"]
        if len(spans) != len(spoken):
            raise refuse(
                f"the template marks {len(spans)} answers, the sample has {len(spoken)}",
                "Check the roles of the turns, and the {% generation %} marks of the template",
            )
        return text, [span for span, message in zip(spans, spoken, strict=True) if is_answer(message)]

    def _check_rendered(self, sample: Sample, text: str, refuse) -> None:
        """What the template leaves out, the model would never see."""
        for message in sample.messages:
            if message["role"] == "assistant":
                continue
            for part in message["content"]:
                if part["type"] == "text" and part["text"].strip() not in text:
                    cure = "Leave the turn out, or give the processor a chat template that renders it"
                    raise refuse(f"the chat template does not render the {message['role']} turn", cure)
        if sample.tools and self._apply_template(sample.messages, (), marks=False)[0] == text:
            cure = "Leave the field out, or give the processor a chat template for tools"
            raise refuse("the chat template does not render the field tools", cure)

    def _apply_template(
        self, messages: Sequence[dict], tools: Sequence[dict], *, marks: bool
    ) -> tuple[str, list[Span]]:
        messages = list(messages)
        if self.image_token is None:  # templates of text models expect plain strings
            messages = [message | {"content": _joined(message)} for message in messages]
        rendered, spans = render_jinja_template(
            conversations=[messages],
            tools=list(tools) or None,
            chat_template=self.template,
            return_assistant_tokens_mask=marks,
            **self.tokenizer.special_tokens_map,
        )
        return rendered[0], [tuple(span) for span in spans[0]] if marks else []

    def _render_by_sentinels(self, sample: Sample, refuse) -> tuple[str, list[Span]]:
        texts = answers(sample)
        truth, _ = self._apply_template(sample.messages, sample.tools, marks=False)
        sentinels = [f"\u27e6answer{turn}\u27e7" for turn in range(len(texts))]
        turn = iter(sentinels)
        masked = [
            message | {"content": [{"type": "text", "text": next(turn)}]} if is_answer(message) else message
            for message in sample.messages
        ]
        frame, _ = self._apply_template(masked, sample.tools, marks=False)
        if all(frame.count(sentinel) == 1 for sentinel in sentinels):
            pieces = re.split("|".join(map(re.escape, sentinels)), frame)
            for put_back in (
                texts,
                [text.strip() for text in texts],
            ):  # some templates strip what they are given
                text, spans = pieces[0], []
                for answer, piece in zip(put_back, pieces[1:], strict=True):
                    spans.append((len(text), len(text) + len(answer)))
                    text += answer + piece
                if text == truth:
                    return text, spans
        raise refuse(
            "the template does not show where the answers are",
            "Give the processor a chat template with {% generation %} marks",
        )

    def _tokenise(self, text: str, images: list[Image.Image], refuse) -> dict[str, Any]:
        bos = self.tokenizer.bos_token
        options = {
            "return_offsets_mapping": True,
            "return_tensors": "pt",
            "add_special_tokens": not (bos is not None and text.startswith(bos)),
        }
        if self.image_token is None:
            return dict(self.tokenizer([text], **options))
        try:
            if self.has_bidirectional_prefix:
                return prefix_inputs(self.processor, text, images)
            nested = [images] if images else None  # one list a sample: LLaVA-OneVision tiles only lone images
            return dict(
                self.processor(text=[text], images=nested, return_text_replacement_offsets=True, **options)
            )
        except (ValueError, ZeroDivisionError) as error:
            raise refuse(
                f"the processor refuses it ({error})", "Check the images and their number"
            ) from error

    def _check_decoded(self, sample: Sample, input_ids: list[int], turns: list[list[int]], refuse) -> None:
        for answer, turn in zip(answers(sample), turns, strict=True):
            ids = [input_ids[index] for index in turn]
            if self.tokenizer.unk_token_id is not None and self.tokenizer.unk_token_id in ids:
                continue  # an unknown word cannot be compared; its tokens are still the trainer's tokens
            decoded = self.tokenizer.decode(ids)
            found, wanted = (_plain(any_of(self._turn_ends).sub("", text)) for text in (decoded, answer))
            # A boundary token holds characters of both sides; the answer itself must be there, whole and without more.
            if wanted not in found or len(found) - len(wanted) > MAX_OUTSIDE:
                raise refuse(
                    f"the answer mask decodes to {decoded[:60]!r}, the answer is {answer[:60]!r}",
                    "Give the processor a chat template with {% generation %} marks",
                )

    def _fit(self, encoded: Encoded, refuse) -> Encoded:
        length, longest = len(encoded.input_ids), self.max_length
        if longest is None or length <= longest:
            return encoded
        if not self.truncate:
            raise refuse(
                f"it has {length} tokens, the context holds {longest}",
                "Shorten it or raise --max-length (max_length=)",
            )
        if self.image_token_id in encoded.input_ids[longest:]:
            raise refuse(
                f"max_length {longest} cuts its image tokens", f"Raise max_length (it has {length} tokens)"
            )
        kept = bisect.bisect_left(encoded.answer_index, longest)
        if kept == 0:
            raise refuse(
                f"max_length {longest} leaves no answer token", f"Raise max_length (it has {length} tokens)"
            )
        pixels = {
            key: value[:, :longest] if key in TOKEN_LEVEL else value for key, value in encoded.pixels.items()
        }
        return replace(
            encoded,
            input_ids=encoded.input_ids[:longest],
            answer_index=encoded.answer_index[:kept],
            turn_position=encoded.turn_position[:kept],
            pixels=pixels,
            truncated=len(encoded.answer_index) - kept,
        )


def without_images(sample: Sample) -> Sample:
    """The same conversation with its image parts left out."""
    messages = tuple(
        message | {"content": [part for part in message["content"] if part["type"] != "image"]}
        for message in sample.messages
    )
    return replace(sample, images=(), messages=messages)


def collate_pixels(pixels: Sequence[dict[str, Tensor]], lengths: Sequence[int]) -> dict[str, Tensor]:
    """Joins the pixel inputs of a batch along dimension 0, zero-padding the others to the largest."""
    batch = {}
    for key in dict.fromkeys(key for item in pixels for key in item):
        values = [item[key] for item in pixels if key in item]
        if key in TOKEN_LEVEL:
            values = [
                (item[key] if key in item else torch.zeros((1, length), dtype=values[0].dtype))[:, :length]
                for item, length in zip(pixels, lengths, strict=True)
            ]
        largest = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
        batch[key] = torch.cat([_pad_to(value, largest) for value in values])
    return batch


def _integers(values: Sequence[int]) -> Tensor:
    """(n,) int64. `torch.tensor` takes seven times as long for some thousand integers of a list."""
    return torch.from_numpy(np.array(values, dtype=np.int64))


def _pad_to(value: Tensor, sizes: list[int]) -> Tensor:
    if list(value.shape[1:]) == sizes:
        return value
    padded = value.new_zeros((value.shape[0], *sizes))
    padded[(slice(None), *(slice(size) for size in value.shape[1:]))] = value
    return padded


def _end_of(id: int, input_ids: list[int]) -> int:
    """The position behind the last token that is `id`; 0 where there is none."""
    return len(input_ids) - input_ids[::-1].index(id) if id in input_ids else 0


def _plain(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def _joined(message: dict) -> str:
    return "".join(part["text"] for part in message["content"])
