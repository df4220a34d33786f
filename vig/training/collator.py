"""Samples worth training on, and the collator that masks their labels by a selection."""

from __future__ import annotations

import copy
import io
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from vig.data.images import image_size
from vig.data.records import sample_from_record
from vig.data.sample import BrokenRecord, ImageSource, Sample, SampleError, is_answer, text_of
from vig.models.end_of_turn import DEFAULT
from vig.models.lm_head import IGNORE, count_kept
from vig.models.prompts import Encoded, Encoder
from vig.models.sample_errors import as_sample_errors
from vig.store.selections import Entry
from vig.training.held_images import HeldImages
from vig.training.labels import (
    CURE,
    AnySelection,
    cut_batch,
    end_ids_of,
    entry_of,
    is_kept,
    known_ends,
    mask,
    open_selection,
)

Record = Sample | Encoded | Mapping[str, Any]


TOKENS_AN_IMAGE = 576  # LLaVA-1.5's, whatever the size of an image
CHARACTERS_A_TOKEN = 4  # of English


class Kept(NamedTuple):
    """What `keep_samples` leaves, and how many records it left out."""

    samples: list[Record]
    dropped: int  # not selected, or without a selected token
    errors: list[SampleError]  # one a record that never became a sample
    answers: list[int | None] = []  # noqa: RUF012 - answer tokens of each sample up to its last kept one, where known

    @property
    def broken(self) -> int:
        """How many records never became samples."""
        return len(self.errors)

    def dataset(self, *, image_tokens: int | Any = TOKENS_AN_IMAGE) -> Any:
        """The samples as a `datasets.Dataset` of plain records, which is what TRL's trainers take.

        Images stay paths, or bytes. ``length`` estimates the tokens of each sample that a batch keeps (those behind the
        last kept label are cut), for ``train_sampling_strategy="group_by_length"``, which groups samples by it and does
        nothing else: the answer up to its last kept token, as scored; the prompt, a token for every 4 characters; and
        the images. A sample that is encoded has its own length.

        image_tokens: of each image, LLaVA-1.5's 576 unless given; or the model's processor, which says how many it
            makes of an image of that size (families whose images differ: Qwen2-VL, InternVL, LLaVA-NeXT, ...). Then the
            header of each image file is read, and one blank image of each size is processed.
        Raises ValueError for another value, and ImportError, with the cure, without the package.
        """
        count = _counter(image_tokens)
        try:
            import datasets
        except ImportError as error:
            raise ImportError('TRL takes a datasets.Dataset: pip install "vig-kernels[trl]"') from error
        text = datasets.Value("string")
        samples = [_sample_of(record) for record in self.samples]
        message = {"role": text, "content": datasets.List({"type": text, "text": text})}
        if any("trained" in one for sample in samples for one in sample.messages):
            message["trained"] = datasets.Value("bool")
        features = {
            "key": text,
            "id": text,
            "images": datasets.List({"path": text, "bytes": datasets.Value("binary")}),
            "messages": datasets.List(message),
            "length": datasets.Value("int32"),
        }
        if any(sample.tools for sample in samples):
            features["tools"] = text
        answers = self.answers or [None] * len(self.samples)
        rows = []
        for record, sample, answer in zip(self.samples, samples, answers, strict=True):
            row = _plain(sample) | {"length": _length(record, sample, answer, count)}
            rows.append({name: row[name] for name in features})
        return datasets.Dataset.from_list(rows, features=datasets.Features(features))


def _sample_of(record: Record) -> Sample:
    if isinstance(record, Encoded):
        return record.sample
    return record if isinstance(record, Sample) else sample_from_record(record, key=names_of(record)[0])


def _counter(image_tokens: int | Any) -> Callable[[ImageSource], int]:
    """How many tokens an image has: so many each, or as the processor makes of it."""
    if isinstance(image_tokens, int) and image_tokens >= 0:
        return lambda image: image_tokens
    if getattr(image_tokens, "image_processor", None) is None:
        raise ValueError(
            f"image_tokens = {image_tokens!r}, expected a number of at least 0, or the model's processor"
        )
    return _ImageTokens(image_tokens)


class _ImageTokens:
    """How many tokens a processor makes of an image, what it writes around them included; 0 of an unreadable one."""

    def __init__(self, processor: Any):
        self.encoder = Encoder(processor)
        self.by_size: dict[tuple[int, int] | None, int] = {None: 0}

    def __call__(self, image: ImageSource) -> int:
        size = image_size(image)
        if size not in self.by_size:
            self.by_size[size] = self._length((Image.new("RGB", size),)) - self._length(())
        return self.by_size[size]

    def _length(self, images: tuple[Image.Image, ...]) -> int:
        return len(self.encoder.encode(_short_sample(images)).input_ids)


