"""Greedy answers of a loaded model to samples whose answers are hidden."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from vig.data.sample import Sample, SampleError, is_answer, text_of
from vig.evaluation.generation import (
    generation_config,
    left_padded,
    on_device,
    prompt_before,
    stop_ids_of,
    until_stop,
)
from vig.models.prompts import Encoded
from vig.scoring import batching
from vig.scoring.loader import LoadedRecord, load_records
from vig.scoring.memory import in_halves
from vig.scoring.scorer import Scorer

OnShare = Callable[[float], None] | None  # called with the share that is done, 0 to 1


def first_exchange(sample: Sample) -> Sample:
    """The sample up to its first answer, with the images that stand before it. Raises SampleError."""
    end = next((place for place, message in enumerate(sample.messages) if is_answer(message)), None)
    if end is None:
        raise SampleError(sample.key, sample.id, "it has no answer", "Leave it out")
    messages = sample.messages[: end + 1]
    shown = sum(part["type"] == "image" for message in messages for part in message["content"])
    if not shown:
        raise SampleError(sample.key, sample.id, "no image stands before its first answer", "Leave it out")
    return replace(sample, messages=messages, images=sample.images[:shown])


def answer_of(sample: Sample) -> str:
    """The text of its last message, which `first_exchange` made the answer."""
    return text_of(sample.messages[-1])


def with_answer(sample: Sample, answer: str) -> Sample:
    """The same question with another answer."""
    last = sample.messages[-1] | {"content": [{"type": "text", "text": answer}]}
    return replace(sample, messages=(*sample.messages[:-1], last))


def greedy_answers(
    scorer: Scorer,
    samples: Sequence[Sample],
    max_new_tokens: int,
    on_share: OnShare = None,
) -> list[str | SampleError]:
    """What the model writes, greedily, in the place of each sample's first answer; in order.

    The prompt is the one that scoring and training see, up to the answer's first token. A sample that cannot be
    encoded, or alone does not fit into memory, has its error. Rows are padded on the left.
    """
    answers: list[str | SampleError] = []
    for chunk in batching.chunks(samples, batching.BLOCK):
        answers += _of_block(scorer, chunk, max_new_tokens)
        if on_share is not None:
            on_share(len(answers) / len(samples))
    return answers


def _of_block(scorer: Scorer, samples: list[Sample], max_new_tokens: int) -> list[str | SampleError]:
    found: dict[int, str | SampleError] = {}
    items: list[LoadedRecord] = []
    longest = None if scorer.max_length is None else scorer.max_length - max_new_tokens
    for item in load_records(samples, scorer.encoder, "pixels", scorer.workers):
        if item.error is None and longest is not None and item.encoded.answer_index[0] > longest:
            reason = f"its prompt of {item.encoded.answer_index[0]} tokens leaves no room for {max_new_tokens} more"
            item.error = SampleError(item.record.key, item.record.id, reason, "Lower --max-new-tokens")
        if item.error is not None:
            found[item.place] = item.error
        else:
            items.append(item)
    lengths = [item.encoded.answer_index[0] + max_new_tokens for item in items]
    for batch in batching.batches(lengths, scorer.settings.batch_tokens, scorer.settings.batch_size):
        chosen = [items[place] for place in batch]
        for item, answer in zip(chosen, _generate(scorer, chosen, max_new_tokens), strict=True):
            found[item.place] = answer
    return [found[place] for place in range(len(samples))]


def _generate(scorer: Scorer, items: Sequence[LoadedRecord], max_new_tokens: int) -> list[str | SampleError]:
    """A batch that does not fit into memory is halved."""

    def written(items: Sequence[LoadedRecord]) -> list[str]:
        return _written(scorer, [item.encoded for item in items], max_new_tokens)

    def too_large(item: LoadedRecord, reason: str) -> SampleError:
        cure = "Probe it on a larger device, or lower --max-new-tokens"
        return SampleError(item.record.key, item.record.id, reason, cure)

    return in_halves(written, items, too_large)


@torch.inference_mode()
def _written(scorer: Scorer, encoded: Sequence[Encoded], max_new_tokens: int) -> list[str]:
    model, encoder = scorer.loaded.model, scorer.encoder
    stops, pad_id = stop_ids_of(model, encoder), encoder.pad_id()
    inputs = on_device(
        model, left_padded([prompt_before(item, item.answer_index[0]) for item in encoded], pad_id)
    )
    config = generation_config(max_new_tokens, pad_id, stops)
    rows = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :].tolist()
    return [
        encoder.tokenizer.decode(row[: until_stop(row, stops)], skip_special_tokens=True).strip()
        for row in rows
    ]
