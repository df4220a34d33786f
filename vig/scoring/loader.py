"""Records to encoded samples: decoding and the processor, prefetched by worker processes if asked."""

from __future__ import annotations

import copy
import hashlib
import itertools
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any, TypeVar

import torch
from PIL import Image
from torch.utils.data import Dataset

from vig.data.images import open_image, open_images
from vig.data.records import check_sample
from vig.data.sample import BrokenRecord, Sample, SampleError
from vig.data.workers import prefetch
from vig.models.prompts import Encoded, Encoder, without_images
from vig.models.sample_errors import as_sample_errors
from vig.scoring import batching
from vig.scoring.prefix_sharing import View

Item = TypeVar("Item")
MOST_WORKERS = 8  # unless asked for


class LoadedRecord:
    """One record as the scorer takes it: `encoded` and, where the null needs it, its null twin; or `error`."""

    __slots__ = ("encoded", "error", "hashes", "null", "null_hashes", "place", "record", "sizes")

    def __init__(self, record: Sample | BrokenRecord, place: int = 0):
        self.record, self.place = record, place  # its number among the records given
        self.encoded: Encoded | None = None
        self.null: Encoded | None = None
        self.error: SampleError | None = record.error if isinstance(record, BrokenRecord) else None
        self.hashes: list[str] = []  # content of each image
        self.null_hashes: list[str] | None = None  # and of those that its null twin has in their place
        self.sizes: list[tuple[int, int]] = []

    @property
    def is_multimodal(self) -> bool:
        return bool(self.record.images)

    @property
    def view(self) -> View:
        """As the pass with the image sees it."""
        return View(self.encoded, tuple(self.hashes))

    @property
    def null_view(self) -> View | None:
        """As the null pass sees it; None where the null is made of the clean pixels."""
        return None if self.null is None else View(self.null, tuple(self.null_hashes or ()))


class _Groups(Dataset):
    """Records with the same images are one item, so that one worker decodes and processes the images once."""

    def __init__(
        self,
        records: Sequence[Sample | BrokenRecord],
        encoder: Encoder,
        stage: str,
        window: Sequence[Sample | BrokenRecord],
    ):
        self.records, self.encoder, self.stage = records, with_image_memory(encoder), stage
        self.donors = Donors(window)
        self.groups = batching.by_images(records)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, number: int) -> list[LoadedRecord]:
        group = self.groups[number]
        opened = Opened()
        found = [
            load_record(self.records[place], self.encoder, self.stage, place=place, opened=opened)
            for place in group
        ]
        if self.stage == "image":
            self.donors.give(found, self.encoder)
        return found

    def lost(self, number: int) -> list[LoadedRecord]:
        """The records of a group whose processes died."""
        found = [LoadedRecord(self.records[place], place) for place in self.groups[number]]
        for item in found:
            if item.error is None:
                item.error = process_died(item.record.key, item.record.id)
        return found


def process_died(key: str, id: str) -> SampleError:
    reason = "the process that decoded and tokenised it died"
    return SampleError(key, id, reason, "Replace its images, or give the processes more memory")


def load_records(
    records: Sequence[Sample | BrokenRecord],
    encoder: Encoder,
    stage: str,
    workers: int = 0,
    window: Sequence[Sample | BrokenRecord] | None = None,
) -> Iterator[LoadedRecord]:
    """Encodes records, those with the same images one after another: `place` tells which it was.

    stage: the null image's stage. workers: processes that prefetch, each at most two groups; the order does not
    depend on them. 0 works in this process. A process that dies is replaced; a group whose processes die again and
    again is left, its records errors. window: all records of the window, of which `Donors` takes images; the given ones
    unless told.
    """
    groups = _Groups(records, encoder, stage, records if window is None else window)
    if not workers:
        return (item for number in range(len(groups)) for item in groups[number])
    return itertools.chain.from_iterable(prefetch(groups, workers, groups.lost))


def prefetch_in_thread(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, the next one made by a thread while the last one is worked on; at most two are prefetched."""
    made: queue.Queue = queue.Queue(maxsize=1)
    stopped = threading.Event()

    def put(name: str, value: Any) -> None:
        while not stopped.is_set():
            with suppress(queue.Full):
                made.put((name, value), timeout=0.1)
                return

    def make() -> None:
        try:
            for item in items:
                put("item", item)
                if stopped.is_set():
                    return
            put("end", None)
        except BaseException as error:
            put("error", error)

    threading.Thread(target=make, name="vig-prefetch", daemon=True).start()
    try:
        while True:
            name, value = made.get()
            if name == "end":
                return
            if name == "error":
                raise value
            yield value
    finally:
        stopped.set()


def workers_beside(device: torch.device) -> int:
    """How many worker processes keep a model on `device` fed: none beside a CPU, which they would take from it."""
    if device.type == "cpu":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_WORKERS, cores - 1))


class Opened:
    """The decoded images of the last sample, kept for the next one that has the same."""

    def __init__(self):
        self._key, self._images, self._hashes = None, [], []

    def images_of(self, record: Sample) -> tuple[list[Image.Image], list[str]]:
        """Decoded images and their content hashes. Raises SampleError."""
        if self._key is None or self._key != record.images:
            self._key, images = None, open_images(record)
            self._key, self._images = record.images, images
            self._hashes = [content_hash(image) for image in images]
        return self._images, self._hashes


def load_record(
    record: Sample | BrokenRecord,
    encoder: Encoder,
    stage: str,
    *,
    place: int = 0,
    opened: Opened | None = None,
) -> LoadedRecord:
    """Encodes one record; whatever goes wrong with it becomes its `error`. opened: remembers images between calls."""
    loaded = LoadedRecord(record, place)
    if loaded.error is not None:
        return loaded
    with _errors_of(loaded):
        check_sample(record)
        images, hashes = (opened or Opened()).images_of(record)
        loaded.encoded = encoder.encode(record, images)
        loaded.hashes = hashes
        loaded.sizes = [image.size for image in images]
        if stage == "prompt" and images:
            loaded.null = encoder.encode(without_images(record), [])
            _check_same_answer(loaded)
    return loaded


@contextmanager
def _errors_of(item: LoadedRecord) -> Iterator[None]:
    """Makes what is raised at one sample the sample's error."""
    try:
        with as_sample_errors(item.record.key, item.record.id):
            yield
    except SampleError as error:
        item.encoded, item.error = None, bare(error)


def bare(error: SampleError) -> SampleError:
    """Without the frames that raised it, which hold pictures, and hold it in turn."""
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)