def _short_sample(images: tuple[Image.Image, ...]) -> Sample:
    asked = [{"type": "image"}] * len(images) + [{"type": "text", "text": "?"}]
    turns = (
        {"role": "user", "content": asked},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
    )
    return Sample("stand-in", "stand-in", images, turns, "")


def _length(
    record: Record, sample: Sample, answer: int | None, image_tokens: Callable[[ImageSource], int]
) -> int:
    """Tokens up to the last kept one; known of a sample that is encoded, else estimated."""
    if isinstance(record, Encoded):
        return record.answer_index[-1 if answer is None else answer - 1] + 1
    prompt, reply = 0, 0
    for message in sample.messages:
        if is_answer(message):
            reply += len(text_of(message))
        else:
            prompt += len(text_of(message))
    tokens = -(-reply // CHARACTERS_A_TOKEN) if answer is None else answer
    return sum(map(image_tokens, sample.images)) + prompt // CHARACTERS_A_TOKEN + tokens


def _plain(sample: Sample) -> dict[str, Any]:
    """A record of strings and bytes alone, as `sample_from_record` reads it."""
    return {
        "key": sample.key,
        "id": sample.id,
        "images": [_path_or_bytes(image) for image in sample.images],
        "messages": [
            {
                "role": message["role"],
                "content": [{"type": part["type"], "text": part.get("text")} for part in message["content"]],
                "trained": message.get("trained", True),
            }
            for message in sample.messages
        ],
        "tools": json.dumps(sample.tools) if sample.tools else None,
    }


def _path_or_bytes(image: ImageSource) -> dict[str, Any]:
    if isinstance(image, Image.Image):
        file = io.BytesIO()
        image.save(file, "PNG")
        image = file.getvalue()
    return {"path": None, "bytes": image} if isinstance(image, bytes) else {"path": str(image), "bytes": None}


def keep_samples(
    records: Iterable[Record | BrokenRecord],
    selection: AnySelection | None,  # as `SelectiveCollator` takes it
) -> Kept:
    """The records worth training on, in order: those with at least one selected token; all without a selection.

    Raises SampleError for a record that the selection does not know, or knows under another id. Warns where the data
    carry the bytes of their images, and those that are kept take much memory.
    """
    selection = open_selection(selection)
    kept, answers, dropped, errors, held = [], [], 0, [], HeldImages()
    for record in records:
        if isinstance(record, BrokenRecord):
            errors.append(record.error)
            continue
        answer = None
        if selection is not None:
            entry = entry_of(selection, *names_of(record))
            if not is_kept(entry):
                dropped += 1
                continue
            answer = int(np.flatnonzero(entry.token_keep)[-1]) + 1
        kept.append(record)
        answers.append(answer)
        held.add(record)
    return Kept(kept, dropped, errors, answers)


def names_of(record: Record) -> tuple[str, str]:
    """Key and id of a record."""
    if isinstance(record, Encoded):
        record = record.sample
    if isinstance(record, Sample):
        return record.key, record.id
    if "key" not in record:
        raise SampleError(
            "?",
            str(record.get("id", "?")),
            f"the record has no key (it has {', '.join(sorted(record))})",
            'A selection is looked up by "file.json#row": read the data with vig.data.samples.read_samples',
        )
    return record["key"], str(record["key"] if record.get("id") is None else record["id"])


class SelectiveCollator:
    """Turns records into a batch whose labels are the trainer's answer tokens AND the selected ones.

    Our encoder, and `mask_labels` on what it supervises; `SelectiveLabels` is the same for any other collator.

    processor: the model's transformers processor, or a tokenizer for text alone.
    selection: mapping key -> (keep, token_ids, token_keep), the folder of one, or what `vig.select` returned;
        None keeps every answer token.
    end_of_turn: "add" | "template" | "drop"; what the selection was scored with unless given, "add" without one.
    max_length: longer sequences lose their end. An answer cut short is a prefix of the scored one; it keeps the
        selection of its tokens and is counted in `truncated`. Any other difference between the answer tokens
        here and in the selection raises SampleError with both values.
    image_root: where relative image paths of dict records start from.
    cut: leave out the positions behind the last kept label of a batch. Loss and gradients are the same.
    counts: add ``num_kept`` and ``num_truncated`` (int) to each batch, for `FusedLossMixin`, which turns it on.
    skip_unreadable: leave a sample that cannot be encoded (no image, too long a prompt, ...) out of its batch, with a
        warning that names it, instead of raising its SampleError; counted as ``num_unreadable``. A batch of nothing
        else is a stand-in without a label, whose fused loss is zero.

    Takes Samples, Encoded samples (encoded once, used in many runs), or dicts with a ``key`` and LLaVA or
    ``messages`` fields. Returns input_ids, attention_mask, labels (B, T) int64 and the processor's pixel inputs.
    """

    def __init__(
        self,
        processor: Any,
        selection: AnySelection | None = None,
        *,
        end_of_turn: str | None = None,
        max_length: int | None = None,
        image_root: str | Path | None = None,
        cut: bool = True,
        counts: bool = False,
        skip_unreadable: bool = False,
    ):
        self.selection = open_selection(selection)
        metadata = getattr(self.selection, "metadata", {})
        end_of_turn = end_of_turn or metadata.get("end_of_turn", DEFAULT if not metadata else "template")
        self.encoder = Encoder(processor, end_of_turn=end_of_turn, max_length=max_length, truncate=True)
        self.image_root, self.cut, self.counts, self.skip_unreadable = (
            image_root,
            cut,
            counts,
            skip_unreadable,
        )
        self.end_ids = end_ids_of(processor)
        self.truncated = 0  # answers cut short, counted at every visit

    def __call__(self, records: Sequence[Record]) -> dict[str, Any]:
        if not self.skip_unreadable:
            return self._batch([self.encode(record) for record in records])
        batch, errors = self.readable(records)
        for error in errors:
            warnings.warn(f"left out of its batch: {error}", stacklevel=2)
        return batch | {"num_unreadable": len(errors)} if self.counts else batch

    def readable(self, records: Sequence[Record]) -> tuple[dict[str, Any], list[SampleError]]:
        """The batch of the samples that can be encoded, and the errors of the others."""
        items, errors = [], []
        for record in records:
            try:
                items.append(self.encode(record))
            except SampleError as error:
                errors.append(error)
        return (self._batch(items) if items else self._stand_in()), errors

    def _stand_in(self) -> dict[str, Any]:
        """A batch without a label, so that every process of DDP runs its forward and backward."""
        encoder = copy.copy(self.encoder)
        encoder.max_length = None
        images = (Image.new("RGB", (64, 64)),) if encoder.image_token else ()
        batch = encoder.collate([encoder.encode(_short_sample(images))])
        batch["labels"].fill_(IGNORE)
        return batch | {"num_kept": 0, "num_truncated": 0} if self.counts else batch

    def _batch(self, items: Sequence[Encoded]) -> dict[str, Any]:
        batch = self.encoder.collate(items)
        if self.selection is not None:
            rows = zip(batch["labels"].tolist(), items, strict=True)
            batch["labels"] = torch.tensor([self._masked(labels, item) for labels, item in rows])
        truncated = sum(item.truncated > 0 for item in items)
        self.truncated += truncated
        if self.cut:
            batch = cut_batch(batch, self.encoder.image_token_id)
        if self.counts:
            batch |= {"num_kept": count_kept(batch["labels"]), "num_truncated": truncated}
        return batch

    def encode(self, record: Record) -> Encoded:
        """One record as the model sees it. Raises SampleError where it cannot be encoded."""
        if isinstance(record, Encoded):
            return record
        if not isinstance(record, Sample):
            key, _ = names_of(record) if self.selection is not None else (str(record.get("id", "?")), "")
            record = sample_from_record(record, key=key, image_root=self.image_root)
        with as_sample_errors(record.key, record.id):
            return self.encoder.encode(record)

    def _masked(self, labels: list[int], item: Encoded) -> list[int]:
        """The row's labels without the tokens that are not selected."""
        entry = entry_of(self.selection, item.sample.key, item.sample.id)
        found = mask(labels, entry, known_ends(self.selection, entry, self.end_ids))
        if found.ways != 1 or found.truncated > (item.truncated > 0) or any(map(self._is_text, found.others)):
            raise _differs(item, entry)
        return found.labels

    def _is_text(self, id: int) -> bool:
        """Neither an end of turn nor white space, which a template may put behind an answer."""
        return id not in self.end_ids and bool(self.encoder.tokenizer.decode([id]).strip())


def _differs(item: Encoded, entry: Entry) -> SampleError:
    """The answer here is not the one that was scored, nor the beginning of it where the sequence was cut."""
    here, there = item.answer_ids, [int(id) for id in entry.token_ids]
    pairs = enumerate(zip(here, there, strict=False))
    at = next((place for place, (one, other) in pairs if one != other), min(len(here), len(there)))
    one, other = (str(ids[at]) if at < len(ids) else "missing" for ids in (here, there))
    return SampleError(
        item.sample.key,
        item.sample.id,
        f"its answer has {len(here)} tokens here and {len(there)} in the selection; token {at} is {one} here and "
        f"{other} there",
        CURE,
    )
