"""From a row of scores to a SampleView: token texts, questions, images and null images as the model sees them."""

from __future__ import annotations

from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from vig.data.images import open_images
from vig.data.reading import Reading, Source
from vig.data.sample import BrokenRecord, Sample, SampleError, is_answer, text_of
from vig.data.samples import read_samples
from vig.models.token_texts import token_texts
from vig.reporting.views import Pass, SampleView
from vig.scoring import batching
from vig.store.fingerprints import renamed
from vig.store.token_stats import TOKEN_STATS, stat_columns

MOST_IMAGES = 8  # of a sample that are shown


class Viewer:
    """Turns score rows into views with whatever can be had: without a tokenizer ids stand for words, without
    the data there are no questions and pictures; ``notes`` says what is missing and why."""

    def __init__(self, metadata: dict, *, processor: Any = None, data=None, image_root=None):
        self.metadata, self.data, self.notes = metadata, data, []
        self.image_root = image_root or metadata.get("image_root")
        self.processor = processor or self._load_processor()
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        self.samples: dict[str, Sample | BrokenRecord] = {}
        self.null = metadata.get("null") or {}
        self.others: dict[str, list[Image.Image]] = {}  # null shuffle: what stands in for the images, by key

    def _load_processor(self) -> Any:
        from transformers import AutoProcessor

        try:
            revision = (
                self.metadata.get("revision") if not Path(str(self.metadata["model"])).is_dir() else None
            )
            return AutoProcessor.from_pretrained(self.metadata["model"], revision=revision)
        except Exception as error:  # whatever a foreign checkpoint raises: the page is still worth having
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            self.notes.append(f"Words are shown as token ids: the processor could not be loaded ({reason}).")
            return None

    def find(self, rows: dict[str, int]) -> None:
        """Read the records of these keys; each key with its row number in reading order, where it should lie."""
        if self.data is None:
            self.notes.append(
                "Questions and pictures are missing: the scores do not name their data. Give data."
            )
            return
        missing = set(rows)
        try:
            if self.null.get("kind") != "shuffle":  # which takes its pictures from the whole window
                numbers = set(rows.values())
                self._read(missing, wanted=numbers.__contains__)
            if missing:
                self._read(missing)
            problem = renamed(min(rows), self.data) if missing and missing == set(rows) else None
        except (OSError, ValueError) as error:
            gone = f"there is no {self.data} any more. Give it with --data (data=), under its old name."
            reason = error if Path(self.data).exists() else gone
            self.notes.append(f"Questions and pictures are missing: {reason}")
            return
        if problem is not None:
            self.notes.append(f"Questions and pictures are missing: {problem}.")
        elif missing:
            self.notes.append(f"{len(missing)} of the samples shown are not in {self.data} any more.")

    def _read(self, missing: set[str], wanted: Any = None) -> None:
        """Takes records off `missing`. wanted: numbers of the records that need be read."""
        size, limit = 1, None
        shuffled = self.null.get("kind") == "shuffle"
        if shuffled:
            size, limit = self.metadata.get("window") or batching.WINDOW, self.metadata.get("limit")
        source = Source(Path(self.data), Reading.stored(self.metadata))
        records = read_samples(source, image_root=self.image_root, limit=limit, wanted=wanted)
        for window in batching.chunks(records, size):
            for record in window:
                if record is not None and record.key in missing:
                    missing.discard(record.key)
                    self.samples[record.key] = record
                    if shuffled:
                        self._find_others(record, window)
            if not missing:
                return

    def _find_others(self, record: Sample | BrokenRecord, window: list[Sample | BrokenRecord]) -> None:
        from vig.scoring.loader import Donors, content_hash

        if isinstance(record, BrokenRecord) or not record.images:
            return
        with suppress(SampleError):  # the page says that it is not shown
            images = open_images(record)
            hashes, sizes = [content_hash(image) for image in images], [image.size for image in images]
            self.others[record.key] = Donors(window).pictures(record, hashes, sizes)

    def view(self, row: dict, kept: list[bool] | None = None) -> SampleView:
        """The words of a row of scores; `add_pictures` adds the rest."""
        ids = row["token_ids"] or []
        scored = Pass(row["token_nll_image"] or [], row["token_nll_null"] or [], row["vig"], kept)
        scored.stats = {one.label: row[one.name] for one in stat_columns(TOKEN_STATS) if row.get(one.name)}
        view = SampleView(
            row["key"],
            row["id"] or "",
            row["source"] or "",
            row["status"],
            tokens=self._texts_of(ids),
            passes=[scored] if ids else [],
        )
        record = self.samples.get(row["key"])
        if isinstance(record, BrokenRecord):
            view.note = record.error.reason
        elif record is None:
            view.note = "sample not found"
        else:
            questions = questions_of(record)
            starts = [index for index, position in enumerate(row["positions"] or []) if position == 0]
            view.question = "\n".join(questions[:1] if starts else questions)
            view.turns = list(zip(starts[1:], questions[1:], strict=False))
        return view

    def _texts_of(self, ids: list[int]) -> list[str]:
        if self.tokenizer is None:
            return [f"{'' if index == 0 else ' '}{id}" for index, id in enumerate(ids)]
        return token_texts(self.tokenizer, ids)

    def n_images(self, key: str) -> int:
        """How many images `add_pictures` will show."""
        return min(MOST_IMAGES, len(getattr(self.samples.get(key), "images", ())))

    def add_pictures(self, view: SampleView) -> None:
        """Adds images and their nulls as the model sees them, and what is to be said of them."""
        sample = self.samples.get(view.key)
        if sample is None or isinstance(sample, BrokenRecord):
            return
        if not sample.images:
            view.note = view.note or "text only"
            return
        try:
            images = open_images(sample)
        except SampleError as error:
            view.note = error.reason
            return
        more = f"first {MOST_IMAGES} of {len(images)} images" if len(images) > MOST_IMAGES else ""
        view.images, nulls = images[:MOST_IMAGES], []
        try:
            view.images, nulls, why = self._as_the_model_sees(view, sample, images)
        except Exception as error:  # pictures adorn the page: a processor that fails must not cost the report
            why = f"the null image could not be made ({str(error).partition(chr(10))[0]})"
        view.nulls = [nulls or [None] * len(view.images)]
        view.note = "; ".join(part for part in (why, more) if part)

    def _as_the_model_sees(self, view: SampleView, sample: Sample, images: list[Image.Image]):
        """Pictures made back from the processor's pixels, their nulls, and why there are none."""
        if self.processor is None:
            return images[:MOST_IMAGES], [], "not made without the processor"
        from vig.models.null_image import NullSettings
        from vig.models.null_pixels import PixelRange, as_image, null_pictures
        from vig.scoring.loader import content_hash

        span, shown = PixelRange.of(self.processor), self._pixels_of(sample, images)
        view.cropped = [
            number for number, (picture, image) in enumerate(zip(shown, images, strict=False))
            if is_cropped(self.processor, image.size, tuple(picture.shape[-2:]))
        ]  # fmt: skip
        clean = [as_image(picture, span) for picture in shown]
        settings = NullSettings(self.null.get("kind", "blur"), **_sigma(self.null))
        if settings.stage == "prompt":
            return clean, [], "no image at all"
        if settings.stage == "image":
            others = self.others.get(sample.key)
            if others is None:
                return clean, [], "another sample’s image, which could not be found"
            return clean, [as_image(picture, span) for picture in self._pixels_of(sample, others)], ""
        seeds = [int(content_hash(image), 16) for image in images]
        nulls = [
            null_pictures(picture[None], settings, span, [seed])[0]
            for picture, seed in zip(shown, seeds, strict=False)
        ]
        return clean, [as_image(null, span) for null in nulls], ""

    def _pixels_of(self, sample: Sample, images: list[Image.Image]) -> list[Any]:
        """(C, H, W) of the first images as the processor makes them: whole pictures, not their thumbnails."""
        encoded = self._encoder.encode(sample, images)
        pictures = self._pixels.pictures(encoded.pixels, [encoded.sizes])
        largest: dict[int, Any] = {}
        for picture in pictures:
            if picture.image not in largest or picture.pixels.numel() > largest[picture.image].numel():
                largest[picture.image] = picture.pixels
        return [largest[number] for number in sorted(largest)[:MOST_IMAGES]]

    @cached_property
    def _encoder(self):
        from vig.models.prompts import Encoder

        return Encoder(self.processor)

    @cached_property
    def _pixels(self):
        """By the model's config, or, where the model has moved, by the one beside the given processor."""
        from transformers import AutoConfig

        from vig.models.family_pixels import FamilyPixels

        try:
            return FamilyPixels.of(AutoConfig.from_pretrained(self.metadata["model"]), self.processor)
        except (OSError, ValueError, KeyError):
            return FamilyPixels.of(AutoConfig.from_pretrained(self.tokenizer.name_or_path), self.processor)