def new_pixel_bytes() -> Callable[[LoadedRecord], int]:
    """Counts the bytes of a record's pixels that the record before it does not hold already."""
    last: list[str] = []

    def count(item: LoadedRecord) -> int:
        nonlocal last
        known, last = item.hashes == last, item.hashes
        if item.encoded is None or known:
            return 0
        return sum(value.nbytes for value in item.encoded.pixels.values())

    return count


# --- the processor sees each image once ---


def with_image_memory(encoder: Encoder) -> Encoder:
    """The same encoder, whose image processor remembers its last call: the next question asks for the same pixels."""
    images = getattr(encoder.processor, "image_processor", None)
    if images is None or isinstance(images, ImageMemory):
        return encoder
    encoder = copy.copy(encoder)
    encoder.processor = copy.copy(encoder.processor)
    encoder.processor.image_processor = ImageMemory(images)
    return encoder


class ImageMemory:
    """An image processor that answers a call with the images and options of the last one from memory."""

    def __init__(self, inner: Any):
        self._inner, self._call, self._images, self._output = inner, None, [], None

    def __call__(self, images: Any, *args: Any, **options: Any) -> Any:
        flat = _flat(images)  # kept, so that no other picture can take the place of one in memory
        call = ([id(image) for image in flat], repr((args, sorted(options.items()))))
        if self._call != call:
            self._output = self._inner(images, *args, **options)
            self._call, self._images = call, flat
        output = copy.copy(self._output)
        output.data = dict(self._output.data)  # processors take entries out of what they are given
        return output

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_inner":
            raise AttributeError(name)
        return getattr(self._inner, name)


def _flat(images: Any) -> list[Any]:
    if isinstance(images, list | tuple):
        return [picture for item in images for picture in _flat(item)]
    return [images]


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
    """The "shuffle" null: every image is replaced by the next different one of its window, in reading order.

    The last image takes the first one. What is different is told by content, and what cannot be read is passed over.
    A function of the window's records alone: neither blocks nor processes nor what is scored again change it. All
    questions about an image share its donor.
    """

    def __init__(self, window: Sequence[Sample | BrokenRecord]):
        self.window = window
        self._hashes: dict[int, str | None] = {}  # content by place; None: it cannot be read

    @cached_property
    def _sources(self) -> list[Any]:
        """The different images of the window in reading order, unopened."""
        images = (image for record in self.window for image in getattr(record, "images", ()))
        return list({batching.image_key(image): image for image in images}.values())

    @cached_property
    def _places(self) -> dict[Any, int]:
        return {batching.image_key(image): place for place, image in enumerate(self._sources)}

    def give(self, group: Sequence[LoadedRecord], encoder: Encoder) -> None:
        """Encodes each multimodal sample once more, with the donors of its images resized to their sizes."""
        last, donors, hashes = None, [], []
        for item in group:
            if item.encoded is None or not item.is_multimodal:
                continue
            with _errors_of(item):
                if last != item.record.images:
                    last, donors = None, self.pictures(item.record, item.hashes, item.sizes)
                    last, hashes = item.record.images, [content_hash(donor) for donor in donors]
                item.null, item.null_hashes = encoder.encode(item.record, donors), hashes
                _check_same_answer(item)

    def pictures(
        self, sample: Sample, hashes: Sequence[str], sizes: Sequence[tuple[int, int]]
    ) -> list[Image.Image]:
        """What stands in the place of each of its images, whose contents and sizes are given. Raises SampleError."""
        donors = []
        for source, content, size in zip(sample.images, hashes, sizes, strict=True):
            donor = self._next(self._places.get(batching.image_key(source), -1), content)
            if donor is None:
                reason = "there is no other image to take its place"
                raise SampleError(sample.key, sample.id, reason, "Use null blur")
            donors.append(donor.resize(size, Image.Resampling.BICUBIC))
        return donors

    def _next(self, place: int, content: str) -> Image.Image | None:
        """The first image behind `place` that can be read and is different; behind the last comes the first."""
        for other in itertools.chain(range(place + 1, len(self._sources)), range(place)):
            if other in self._hashes and self._hashes[other] in (None, content):
                continue
            try:
                image = open_image(self._sources[other], "", "")
            except SampleError:
                self._hashes[other] = None
                continue
            if other not in self._hashes:
                self._hashes[other] = content_hash(image)
            if self._hashes[other] != content:
                return image
        return None
