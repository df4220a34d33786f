"""Records to encoded samples, ahead of the model: decoding and the processor, in worker processes if asked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from PIL import Image
from torch.utils.data import DataLoader, Dataset

from vig.prompts import Encoded, Encoder, without_images
from vig.samples import BrokenRecord, Sample, SampleError, open_image, open_images


class LoadedRecord:
    """One record as the scorer takes it: `encoded` and, where the null needs it, its null twin; or `error`."""

    __slots__ = ("encoded", "error", "hashes", "null", "record", "sizes")

    def __init__(self, record: Sample | BrokenRecord):
        self.record = record
        self.encoded: Encoded | None = None
        self.null: Encoded | None = None
        self.error: SampleError | None = record.error if isinstance(record, BrokenRecord) else None
        self.hashes: list[str] = []  # content of each image
        self.sizes: list[tuple[int, int]] = []

    @property
    def is_multimodal(self) -> bool:
        return bool(self.record.images)


class _Records(Dataset):
    def __init__(self, records: Sequence[Sample | BrokenRecord], encoder: Encoder, stage: str):
        self.records, self.encoder, self.stage = records, encoder, stage

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, row: int) -> LoadedRecord:
        return load_record(self.records[row], self.encoder, self.stage)


def load_records(
    records: Sequence[Sample | BrokenRecord], encoder: Encoder, stage: str, workers: int = 0
) -> Iterator[LoadedRecord]:
    """Encodes records in order. stage: the null image's stage. workers: processes; 0 works in this one."""
    loader = DataLoader(
        _Records(records, encoder, stage), batch_size=None, num_workers=workers, collate_fn=_as_it_is
    )
    yield from loader


def _as_it_is(item: LoadedRecord) -> LoadedRecord:
    return item


def load_record(record: Sample | BrokenRecord, encoder: Encoder, stage: str) -> LoadedRecord:
    """Encodes one record; what goes wrong with it becomes its `error`."""
    loaded = LoadedRecord(record)
    if loaded.error is not None:
        return loaded
    try:
        images = open_images(record)
        loaded.encoded = encoder.encode(record, images)
        loaded.hashes = [content_hash(image) for image in images]
        loaded.sizes = [image.size for image in images]
        if stage == "prompt" and images:
            loaded.null = encoder.encode(without_images(record), [])
            _check_same_answer(loaded)
    except SampleError as error:
        loaded.encoded, loaded.error = None, error
    return loaded


def _check_same_answer(loaded: LoadedRecord) -> None:
    if loaded.encoded.answer_ids != loaded.null.answer_ids:
        raise SampleError(
            loaded.record.key,
            loaded.record.id,
            "the answer has other tokens without the image",
            "Score it with another null image",
        )


def content_hash(image: Image.Image) -> str:
    """Of an RGB picture's size and pixels, whatever file it came from."""
    digest = hashlib.blake2b(f"{image.width}x{image.height}".encode(), digest_size=8)
    digest.update(image.tobytes())
    return digest.hexdigest()


class Donors:
    """The "shuffle" null: every image is replaced by the next different one in reading order.

    All questions about an image share its donor. The last image of a block takes the first one of the block, and
    what was once chosen stays chosen for the window. Only where images lie is remembered, not their pixels.
    """

    def __init__(self):
        self._source: dict[str, tuple] = {}  # content hash -> (image source, key, id) of its donor

    def give(self, block: Sequence[LoadedRecord], encoder: Encoder) -> None:
        """Encodes each multimodal sample of a block once more, with its donors resized to its own sizes."""
        first_seen: dict[str, tuple] = {}
        for item in block:
            if item.encoded is not None:
                for content, source in zip(item.hashes, item.record.images, strict=True):
                    first_seen.setdefault(content, (source, item.record.key, item.record.id))
        order = list(first_seen)
        for place, content in enumerate(order):
            if len(order) > 1:
                self._source.setdefault(content, first_seen[order[(place + 1) % len(order)]])
        for item in block:
            if item.encoded is not None and item.is_multimodal:
                try:
                    item.null = encoder.encode(item.record, self._donors(item))
                    _check_same_answer(item)
                except SampleError as error:
                    item.encoded, item.error = None, error

    def _donors(self, item: LoadedRecord) -> list[Image.Image]:
        donors = []
        for content, size in zip(item.hashes, item.sizes, strict=True):
            if content not in self._source:
                raise SampleError(
                    item.record.key,
                    item.record.id,
                    "there is no other image to take its place",
                    "Use null blur",
                )
            donors.append(open_image(*self._source[content]).resize(size, Image.Resampling.BICUBIC))
        return donors
