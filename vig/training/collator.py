"""Samples worth training on, and the collator that masks their labels by a selection."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from vig.data.records import sample_from_record
from vig.data.sample import BrokenRecord, ImageSource, Sample, SampleError
from vig.models.end_of_turn import DEFAULT
from vig.models.lm_head import IGNORE, count_kept
from vig.models.prompts import Encoded, Encoder
from vig.selection.select import Selection
from vig.store.selections import Entry, read_selection

Selected = Mapping[str, Entry]
Record = Sample | Encoded | Mapping[str, Any]


def open_selection(selection: Selection | Selected | str | Path | None) -> Selected | None:
    """The mapping key -> Entry of a folder, of what `vig.selection.select.select` returned, or of a mapping itself."""
    if isinstance(selection, str | Path):
        return read_selection(selection)
    return selection.table() if isinstance(selection, Selection) else selection


class Kept(NamedTuple):
    """What `keep_samples` leaves, and how many records it left out."""

    samples: list[Record]
    dropped: int  # not selected, or without a selected token
    errors: list[SampleError]  # one a record that never became a sample

    @property
    def broken(self) -> int:
        """How many records never became samples."""
        return len(self.errors)

    def dataset(self) -> Any:
        """The samples as a `datasets.Dataset` of plain records, which is what TRL's trainers take.

        Images stay paths, or bytes. Raises ImportError, with the cure, without the package.
        """
        try:
            import datasets
        except ImportError as error:
            raise ImportError('TRL takes a datasets.Dataset: pip install "vig-kernels[trl]"') from error
        text = datasets.Value("string")
        features = {
            "key": text,
            "id": text,
            "images": datasets.List({"path": text, "bytes": datasets.Value("binary")}),
            "messages": datasets.List({"role": text, "content": datasets.List({"type": text, "text": text})}),
        }
        rows = [_plain(record) for record in self.samples]
        return datasets.Dataset.from_list(rows, features=datasets.Features(features))


def _plain(record: Record) -> dict[str, Any]:
    """A record of strings and bytes alone, as `sample_from_record` reads it."""
    if isinstance(record, Encoded):
        record = record.sample
    if not isinstance(record, Sample):
        record = sample_from_record(record, key=names_of(record)[0])
    return {
        "key": record.key,
        "id": record.id,
        "images": [_path_or_bytes(image) for image in record.images],
        "messages": [
            message
            | {"content": [{"type": part["type"], "text": part.get("text")} for part in message["content"]]}
            for message in record.messages
        ],
    }


def _path_or_bytes(image: ImageSource) -> dict[str, Any]:
    if isinstance(image, Image.Image):
        file = io.BytesIO()
        image.save(file, "PNG")
        image = file.getvalue()
    return {"path": None, "bytes": image} if isinstance(image, bytes) else {"path": str(image), "bytes": None}


def keep_samples(
    records: Iterable[Record | BrokenRecord],
    selection: Selection | Selected | str | Path | None,  # as `SelectiveCollator` takes it
) -> Kept:
    """The records worth training on, in order: those with at least one selected token; all without a selection.

    Raises SampleError for a record that the selection does not know.
    """
    selection = open_selection(selection)
    kept, dropped, errors = [], 0, []
    for record in records:
        if isinstance(record, BrokenRecord):
            errors.append(record.error)
            continue
        if selection is not None:
            entry = _entry(selection, *names_of(record))
            if not (entry.keep and np.any(entry.token_keep)):
                dropped += 1
                continue
        kept.append(record)
    return Kept(kept, dropped, errors)


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
    return record["key"], str(record.get("id", record["key"]))


def _entry(selection: Selected, key: str, id: str) -> Entry:
    try:
        return selection[key]
    except KeyError:
        raise SampleError(
            key, id, "it is not in the selection", "Score and select the data that you train on"
        ) from None


class SelectiveCollator:
    """Turns records into a batch whose labels are the trainer's answer tokens AND the selected ones.

    processor: the model's transformers processor, or a tokenizer for text alone.
    selection: mapping key -> (keep, token_ids, token_keep), the folder of one, or what `vig.select` returned;
        None keeps every answer token.
    end_of_turn: "add" | "template" | "drop"; what the selection was scored with unless given, "add" without one.
    max_length: longer sequences lose their end. An answer cut short is a prefix of the scored one; it keeps the
        selection of its tokens and is counted in `truncated`. Any other difference between the answer tokens
        here and in the selection raises SampleError with both values.
    image_root: where relative image paths of dict records start from.
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
        selection: Selection | Selected | str | Path | None = None,
        *,
        end_of_turn: str | None = None,
        max_length: int | None = None,
        image_root: str | Path | None = None,
        counts: bool = False,
        skip_unreadable: bool = False,
    ):
        self.selection = open_selection(selection)
        metadata = getattr(self.selection, "metadata", {})
        end_of_turn = end_of_turn or metadata.get("end_of_turn", DEFAULT if not metadata else "template")
        self.encoder = Encoder(processor, end_of_turn=end_of_turn, max_length=max_length, truncate=True)
        self.image_root, self.counts, self.skip_unreadable = image_root, counts, skip_unreadable
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
        asked = [{"type": "image"}] * len(images) + [{"type": "text", "text": "?"}]
        turns = (
            {"role": "user", "content": asked},
            {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
        )
        batch = encoder.collate([encoder.encode(Sample("stand-in", "stand-in", images, turns, ""))])
        batch["labels"].fill_(IGNORE)
        return batch | {"num_kept": 0, "num_truncated": 0} if self.counts else batch

    def _batch(self, items: Sequence[Encoded]) -> dict[str, Any]:
        batch = self.encoder.collate(items)
        truncated = 0
        for labels, item in zip(batch["labels"], items, strict=True):
            if self.selection is not None:
                keep = self._token_keep(item)
                labels[torch.tensor(item.answer_index)[~torch.from_numpy(keep)]] = IGNORE
            truncated += item.truncated > 0
        self.truncated += truncated
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
        return self.encoder.encode(record)

    def _token_keep(self, item: Encoded) -> np.ndarray:
        """(n,) bool over the answer tokens of the training side."""
        sample, ids = item.sample, item.answer_ids
        entry = _entry(self.selection, sample.key, sample.id)
        scored = np.asarray(entry.token_ids)
        same = scored[: len(ids)] == np.asarray(ids[: len(scored)])
        if not same.all() or len(ids) > len(scored) or (len(ids) < len(scored) and not item.truncated):
            at = int(np.argmin(same)) if not same.all() else min(len(ids), len(scored))
            raise SampleError(
                sample.key,
                sample.id,
                f"its answer has {len(ids)} tokens here and {len(scored)} in the selection; token {at} is "
                f"{_token(ids, at)} here and {_token(scored, at)} there",
                "Score with the tokenizer, chat template and end_of_turn that you train with",
            )
        return np.array(entry.token_keep[: len(ids)], bool) & entry.keep


def _token(ids: Sequence[int], at: int) -> str:
    return str(int(ids[at])) if at < len(ids) else "missing"