def _sigma(null: dict) -> dict[str, float]:
    params = null.get("params") or {}
    return {"sigma": params["sigma"]} if "sigma" in params else {}


def is_cropped(processor: Any, size: tuple[int, int], shown: tuple[int, int]) -> bool:
    """Whether the processor cut off a part of an image.

    size: width and height of the image; shown: height and width of what the model sees of it, without padding. A
    processor that cuts tiles, or pads, shows another size than that of its crop.
    """
    maker = getattr(processor, "image_processor", processor)
    if not getattr(maker, "do_center_crop", False):
        return False
    crop, target, (width, height) = dict(maker.crop_size), dict(maker.size), size
    if shown != (crop.get("height"), crop.get("width")):
        return False
    if maker.do_resize and target.get("shortest_edge"):
        scale = target["shortest_edge"] / min(size)
        width, height = round(width * scale), round(height * scale)
    elif maker.do_resize:
        width, height = target.get("width") or width, target.get("height") or height
    return height > shown[0] + 1 or width > shown[1] + 1  # rounding takes a pixel


def questions_of(sample: Sample) -> list[str]:
    """What was asked before each answer, image marks left out."""
    questions, said = [], []
    for message in sample.messages:
        if is_answer(message):
            questions.append("\n".join(said))
            said = []
        else:
            said.append(text_of(message).replace("<image>", "").strip())
    return questions
